"""What is known to be wrong before anything runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from megatron_erpd.errors import RecipeError
from megatron_erpd.launch import flag_check, preflight_tasks
from megatron_erpd.launch.preflight import check_recipe, recipe_warnings
from megatron_erpd.launch.processes import Slots
from megatron_erpd.manifest import write_manifest
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.sampling import prompts, verifiers
from tests import forked

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SAMPLED = {"prompts": "prompts.jsonl", "max_new_tokens": 8}


TASK = """
def score(record, response):
    return float(record["answer"] in response)

def forgets_to_return(record, response):
    float(record["answer"] in response)

def not_finite(record, response):
    return float("nan")

def fails(record, response):
    return record["metadata"]["solution"] == response

def text(record, response):
    return "right"

def only_boxed(record, response):
    return float(response.split("boxed{")[1].startswith(record["answer"]))

def verdict_on_announced_only(record, response):
    return 1.0 if "The answer is " + record["answer"] in response else None

def some_prompts(record, response):
    return float(record["answer"]) if record["answer"] != "2" else None
"""


def write_model(folder: Path, **changed: Any) -> None:
    """A model's configuration, the header of its weights, and a tokenizer with a token for each letter."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    save_file({"model.norm.weight": np.zeros(16, np.float32)}, folder / "model.safetensors")
    words = {letter: i for i, letter in enumerate(["<unk>", "<eos>", *"0123456789+=?!abcdefghijk"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def recipe_of(**sections: Any) -> Recipe:
    recipe = {
        "name": "mine",
        "model": "model",
        "rollouts": {**SAMPLED, "verifier": "python:task.py:score"},
        "teacher": {},
        "student": {},
        "evaluation": {"prompts": "prompts.jsonl", "max_new_tokens": 8},
    }
    return Recipe(**{**recipe, **sections})


@pytest.fixture(scope="module")
def known_verifiers():
    """What loads a verifier in place of `Verifier`: a function of `TASK` once, which takes a process to start."""
    load, known = verifiers.Verifier, {}

    def loaded(spec: str) -> verifiers.Verifier:
        file, _, name = spec.removeprefix("python:").partition(":")
        if not Path(file).is_file() or Path(file).read_text() != TASK:
            return load(spec)
        if name not in known:
            known[name] = load(spec)
        return known[name]

    return loaded


@pytest.fixture
def problems(tmp_path, monkeypatch, known_verifiers):
    """Checks a recipe whose inputs are all good but for what a test changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verifiers, "Verifier", known_verifiers)
    write_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "task.py").write_text(TASK)

    def check(gpus: int = 0, jobs: bool = False, **sections: Any) -> str:
        recipe = recipe_of(**sections)
        slots = None if jobs else Slots(gpus=[str(i) for i in range(gpus)], cores=2)
        try:
            check_recipe(recipe, plan(recipe), slots)
        except RecipeError as error:
            return str(error)
        return ""

    return check


@pytest.fixture
def installed(monkeypatch):
    """Says which modules there are."""
    found = importlib.util.find_spec

    def say(**modules: bool) -> None:
        def find(name: str, *more: Any) -> Any:
            return (found("json") if modules[name] else None) if name in modules else found(name, *more)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return say


def test_a_good_recipe_passes(problems):
    assert problems() == ""


def test_everything_is_told_at_once(problems):
    text = problems(
        model="modle",
        rollouts={"prompts": "train.jsonl", "verifier": "python:tusk.py:score"},
        evaluation={"prompts": "prompts.jsonl", "verifier": "python:task.py:scroe"},
        layout={"micro_batch_size": 24, "tensor_parallel": 2},
        gpus=1,
    )
    assert text.startswith("mine: the run can't start:\n")
    for expected in (
        "base, rollouts, evaluation: hf modle: no such file or folder",
        "rollouts, rewards: prompts train.jsonl: no such file or folder",
        "rewards: verifier tusk.py: no such file or folder",
        "scroe",
        "teacher, student: global_batch_size 256 is not a multiple of micro_batch_size 24 x data_parallel 1 = 24",
        "student: its layout needs 2 GPUs, this machine has 1",
    ):
        assert expected in text, text


def test_a_sampler_that_needs_more_gpus_than_there_are(problems, installed):
    installed(vllm=True)
    sampled = {**SAMPLED, "verifier": "python:task.py:score", "engine": "vllm"}
    assert problems(gpus=4, rollouts={**sampled, "tensor_parallel": 4}) == ""
    text = problems(gpus=4, rollouts={**sampled, "tensor_parallel": 8})
    assert "rollouts: tensor_parallel needs 8 GPUs, this machine has 4" in text and text.count("\n") == 1


def test_a_layout_that_does_not_divide_the_model(problems):
    text = problems(layout={"tensor_parallel": 3})
    assert "  base-log-probs, teacher, cache, student: tensor parallel size 3" in text and text.count("size 3") == 1
    text = problems(stages={"teacher": {"layout": {"pipeline_parallel": 4}}})
    assert "teacher:" in text and "base-log-probs:" not in text


def test_virtual_pipeline_stages(problems, monkeypatch):
    monkeypatch.setattr(flag_check, "check_flags", lambda asked: {})  # which imports Megatron
    Path("model/config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 4}))
    given = {"layout": {"pipeline_parallel": 2}, "jobs": True}
    flags = {"num_virtual_stages_per_pipeline_rank": 2}
    assert problems(**given, megatron=flags) == ""
    text = problems(**given, megatron={"num_layers_per_virtual_pipeline_stage": 3})
    assert text.splitlines()[1].startswith("  teacher, student: --num-layers-per-virtual-pipeline-stage 3: ")
    text = problems(layout={**given["layout"], "micro_batch_size": 256}, jobs=True, megatron=flags)
    assert text.splitlines()[1].startswith("  teacher, student: virtual pipeline stages: 1 micro-batches of an")


def test_an_architecture_that_is_not_supported(problems):
    Path("model/config.json").write_text(json.dumps({**CONFIG, "architectures": ["BloomForCausalLM"]}))
    assert "BloomForCausalLM" in problems()


def test_a_folder_that_holds_no_model(problems):
    Path("model/config.json").unlink()
    assert "model model: has no config.json" in problems()


def test_prompts_that_can_not_be_read(problems):
    Path("prompts.jsonl").write_text('{"prompt": "1+1="}\n{"answer": "2"}\n')
    assert "prompts.jsonl:2: has no 'prompt'" in problems()


def test_what_prepare_writes_is_checked_when_it_is_there(problems):
    sections = {"prepare": "python task.py {output}", "model": "prepare/model"}
    assert problems(**sections) == ""
    prepared = Path("runs/mine/prepare")
    prepared.mkdir(parents=True)
    write_manifest(prepared, "prepare", {}, {})
    assert "base, rollouts, evaluation: hf runs/mine/prepare/model: no such file or folder" in problems(**sections)


def test_monitoring_that_is_not_installed(problems, installed):
    for there in (False, True):
        installed(wandb=there)
        text = problems(monitoring={"wandb_project": "erpd"})
        assert ("monitoring.wandb_project: wandb isn't installed; pip install wandb" in text) != there
    assert problems() == ""


def test_one_precision_for_a_training_and_the_log_probs_that_it_reads(problems):
    text = problems(stages={"teacher": {"layout": {"precision": "bf16"}}})
    assert "teacher: trains in bf16 on log-probs that base-log-probs computes in fp32" in text
    stages = ("base-log-probs", "teacher", "cache", "student")
    assert problems(stages={stage: {"layout": {"precision": "bf16"}} for stage in stages}) == ""
    assert "student: trains in fp32 on log-probs that cache computes in bf16" in problems(
        stages={"cache": {"layout": {"precision": "bf16"}}}
    )


def test_what_prepare_wrote_before_is_not_looked_at_before_it_runs_again(problems):
    prepared = Path("runs/mine/prepare")
    prepared.mkdir(parents=True)
    (prepared / "prompts.jsonl").write_text("no JSON")
    sections = {"prepare": "python task.py {output}", "rollouts": {**SAMPLED, "prompts": "prepare/prompts.jsonl"}}
    sections["rollouts"]["verifier"] = "python:task.py:score"
    assert problems(**sections) == ""
    write_manifest(prepared, "prepare", {}, {})
    assert "rollouts.prompts: runs/mine/prepare/prompts.jsonl:1" in problems(**sections)


def test_a_folder_that_can_not_be_written(problems, tmp_path):
    (tmp_path / "file").write_text("")
    text = problems(output="file/below")
    assert text.count("\n") == 1 and "output: file/below: can't be written (Not a directory" in text
    assert "monitoring.wandb_dir: file: can't be written" in problems(
        monitoring={"wandb_project": "p", "wandb_dir": "file"}
    )


def test_a_disk_that_is_too_small(problems, monkeypatch):
    free = 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    assert "output: runs/mine: the run's checkpoints and exports still take " in problems()
    free = 10**9
    assert problems() == ""
    free = 10**5  # what an interrupted training has saved counts
    assert "keep fewer checkpoints" in problems()
    Path("runs/mine/round-01/teacher").mkdir(parents=True)
    with Path("runs/mine/round-01/teacher/shard").open("wb") as file:
        file.truncate(10**8)
    assert problems() == ""
    damaged = Path("runs/mine/round-01/teacher/.damaged/iter_0000002")  # no part of what is to be written
    damaged.mkdir(parents=True)
    Path("runs/mine/round-01/teacher/shard").rename(damaged / "shard")
    assert "keep fewer checkpoints" in problems()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "model: model: has neither model.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x"), "model.safetensors: not a readable"),
        (lambda model: (model / "tokenizer.json").unlink(), "model: model: holds no tokenizer"),
        (lambda model: (model / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_a_model_that_is_not_whole(problems, spoil, expected):
    spoil(Path("model"))
    assert expected in problems()


def test_experts_that_the_layout_does_not_spread(problems):
    assert "student: expert parallel size 2" in problems(layout={"expert_parallel": 2, "data_parallel": 2})


def test_an_engine_that_is_not_installed(problems, installed):
    sections = {"rollouts": {**SAMPLED, "verifier": "python:task.py:score", "engine": "vllm"}}
    for there in (False, True):
        installed(vllm=there)
        assert ("rollouts: engine vllm: vLLM isn't installed" in problems(**sections)) != there
    installed(vllm=False)
    assert "vLLM isn't installed" in problems(jobs=True, **sections)
    assert problems(jobs=True, **sections, stages={"rollouts": {"slurm": {"python": "/opt/vllm/bin/python"}}}) == ""


def test_kernels_that_need_a_gpu(problems, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "student: kernels triton: needs a GPU" in problems(layout={"kernels": "triton"})
    assert problems(layout={"kernels": "triton"}, gpus=1) == problems(layout={"kernels": "triton"}, jobs=True) == ""


def test_an_interface_that_this_machine_has_not(problems, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    assert "GLOO_SOCKET_IFNAME is ib77" in problems(layout={"tensor_parallel": 2})
    assert problems() == problems(layout={"tensor_parallel": 2}, jobs=True) == ""


def lengths(rollouts: int, evaluation: int) -> dict[str, Any]:
    return {
        "rollouts": {**SAMPLED, "max_new_tokens": rollouts, "verifier": "python:task.py:score"},
        "evaluation": {"prompts": "prompts.jsonl", "max_new_tokens": evaluation},
    }


def test_lengths_beyond_the_positions(problems):
    Path("prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "10+10=", "answer": "20"}\n')
    assert problems(**lengths(58, 58)) == ""
    text = problems(**lengths(59, 60))
    assert "rollouts.max_new_tokens 59: prompts.jsonl:2 has 6 tokens, together 65" in text
    assert "the model has 64 positions; lower it to 58" in text
    assert "evaluation.max_new_tokens 60: " in text
    controls = {"grpo": {"kind": "on_policy", "max_new_tokens": 60}}
    assert "controls.grpo.max_new_tokens 60: " in problems(**lengths(8, 8), controls=controls)
    Path("prompts.jsonl").write_text(json.dumps({"prompt": 70 * "1", "answer": "2"}))
    assert "rollouts.prompts: prompts.jsonl:1 has 70 tokens, and the model has 64 positions" in problems()


def test_the_first_rollouts_of_a_file_are_read(problems):
    def imported(row: dict[str, Any], **changed: Any) -> str:
        rows = [{"prompt_token_ids": [5, 6], "response_token_ids": [7], "reward": 1.0, "group_id": 1}, row]
        Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return problems(rollouts={"file": "r.jsonl", **changed}, evaluation=None)

    good = {"prompt_token_ids": [5, 6], "response_token_ids": [8], "reward": 0.0, "group_id": 1}
    assert imported(good) == ""
    assert "rollouts.file: r.jsonl:2: has 65 tokens, and the model 64" in imported(
        {**good, "response_token_ids": 63 * [8]}
    )
    assert "rollouts.file: r.jsonl:2: response_token_ids" in imported({**good, "response_token_ids": "eight"})
    assert imported({**good, "response_token_ids": "eight"}, on_reject="skip") == ""
    assert "rollouts.file: " in imported(good, format="slime") and "rollouts.file: " in imported(
        good, fields={"reward": "scroe"}
    )
    Path("r.txt").write_text("{}")
    assert "rollouts.file: r.txt: must end in" in problems(rollouts={"file": "r.txt"}, evaluation=None)


def test_token_budgets_that_imported_rollouts_do_not_fit(problems):
    row = {"response_token_ids": [7] * 3, "reward": 1.0}
    table = pa.Table.from_pylist([{**row, "prompt_token_ids": [5] * n, "group_id": n} for n in (2, 9, 4)])
    pq.write_table(table, "r.parquet")
    given = {"rollouts": {"file": "r.parquet"}, "evaluation": None}
    stages = {"teacher": {"layout": {"micro_batch_tokens": 8}}, "student": {"layout": {"micro_batch_size": 32}}}
    text = problems(**given, layout={"micro_batch_tokens": 16}, stages=stages)
    assert text.splitlines()[1:] == [
        "  teacher: micro_batch_tokens 8: the prompt of row 1 of r.parquet alone has 9 tokens; give at least 1024, "
        "which holds every rollout"
    ]
    # A rollout over the budget is no problem.
    assert problems(**given, layout={"micro_batch_tokens": 9}) == ""
    recipe = recipe_of(**given, layout={"micro_batch_tokens": 9}, stages=stages | {"teacher": {}})
    (line,) = recipe_warnings(recipe, plan(recipe), Slots(gpus=[], cores=2))
    assert line.startswith("base-log-probs, teacher, cache: 1 rollout of 3 is longer than micro_batch_tokens 9 and has")
    assert "the longest is row 1 of r.parquet with 12 tokens, for which 1024 would do" in line


def test_fp32_on_gpus_is_warned_of(problems):
    for gpus, precision, expected in ((0, "fp32", 0), (1, "fp32", 1), (1, "bf16", 0)):
        recipe = recipe_of(layout={"precision": precision})
        found = recipe_warnings(recipe, plan(recipe), Slots(gpus=["0"] * gpus, cores=2))
        assert len(found) == expected and all("set layout.precision: bf16" in line for line in found)
    jobs = recipe_of(slurm={"gpus_per_node": 1})
    (line,) = recipe_warnings(jobs, plan(jobs), None)
    assert line.startswith("base-log-probs, teacher, cache, student: fp32 on GPUs")


def test_without_a_size_micro_batches_on_gpus_are_packs(problems):
    """Whose number the global batch needs no multiple of; on CPUs they are 32 rollouts."""
    given = {"layout": {"data_parallel": 16}}
    assert "global_batch_size 256 is not a multiple of micro_batch_size 32 x data_parallel 16" in problems(**given)
    assert problems(**given, gpus=16) == ""
    text = problems(layout={"data_parallel": 3}, gpus=3)
    assert "teacher, student: global_batch_size 256 is not a multiple of data_parallel 3; change one of them" in text


def test_only_the_prompts_that_are_used_count(problems):
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": n * "1", "answer": "2"}) + "\n" for n in (4, 5, 60)))
    used = {**lengths(50, 50)["rollouts"], "num_prompts": 1}
    evaluation = {"prompts": "prompts.jsonl", "max_new_tokens": 50, "num_prompts": 2}
    assert problems(rollouts=used, rounds=2, evaluation=evaluation) == ""
    assert ":3 has 60 tokens" in problems(rollouts=used, rounds=3, evaluation=evaluation)


def test_rollouts_must_fit_the_window_of_the_trainings(problems):
    write_model(
        Path("model"), architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16, head_dim=4
    )
    text = problems(**lengths(20, 20))
    assert "rollouts.max_new_tokens 20" in text and "16 positions within its sliding window" in text
    assert "evaluation" not in text


def test_a_long_file_is_encoded_in_part(problems, monkeypatch):
    monkeypatch.setattr(preflight_tasks, "_ENCODED_CHARACTERS", 100)
    encoded = []
    encode = prompts.encode_prompts
    monkeypatch.setattr(
        prompts, "encode_prompts", lambda t, r, *a, **k: encoded.append(len(r)) or encode(t, r, *a, **k)
    )
    lines = [json.dumps({"prompt": n * "1", "answer": "2"}) for n in (*range(1, 41), 50)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    assert ":41 has 50 tokens" in problems(**lengths(20, 20)) and set(encoded) == {2}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("score", None),
        ("only_boxed", None),
        ("verdict_on_announced_only", None),
        ("some_prompts", None),
        ("forgets_to_return", "gives no reward (None, or no finite number) for prompts.jsonl:1 ('1+1=')"),
        ("not_finite", "gives no reward"),
        ("fails", "fails for prompts.jsonl:1 ('1+1=') and the response '2': KeyError: 'solution'"),
        ("text", "returned 'right'; it must return a number or None"),
    ],
)
def test_a_verifier_is_tried(problems, function, expected):
    Path("prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    text = problems(rollouts={**SAMPLED, "verifier": f"python:task.py:{function}"}, evaluation=None)
    if expected is None:
        assert text == ""
    else:
        assert "rollouts.verifier: " in text and expected in text and text.count("\n") == 1


def test_a_verifier_says_itself_what_it_scores(problems):
    code = "def score(record, response):\n    return 1.0 if response == 'RESULT 2' else None\n"
    for trial, good in (("", False), ("VERIFIER_TRIAL = 'RESULT {answer}'\n", True), ("VERIFIER_TRIAL = 3\n", False)):
        Path("task.py").write_text(trial + code)
        assert (problems() == "") == good
    assert "VERIFIER_TRIAL is 3; give a response as text" in problems()


def test_the_verifiers_of_libraries_score_their_own_answers(problems):
    Path("prompts.jsonl").write_text('{"prompt": "?", "answer": "\\\\frac{1}{2}"}\n')
    write_model(Path("model"), max_position_embeddings=256)
    own = {"prompts": "reasoning-gym:chain_sum?size=3", "verifier": "reasoning-gym:chain_sum", "max_new_tokens": 8}
    evaluation = {"prompts": "prompts.jsonl", "verifier": "math-verify", "max_new_tokens": 8}
    assert problems(rollouts=own, evaluation=evaluation) == ""
    text = problems(rollouts={**own, "verifier": "reasoning-gym:chain_sums"}, evaluation=evaluation)
    assert "rollouts.verifier: reasoning-gym:chain_sums: there is no task" in text


def test_where_a_job_has_gpus_a_verifier_is_read_and_not_run(problems):
    Path("task.py").write_text(
        "raise RuntimeError('no GPU')\ntry:\n    import numpy as score\nexcept ImportError: pass\n"
    )
    assert "no GPU" in problems() and "no GPU" in problems(jobs=True)
    gpus = {"jobs": True, "slurm": {"gpus_per_node": 1}}
    assert problems(**gpus) == ""
    Path("task.py").write_text("def scroe(record, response): return 1.0")
    assert "rollouts.verifier: task.py: has no function 'score'" in problems(**gpus)
    Path("task.py").write_text("def score(record, response) return 1.0")
    assert "rollouts.verifier: task.py: can't be read as Python" in problems(**gpus)


def test_megatron_flags(problems):
    stages = {"student": {"megatron": {"recompute_granularty": "full"}}, "cache": {"megatron": {"log_intreval": None}}}
    text = problems(jobs=True, megatron={"log_intreval": 5, "lr": 1e-5}, stages=stages)
    assert text.splitlines()[1:] == [
        "  megatron: --log-intreval: Megatron has no such flag; did you mean --log-interval? "
        "(for base-log-probs, teacher, student)",
        "  megatron: --lr: follows from the checkpoint, the layout or the stage's settings and can't be given again; "
        "change it there (for cache)",
        "  stages.student.megatron: --recompute-granularty: Megatron has no such flag; did you mean "
        "--recompute-granularity? (for student)",
    ]


def test_megatron_flags_that_contradict_each_other(problems, monkeypatch):
    monkeypatch.setattr(flag_check, "subprocess", forked)
    stages = {
        "base-log-probs": {"megatron": {"seed": "x"}},
        "cache": {"megatron": {"adam_eps": 1e-7, "clip_grad": None}},
        # The parser takes it, and the model's configuration does not.
        "teacher": {"megatron": {"recompute_granularity": "selective", "recompute_num_layers": 1}},
        "student": {"megatron": {"overlap_param_gather": True}},
    }
    text = problems(stages=stages).splitlines()[1:]
    assert text[0].startswith("  stages.base-log-probs.megatron: --seed: invalid int value: 'x'")
    assert "recompute_num_layers must be None" in text[1] and "(for teacher)" in text[1]
    assert "Megatron refuses these settings: " in text[2] and "(for student)" in text[2] and len(text) == 3
