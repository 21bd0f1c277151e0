"""What a run will need, against numbers worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.torch_dist.iterations import TRACKER
from megatron_erpd.commands import cli
from megatron_erpd.data.rollouts import write_rollouts
from megatron_erpd.errors import LayoutError, RecipeError, RolloutError
from megatron_erpd.manifest import CONTENT, write_manifest
from megatron_erpd.plan import disk
from megatron_erpd.plan.cache import Speed, cache_options
from megatron_erpd.plan.gpu_fit import Gpus, parse_gpus
from megatron_erpd.plan.memory import stage_memory
from megatron_erpd.plan.resources import Resources, estimate
from megatron_erpd.plan.tables import tables
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.slurm import submit
from megatron_erpd.training.metrics import SAVE_TIME

ROOT = Path(__file__).parents[3]
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PARAMETERS = 70_553_706_496
"""As published for Llama 3 70B."""
# A process of the last of four stages, TP 8: 20 layers, the final norm, and an eighth of the output layer, whose rows
# are padded from 128,256 to 126 x 1,024.
LAYER = (8192 + 2 * 1024 + 8192) * 8192 // 8 + 3 * 28672 * 8192 // 8 + 2 * 8192
HEAD = 129_024 // 8 * 8192
HELD = 20 * LAYER + 8192 + HEAD
FIRST = 20 * LAYER + HEAD
"""Of the first stage, which has the embedding."""
TOKENS = 32 * 2054
"""Of a micro-batch: up to 2,048 of a response, and a prompt of 6 bytes in quotes."""
# Per token, without sequence parallelism: four hidden states; an eighth of query, key, value, attention's output, and
# the logarithms of 8 heads' sums in fp32; an eighth of gate, up and their product.
KEPT = 4 * 2 * 8192 + 2 * (2 * 8192 + 2 * 1024) // 8 + 4 * 8 + 2 * 3 * 28672 // 8
TB = 10**12


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Resources]:
    """Plans a recipe of the 70B model on 64 devices, but for what a test changes; 10 TB are free."""
    monkeypatch.chdir(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(20 * TB, 10 * TB, 10 * TB))
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(LLAMA_70B))
    Path("prompts.jsonl").write_text('{"prompt": "1+1="}\n' * 1000)

    def plan_it(
        teraflops: float | None = 400.0, gpus: Gpus | None = None, sequence_length: int | None = None, **sections: Any
    ) -> Resources:
        return estimate(recipe_of(**sections), teraflops, gpus, sequence_length)

    return plan_it


def recipe_of(**sections: Any) -> Recipe:
    recipe = {
        "name": "mine",
        "model": "model",
        "rollouts": {"prompts": "prompts.jsonl", "verifier": "math-verify", "max_new_tokens": 2048},
        "teacher": {"checkpoints": 2},
        "student": {"save_interval": 10},
        "layout": {"tensor_parallel": 8, "pipeline_parallel": 4, "data_parallel": 2, "precision": "bf16"},
        "megatron": {"use-distributed-optimizer": True},
    }
    return Recipe(**{**recipe, **sections})


def finish(stage: Stage, summary: dict[str, Any] | None = None) -> None:
    """Leaves the artifact that a stage would, as far as a plan looks at it."""
    stage.output.mkdir(parents=True, exist_ok=True)
    if stage.command == "import":
        shutil.copytree(stage.inputs["hf"], stage.output / "hf")
    if stage.command == "score":  # the rewards that the rollouts have
        (stage.output / CONTENT).write_text('{"digest": null}')
    inputs = Artifacts(stage.output.parent).digests(stage)
    write_manifest(stage.output, stage.command, stage.request.recorded.identity, inputs, summary)


def shown(found: Resources, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(tables(found))
    return capture.get()


def memory(found: Resources, stage: str) -> dict[str, Any]:
    row = next(m for m in found.memory if m.stage == stage)
    names = ("weights", "gradients", "optimizer", "frozen", "output_layer", "activations", "total")
    return {name: getattr(row, name) for name in names}


def test_memory_of_a_large_model(plan_of: Callable[..., Resources]) -> None:
    """The first pipeline stage keeps the activations of four micro-batches of 20 layers, and has no output layer."""
    found = plan_of()
    assert found.model and found.model.parameters == PARAMETERS
    assert next(m for m in found.memory if m.stage == "teacher").parameters == FIRST
    # bf16 weights, fp32 gradients, and of the fp32 copy and Adam's moments the half, as there are two copies.
    expected = {"weights": 2 * FIRST, "gradients": 4 * FIRST, "optimizer": 6 * FIRST, "frozen": 0, "output_layer": 0}
    activations = 4 * 20 * TOKENS * KEPT
    assert memory(found, "teacher") == {**expected, "activations": activations, "total": 12 * FIRST + activations}
    # One policy at a time, here on the last stage: its layers one after another, the hidden states of both policies.
    cache = memory(found, "cache")
    assert cache["frozen"] == 2 * HELD + 2 * HEAD
    assert cache["activations"] == TOKENS * KEPT + 2 * TOKENS * 2 * 8192
    assert cache["total"] == cache["frozen"] + cache["activations"] + 256 * 2**20


def test_memory_where_the_length_of_the_rollouts_is_not_known(plan_of: Callable[..., Resources]) -> None:
    rollouts = {"rollouts": {"file": "later.parquet"}}
    found = plan_of(**rollouts)
    assert HELD == 2_271_551_488 == found.memory[0].parameters
    expected = {"weights": 2 * HELD, "gradients": 4 * HELD, "optimizer": 6 * HELD, "frozen": 0, "activations": None}
    output_layer = 256 * 2**20 + 4 * HEAD
    assert memory(found, "teacher") == {
        **expected,
        "output_layer": output_layer,
        "total": 12 * HELD + output_layer,
    }
    assert memory(plan_of(megatron={}, **rollouts), "student")["optimizer"] == 12 * HELD
    layout = {"tensor_parallel": 8, "pipeline_parallel": 4}
    assert memory(plan_of(megatron={}, layout=layout, **rollouts), "student") == {
        **{"weights": 4 * HELD, "gradients": 4 * HELD, "optimizer": 8 * HELD, "frozen": 0, "activations": None},
        **{"output_layer": output_layer, "total": 16 * HELD + output_layer},
    }
    assert "unknown" in shown(found)


def test_memory_of_a_mixture(plan_of: Callable[..., Resources]) -> None:
    """Two layers of 8 experts, vocabulary 1,024. Attention, router and norms are dense; TP never splits an expert."""
    sizes = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8},
    }
    Path("model/config.json").write_text(json.dumps(sizes))
    layout = {"tensor_parallel": 2, "data_parallel": 4, "expert_parallel": 4, "precision": "bf16"}
    with pytest.raises(LayoutError, match="teacher: Megatron trains a mixture .* sequence_parallel: true"):
        plan_of(layout=layout)
    found = plan_of(layout={**layout, "sequence_parallel": True})
    dense = 2 * ((256 + 2 * 128 + 256) * 256 // 2 + 8 * 256 + 2 * 256) + 256 + 2 * 1024 // 2 * 256
    experts = 2 * 8 // 4 * 3 * 512 * 256
    held = memory(found, "teacher")
    assert held["weights"] == 2 * (dense + experts)
    # Four copies of what is dense, and two of every expert: 8 processes share 4 groups of experts.
    assert held["optimizer"] == 12 * (dense // 4 + experts // 2)
    assert next(row for row in found.stages if row.name == "teacher").layout == "TP 2, DP 4, EP 4, bf16"


def test_live_teachers_and_on_policy_samplers_are_counted(plan_of: Callable[..., Resources]) -> None:
    found = plan_of(
        student={"teacher": "live"},
        controls={"grpo": {"kind": "on_policy"}, "kl": {"kind": "on_policy", "kl_coefficient": 0.1}},
    )
    assert memory(found, "student")["frozen"] == 2 * 2 * FIRST
    assert memory(found, "controls/grpo")["frozen"] == 2 * PARAMETERS
    assert memory(found, "controls/kl")["frozen"] == 2 * PARAMETERS + 2 * FIRST
    assert found.cache == [] and found.recommendation and "none is made" in found.recommendation


def test_targets_from_hidden_states(plan_of: Callable[..., Resources]) -> None:
    recipe = Recipe(
        name="mine",
        model="model",
        rollouts={"prompts": "prompts.jsonl", "verifier": "math-verify"},
        teacher={},
        student={"teacher": "live"},
        layout={"tensor_parallel": 8, "pipeline_parallel": 4, "precision": "bf16"},
    )
    live = next(stage for stage in plan(recipe) if stage.name == "student")
    stage = live.changed(settings=live.request.settings.model_copy(update={"teacher": "hidden"}))
    found = stage_memory(stage, read_model_shape("model"))
    assert (found.num_frozen, found.frozen) == (0, 2 * 2 * HEAD)  # output layers of base and teacher
    speed, sizes = Speed(1000.0, 10.0), (128_256, 8192)
    for reads_hidden, expected in ((False, 272), (True, 2 * 2 * 8192)):
        options = cache_options(["base", "teacher"], PrecomputeSettings(), *sizes, None, speed, reads_hidden)
        assert [option.read_per_token for option in options] == [8, 272, 400, expected]
        assert options[-1].read_per_second == 10 * expected


def test_the_cache_and_its_alternatives(plan_of: Callable[..., Resources]) -> None:
    found = plan_of()
    assert found.data and found.data.is_upper_bound and found.data.num_rollouts == 16_000
    tokens = 16_000 * 2048
    assert found.data.response_tokens == tokens
    options = {option.name: option for option in found.cache}
    per_token = {"token": 8, "topk float16": 280, "topk float32": 408, "topk float16 + hidden states": 280 + 32_768}
    assert {name: option.bytes_per_token for name, option in options.items()} == per_token
    assert [name for name, option in options.items() if option.chosen] == ["topk float16"]
    chosen = options["topk float16"]
    assert chosen.total_bytes == 280 * tokens + 16_000 * (68 + 68 + 84)
    assert chosen.read_bytes == 272 * tokens + 16_000 * 84
    # 64 devices of 400e12 operations per second; two policies forward, one forward and backward.
    assert chosen.written_per_second == pytest.approx(280 * 64 * 400e12 / (2 * 2 * PARAMETERS))
    assert chosen.read_per_second == pytest.approx(272 * 64 * 400e12 / (6 * PARAMETERS))
    faster = plan_of(teraflops=800.0).cache[1]
    assert faster.written_per_second == pytest.approx(2 * chosen.written_per_second)
    assert options["token"].read_per_token == 8


def test_what_to_keep(plan_of: Callable[..., Resources], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "would fit" in str(plan_of().recommendation)  # 1.1 TB beside 4.4 TB
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(5 * TB))
    assert "would not fit" in str(plan_of().recommendation)
    gradient = {"form": "policy_gradient"}
    assert str(plan_of(student=gradient, cache={"kind": "token"}).recommendation).startswith("token: ")


def test_disk(plan_of: Callable[..., Resources], monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan_of()
    sizes = {item.stage: item.bytes for item in found.disk.items}
    # Weights in bf16; with Adam's moments and fp32 weights 14 bytes per parameter. The student's save before the last
    # one is there until that is written.
    assert sizes["base"] == 2 * PARAMETERS
    assert sizes["teacher"] == sizes["student"] == 2 * 14 * PARAMETERS
    assert sizes["export"] == 2 * 2 * PARAMETERS
    assert sizes["base-log-probs"] == 4 * 16_000 * 2048 + 68 * 16_000
    assert sizes["cache"] == found.cache[1].total_bytes
    assert found.disk.needed == sum(size or 0 for size in sizes.values()) < found.disk.free
    assert "WARNING" not in shown(found)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(TB))
    assert "WARNING: the run does not fit" in shown(plan_of())


BESIDE = {"tensor_parallel": 8, "pipeline_parallel": 4, "data_parallel": 2, "precision": "bf16", "async_save": True}


def test_saves_that_are_there_at_once(plan_of: Callable[..., Resources]) -> None:
    """The signal before a time limit saves once more; a save beside the training overlaps the one before."""
    for sections, saves in (({"slurm": {"time": "04:00:00"}}, (3, 2)), ({"layout": BESIDE}, (3, 3))):
        sizes = {item.stage: item.bytes for item in plan_of(**sections).disk.items}
        assert [sizes[name] for name in ("teacher", "student")] == [count * 14 * PARAMETERS for count in saves]


def test_time_of_a_save(plan_of: Callable[..., Resources]) -> None:
    size = 14 * PARAMETERS  # 988 GB
    assert plan_of().saves == []  # nothing ends them
    save = next(save for save in plan_of(slurm={"partition": "h100"}).saves if save.stage == "teacher")
    assert (save.bytes, save.allowed, save.seconds) == (size, 270.0, None)
    text = shown(plan_of(slurm={"partition": "h100"}), width=400)
    assert "WARNING: teacher, student: a save is 987.8 GB, and slurm.signal_seconds 300 leaves it 4 min 30 s" in text
    assert "the disk must take 3.66 GB/s; give what it takes as slurm.write_gb_per_second, or save once" in text
    beside = shown(plan_of(slurm={"partition": "h100"}, layout=BESIDE), width=400)
    assert "give what it takes as slurm.write_gb_per_second" in beside and "save once" not in beside
    slow = {"partition": "h100", "write_gb_per_second": 2.0}
    text = shown(plan_of(slurm=slow), width=400)
    assert "but at 2 GB/s (given) it takes 8 min 14 s" in text and "set slurm.signal_seconds to 549" in text
    found = plan_of(slurm={**slow, "signal_seconds": 549})
    assert [save.warning for save in found.saves] == [None, None] and "signal_seconds" not in shown(found)
    assert json.loads(json.dumps(found.to_json()))["saves"][0]["seconds"] == pytest.approx(size / 2e9)

    # What another training of the run took: 20 GB in 10 s.
    folder = {stage.name: stage.output for stage in plan(recipe_of())}["teacher"]
    (folder / "megatron/iter_0000004").mkdir(parents=True)
    with (folder / "megatron/iter_0000004/__0_0.distcp").open("wb") as file:
        file.truncate(20 * 10**9)
    rows = [{"iteration": 2, SAVE_TIME: 3.0}, {"iteration": 3}, {"iteration": 4, SAVE_TIME: 10.0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    measured = "but at 2 GB/s (measured by teacher) it takes 8 min 14 s"
    # Killed in its first save; before and after the second one was whole; and in a line, with a save that took no time.
    (folder / "metrics.jsonl").write_text(lines)
    assert "the disk must take" in shown(plan_of(slurm={"partition": "h100"}), width=400)
    (folder / "megatron" / TRACKER).write_text("")
    assert "the disk must take" in shown(plan_of(slurm={"partition": "h100"}), width=400)
    (folder / "megatron" / TRACKER).write_text("4")
    (folder / "megatron/iter_0000006").mkdir()
    assert measured in shown(plan_of(slurm={"partition": "h100"}), width=400)
    (folder / "metrics.jsonl").write_text(lines + f'{{"iteration": 5, "{SAVE_TIME}": 0.0}}\n{{"{SAVE_TIME}": 1')
    text = shown(plan_of(slurm={"partition": "h100"}), width=400)
    assert measured in text
    assert "at 4 GB/s" not in text and plan_of(slurm={**slow, "write_gb_per_second": 4.0}).saves[0].warning is None


def test_submit_says_it(plan_of: Callable[..., Resources], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "check_recipe", lambda *given: None)
    said: list[str] = []
    submit.check(recipe_of(slurm={"write_gb_per_second": 2.0}), said.append)
    (line,) = said
    assert line.startswith("warning: teacher, student: a save is 987.8 GB, and slurm.signal_seconds 300 leaves")
    submit.check(recipe_of(slurm={"write_gb_per_second": 4.0}), said.append)
    assert len(said) == 1


def test_kept_checkpoints_are_exported(plan_of: Callable[..., Resources]) -> None:
    evaluation = {"prompts": "held.jsonl", "checkpoints": True}
    sizes = {item.stage: item.bytes for item in plan_of(evaluation=evaluation).disk.items}
    assert sizes["export"] == 3 * 2 * PARAMETERS  # two of the teacher's and the student
    selected = plan_of(evaluation=evaluation, selection={"prompts": "validation.jsonl"})
    sizes = {item.stage: item.bytes for item in selected.disk.items}
    assert sizes["candidates"] == 2 * 2 * PARAMETERS
    assert sizes["export"] == 4 * 2 * PARAMETERS  # besides the chosen one
    assert "selection" not in sizes  # hard links


def test_what_is_done_takes_no_more_space(plan_of: Callable[..., Resources]) -> None:
    before = plan_of().disk.needed
    finish(plan(recipe_of())[0])
    found = plan_of()
    assert before - found.disk.needed == 2 * PARAMETERS
    assert [row.name for row in found.stages if row.is_done] == ["base"]
    # What is made anew needs the space that it took.
    Path("model/config.json").write_text(json.dumps({**LLAMA_70B, "rope_theta": 1.0}))
    found = plan_of()
    assert found.disk.needed == before and "base: again, because input hf changed" in shown(found)


def rollouts(path: Path, count: int = 2) -> None:
    row = {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4, 5, 6, 7, 8], "group_id": 1, "reward": 1.0}
    write_rollouts(path, [row] * count)


def test_imported_rollouts_are_counted(plan_of: Callable[..., Resources]) -> None:
    rollouts(Path("dump.parquet"))
    sections = {"rollouts": {"file": "dump.parquet"}}
    found = plan_of(**sections)
    assert found.data and not found.data.is_upper_bound
    assert (found.data.num_rollouts, found.data.prompt_tokens, found.data.response_tokens) == (2, 4, 12)
    assert (found.data.longest, found.data.mean_tokens) == (8, 8.0)
    # A quarter of the tokens that run through the model are the prompts', which nothing is kept of.
    assert found.cache[1].written_per_second == pytest.approx(0.75 * plan_of().cache[1].written_per_second)
    Path("dump.parquet").unlink()
    found = plan_of(**sections)
    assert found.data is None and found.cache[0].total_bytes is None
    assert any("are not there yet" in note for note in found.notes)
    imported = Path("runs/mine/round-01/rollouts")
    rollouts(imported / "rollouts.parquet")
    write_manifest(imported, "import-rollouts", {}, {})
    assert plan_of(**sections).data.response_tokens == 12  # type: ignore[union-attr]


def test_packs_of_rollouts_that_are_there(plan_of: Callable[..., Resources]) -> None:
    rollouts(Path("dump.parquet"), 1000)
    layout = {"data_parallel": 4, "precision": "bf16", "micro_batch_tokens": 100}
    sections = {"rollouts": {"file": "dump.parquet"}, "layout": layout}
    found = plan_of(**sections)
    # A model reads 7 of 8 tokens: 14 rollouts in a pack, 64 in a step of a rank; 250 and 250 in precompute.
    assert {name: row.packs for name, row in found.packs.items()} == {
        **{"base-log-probs": 18, "teacher": 5, "cache": 18, "student": 5}
    }
    assert found.packs["teacher"].filled == pytest.approx(7 * 256 / (4 * 5 * 100))
    assert ["teacher", "100", "5", "89.6%", "0.0%", "1.000", "0"] in [
        line.split() for line in shown(found).splitlines()
    ]
    assert json.loads(json.dumps(found.to_json()))["packs"]["cache"]["filled"] == pytest.approx(7000 / (4 * 18 * 100))
    # By the same packs the pipeline waits.
    stages: Any = {"stages": {"teacher": {"layout": {"pipeline_parallel": 4, "data_parallel": 1}}}}
    waits = {row.stage: row.seconds for row in plan_of(**sections, **stages).times}
    assert waits["teacher"] == pytest.approx((1 + 3 / 19) * {row.stage: row.seconds for row in found.times}["teacher"])
    # Virtual stages want groups of four; the warm-up reads other rollouts.
    stages["stages"]["teacher"]["megatron"] = {"num-virtual-stages-per-pipeline-rank": 2}
    virtual = plan_of(**sections, **stages, warm_up={"rollouts": "demonstrations.parquet"})
    assert virtual.packs["teacher"].packs == 20 and virtual.packs.keys() == found.packs.keys()
    # Nothing is said of what is padded, or not sampled yet.
    assert plan_of(rollouts=sections["rollouts"]).packs == {} == plan_of(layout=layout).packs
    over = plan_of(**{**sections, "layout": {**layout, "micro_batch_tokens": 6}})
    assert over.packs["student"].over_budget == 1000
    (note,) = (note for note in over.notes if "longer" in note)
    assert note.startswith("base-log-probs, teacher, cache, student: 1,000 rollouts of 1,000 are longer than")
    with pytest.raises(
        LayoutError, match=r"^base-log-probs: micro_batch_tokens 1: the prompt of row 0 of dump.parquet"
    ):
        plan_of(**{**sections, "layout": {**layout, "micro_batch_tokens": 1}})


def test_micro_batches_that_are_left_open_on_gpus(plan_of: Callable[..., Resources]) -> None:
    """Are packs, of a budget by the memory of the GPUs; and fp32 is not for them."""
    layout = {"tensor_parallel": 8, "sequence_parallel": True, "data_parallel": 8}
    found = plan_of(layout={**layout, "precision": "bf16"}, gpus=parse_gpus("b200", 64))
    assert any(note.startswith("teacher, student: no size of micro-batches is given; by the") for note in found.notes)
    assert all(row.activations for row in found.memory) and not any("fp32" in note for note in found.notes)
    jobs = plan_of(layout=layout, slurm={"gpus_per_node": 8})
    assert [row.activations for row in jobs.memory] == [None] * 4
    (note,) = (note for note in jobs.notes if "left" not in note and "size of micro-batches" in note)
    assert note.startswith("base-log-probs, teacher, cache, student: no size of micro-batches is given; on a GPU")
    assert any(note.startswith("base-log-probs, teacher, cache, student: fp32 on GPUs") for note in jobs.notes)
    # On CPUs they have 32 rollouts, and attention keeps no scores.
    here = plan_of(layout=layout)
    same = plan_of(layout={**layout, "micro_batch_size": 32})
    assert here.memory == same.memory and not any("fp32" in note for note in here.notes)
    on_gpus = plan_of(layout={**layout, "micro_batch_size": 32}, slurm={"gpus_per_node": 8})
    more = [(a.activations or 0) - (b.activations or 0) for a, b in zip(on_gpus.memory, here.memory, strict=True)]
    assert more == [4 * 8 * n * 32 * 2056**2 for n in (1, 80, 1, 80)]


def test_rollouts_that_can_not_be_counted(plan_of: Callable[..., Resources]) -> None:
    Path("dump.jsonl").write_text("{}")
    found = plan_of(rollouts={"file": "dump.jsonl", "format": "verl"})
    assert any("hold no columns of token ids" in note for note in found.notes)
    assert "unknown" in shown(found) and "at least" in shown(found)
    Path("dump.parquet").write_text("{}")
    with pytest.raises(RolloutError, match=r"dump\.parquet: isn't a readable Parquet file"):
        plan_of(rollouts={"file": "dump.parquet"})


def test_what_is_to_be_prepared_is_left_open(plan_of: Callable[..., Resources]) -> None:
    found = plan_of(
        prepare="python prepare.py {output}",
        model="prepare/model",
        rollouts={"prompts": "prepare/prompts.jsonl", "verifier": "math-verify"},
    )
    assert found.model is None and found.memory == [] and found.data is None
    assert [note.split(":")[0] for note in found.notes] == [
        "the model runs/mine/prepare/model is not prepared yet",
        "the prompts runs/mine/prepare/prompts.jsonl are not there yet, and rollouts.num_prompts is not given",
    ]
    assert "still to be written: unknown" in shown(found)


def test_errors(plan_of: Callable[..., Resources]) -> None:
    with pytest.raises(RecipeError, match="model modle: has no config.json"):
        plan_of(model="modle")
    with pytest.raises(LayoutError, match="teacher: tensor parallel size 3 does not divide"):
        plan_of(stages={"teacher": {"layout": {"tensor_parallel": 3}}})
    with pytest.raises(RecipeError, match="--teraflops-per-device 0"):
        plan_of(teraflops=0.0)
    Path("prompts.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match="prompts.jsonl:1: has no .prompt"):
        plan_of()


def test_flags_that_are_not_counted_are_named(plan_of: Callable[..., Resources]) -> None:
    found = plan_of(megatron={"use-precision-aware-optimizer": True})
    assert any(note.startswith("--use-precision-aware-optimizer of Megatron's") for note in found.notes)


def test_time_at_a_given_speed(plan_of: Callable[..., Resources]) -> None:
    times = {row.stage: row for row in plan_of().times}
    steps = 8 * 16_000 // 256  # batches of 256, of which each copy makes 4 micro-batches of 32
    attention = 2 * 80 * 8192 * 2048
    flop = 3 * (2 * PARAMETERS + attention) * steps * 256 * 2048
    assert times["teacher"].flop == pytest.approx(flop)
    assert times["teacher"].seconds == pytest.approx(flop * (1 + 3 / 4) / (64 * 400e12))
    forward = 2 * (2 * PARAMETERS + attention) * 16_000 * 2048
    assert times["cache"].seconds == pytest.approx(forward * (1 + 3 / 250) / (64 * 400e12))
    assert times["rollouts"].seconds is None
    full = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    again = {row.stage: row for row in plan_of(megatron=full).times}
    assert again["teacher"].flop == pytest.approx(4 / 3 * flop)


def test_virtual_pipeline_stages(plan_of: Callable[..., Resources]) -> None:
    """Two chunks of 10 layers on each of four stages, and 16 micro-batches: the first stage keeps 4 + 2 x 3 + 1."""
    micro = {"stages": {"teacher": {"layout": {"micro_batch_size": 8}}}}
    flags = {"megatron": {"num-virtual-stages-per-pipeline-rank": 2}}
    plain, virtual = plan_of(**micro), plan_of(**micro, **flags)
    assert memory(virtual, "teacher")["activations"] * 4 * 20 == memory(plain, "teacher")["activations"] * 11 * 10
    times = [{row.stage: row.seconds for row in found.times} for found in (plain, virtual)]
    waiting = [seconds["teacher"] for seconds in times]
    assert waiting[1] == pytest.approx(waiting[0] * (1 + 3 / 32) / (1 + 3 / 16))  # type: ignore[operator]
    assert memory(virtual, "cache") == memory(plain, "cache") and times[0]["cache"] == times[1]["cache"]
    group = {"microbatch-group-size-per-virtual-pipeline-stage": 6}
    with pytest.raises(LayoutError, match=r"^teacher: virtual pipeline stages: 4 micro-batches .* in groups of 6"):
        plan_of(megatron={**flags["megatron"], **group})
    with pytest.raises(LayoutError, match=r"^teacher: --num-layers-per-virtual-pipeline-stage 3: the model's 80"):
        plan_of(megatron={"num-layers-per-virtual-pipeline-stage": 3})


def test_time_at_a_measured_speed(plan_of: Callable[..., Resources]) -> None:
    folder = Path("runs/mine/round-01/teacher")
    stages = {stage.name: stage for stage in plan(recipe_of())}
    rollouts(stages["rollouts"].output / "rollouts.parquet", 512)
    for name in ("base", "rollouts", "base-log-probs", "rewards"):
        finish(stages[name])
    folder.mkdir(parents=True)
    rows = [{"iteration": i, "iteration-time": seconds, "world-size": 64} for i, seconds in ((2, 40.0), (3, 10.0))]
    lines = "".join(json.dumps(row) + "\n" for row in [{"iteration": 1}, *rows, {**rows[1], "iteration": 4}])
    (folder / "metrics.jsonl").write_text(lines)
    finish(stages["teacher"], {"seconds": 123.0})
    found = plan_of(teraflops=None)
    times = {row.stage: row for row in found.times}
    assert times["teacher"].is_done and times["teacher"].seconds == 123.0
    # The student has as many steps of the same kind as the teacher, whose median step took 10 s.
    assert times["student"].seconds == pytest.approx(10.0 * 8 * 512 // 256)
    assert found.speed_source.startswith("measured by teacher") and "measured by teacher" in shown(found)
    assert plan_of(teraflops=300.0).teraflops_per_device == 300.0
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n')
    assert plan_of(teraflops=None).teraflops_per_device == 400.0


def test_gpus_in_the_table_and_in_json(plan_of: Callable[..., Resources]) -> None:
    padded = {"layout": {**recipe_of().layout.model_dump(exclude_unset=True), "micro_batch_size": 32}}
    found = plan_of(gpus=parse_gpus("h100", 64), **padded)
    text = shown(found)
    assert "64 x h100: 71.64 of 79.60 GiB" in text and "micro_batch_size: 2" in text and "layouts that fit" in text
    figures = json.loads(json.dumps(found.to_json()))["gpus"]
    assert [row["fits"] for row in figures["stages"]] == [True, False, True, False]
    assert figures["enough"] == 64 and figures["proposals"][0]["layout"]["tensor_parallel"] == 8
    found = plan_of(gpus=parse_gpus("24", 8))
    assert "No layout of 8 x 24 GiB fits every stage" in shown(found) and "are enough" in shown(found)
    given = plan_of(gpus=parse_gpus("h100", 64), rollouts={"file": "later.parquet"}, sequence_length=2054)
    same = plan_of(gpus=parse_gpus("h100", 64))
    assert given.gpus and same.gpus
    assert [p.layout for p in given.gpus.proposals] == [p.layout for p in same.gpus.proposals]
    with pytest.raises(RecipeError, match="--sequence-length 0: give 1 or more"):
        plan_of(sequence_length=0)
    unknown = plan_of(gpus=parse_gpus("h100", 64), rollouts={"file": "later.parquet"})
    assert unknown.gpus is None and any("without the length of the rollouts" in note for note in unknown.notes)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples/quickstart", "examples/quickstart")
    model = Path("run/prepare/model")
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({**LLAMA_70B, "hidden_size": 64, "intermediate_size": 128}))
    argv = ["examples/quickstart/recipe.yaml", "--output", "run", "--set", "cache.k=4", "--data-parallel", "2"]
    cli.main(["plan", *argv, "--json", "plan.json", "--teraflops-per-device", "1.5"])
    out = capsys.readouterr().out
    assert "controls/sapo_kl" in out and "1,024 rollouts" in out and "upper" in out and "1.5 teraflop/s" in out
    figures = json.loads(Path("plan.json").read_text())
    assert figures["cache"][1]["bytes_per_token"] == 2 * 4 + 4 * 4 + 1 + 8
    assert next(row["num_processes"] for row in figures["stages"] if row["name"] == "teacher") == 2
    assert figures["disk"]["needed"] > 0 and figures["memory"][0]["total"] > 0 and figures["gpus"] is None
    cli.main(["plan", *argv, "--gpu", "0.25"])
    assert "2 x 0.25 GiB" in capsys.readouterr().out
    for flags, message in ((["--gpus", "4"], "give --gpu"), (["--gpu", "h900"], "--gpu h900: give h100")):
        with pytest.raises(SystemExit):
            cli.main(["plan", *argv, *flags])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *argv, "--json", "nowhere/plan.json"])
    assert caught.value.code == 2 and "nowhere/plan.json: can't be written" in capsys.readouterr().err
