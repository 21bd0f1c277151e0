"""What fits GPUs of a kind, what would, and the layouts that are proposed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.mapping.families import FAMILIES
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.errors import RecipeError
from megatron_erpd.plan.gpu_fit import Gpus, Proposal, gpu_fit, parse_gpus, propose
from megatron_erpd.plan.memory import stage_memory
from megatron_erpd.recipe.requests import TrainTeacher
from megatron_erpd.recipe.stages import Stage, flags_of
from megatron_erpd.settings import Layout, ReplaySettings

EIGHT_B = ModelShape(
    family=FAMILIES["LlamaForCausalLM"],
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    tied_embeddings=False,
)
MIXTURE = replace(
    EIGHT_B,
    family=FAMILIES["MixtralForCausalLM"],
    num_experts=8,
    experts_per_token=2,
    expert_ffn_hidden_size=14336,
)
LONGEST = 4096


def stage(megatron: dict[str, Any] | None = None, batch: int = 256, **sizes: Any) -> Stage:
    layout = Layout(precision="bf16", micro_batch_size=1).changed(sizes)
    flags = flags_of({"use-distributed-optimizer": True} if megatron is None else megatron)
    return Stage(
        "teacher",
        TrainTeacher(
            base=Path("base"),
            rollouts=Path("rollouts"),
            settings=ReplaySettings(global_batch_size=batch, epochs=1),
            output=Path("teacher"),
            layout=layout,
            megatron=flags,
        ),
    )


def tried(proposal: Proposal, batch: int = 256) -> Stage:
    return stage(proposal.megatron, batch, **proposal.layout)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "gib"), [("h100", 79.6), ("H200", 140.4), ("48", 48.0)])
def test_kinds_of_gpus(name: str, gib: float) -> None:
    gpus = parse_gpus(name, 8)
    assert gpus.memory == int(gib * 2**30) and gpus.usable == int(0.9 * gpus.memory) and gpus.count == 8


@pytest.mark.parametrize("name", ["h1000", "nan", "-3", "0", "inf"])
def test_unknown_gpus(name: str) -> None:
    with pytest.raises(RecipeError, match=f"--gpu {name}: give h100, h200, a100-80, b200, or the memory"):
        parse_gpus(name, 8)
    with pytest.raises(RecipeError, match="--gpus 0: give 1 or more"):
        parse_gpus("h100", 0)


@pytest.mark.parametrize("shape", [EIGHT_B, MIXTURE])
@pytest.mark.parametrize("count", [8, 16, 24])
def test_every_proposal_fits_by_the_same_arithmetic(shape: ModelShape, count: int) -> None:
    gpus = parse_gpus("h200", count)
    found = propose([stage(batch=192)], shape, LONGEST, gpus)
    assert len(found) == 5
    for proposal in found:
        again = tried(proposal, batch=192)
        assert again.num_processes == count
        assert stage_memory(again, shape, LONGEST).total == proposal.total <= gpus.usable
        assert 192 % again.layout.data_parallel == 0
        assert again.layout.pack_tokens is not None and again.layout.pack_tokens >= LONGEST
        assert again.layout.tensor_parallel <= 8
        assert again.layout.sequence_parallel == (again.layout.tensor_parallel > 1)


def test_the_least_work_comes_first_then_the_most_data_parallelism() -> None:
    found = propose([stage()], EIGHT_B, LONGEST, parse_gpus("h100", 8))
    sizes = [(p.work, -p.layout["data_parallel"], p.layout["tensor_parallel"]) for p in found]
    assert sizes == sorted(sizes) and sizes[0][0] == 1.0
    # A GPU holds 6 of 18 bytes per parameter of 8.03e9 alone, and its eighth of the other 12: 56 GiB.
    wide = propose([stage()], EIGHT_B, LONGEST, parse_gpus("b200", 8))[0]
    assert (wide.layout["tensor_parallel"], wide.layout["pipeline_parallel"], wide.layout["data_parallel"]) == (1, 1, 8)
    budget = wide.layout["micro_batch_tokens"]
    larger = stage(**{**wide.layout, "micro_batch_tokens": 2 * budget})
    assert budget == 16_384 and stage_memory(larger, EIGHT_B, LONGEST).total > parse_gpus("b200", 8).usable


def test_recomputation_and_the_pipeline_are_work() -> None:
    # What 24 GiB and two GPUs leave: nothing. With 16 of them and a batch of 16, pipelines wait.
    assert propose([stage()], EIGHT_B, LONGEST, parse_gpus("24", 2)) == []
    for mean in (None, 8192.0):
        for proposal in propose([stage(batch=16)], EIGHT_B, 32768, parse_gpus("32", 16), mean):
            layout = proposal.layout
            pack = layout["micro_batch_tokens"] * layout["context_parallel"]
            # A pack for each rollout at the most; by the mean, a quarter of these or less.
            packs = math.ceil(min(16, 16 * (mean or 32768) / pack) / layout["data_parallel"])
            again = 4 / 3 if "recompute-granularity" in proposal.megatron else 1
            assert proposal.work == pytest.approx(again * (1 + (layout["pipeline_parallel"] - 1) / packs))


def test_context_parallelism_waits_for_long_sequences() -> None:
    def largest(longest: int) -> int:
        found = propose([stage()], EIGHT_B, longest, parse_gpus("h100", 64), most=1000)
        return max(proposal.layout["context_parallel"] for proposal in found)

    assert (largest(4095), largest(4096), largest(16384)) == (1, 2, 8)


def test_remedies_do_what_they_say() -> None:
    gpus = parse_gpus("h100", 8)
    crowded = stage({}, tensor_parallel=2, data_parallel=4, micro_batch_size=16)
    row = gpu_fit([crowded], EIGHT_B, 16384, gpus).stages[0]
    assert not row.fits and row.enough_gpus
    # No change alone is enough; these are, one after another.
    together = "use-distributed-optimizer: true, sequence_parallel: true, "
    assert row.remedies == [together + "micro_batch_size: 1"]
    good = stage(tensor_parallel=2, data_parallel=4, sequence_parallel=True, micro_batch_size=1)
    assert stage_memory(good, EIGHT_B, 16384).total <= gpus.usable
    close = stage(tensor_parallel=2, data_parallel=4, sequence_parallel=True, micro_batch_size=16)
    row = gpu_fit([close], EIGHT_B, LONGEST, gpus).stages[0]
    sizes = [n for n in range(1, 16) if 256 % (4 * n) == 0]
    fitting = [
        n
        for n in sizes
        if stage_memory(
            close.changed(layout=close.layout.model_copy(update={"micro_batch_size": n})), EIGHT_B, LONGEST
        ).total
        <= gpus.usable
    ]
    assert row.remedies[0] == f"micro_batch_size: {max(fitting)}"
    assert "recompute-granularity: full, recompute-method: uniform, recompute-num-layers: 1" in row.remedies
    assert row.remedies[1] == f"micro_batch_tokens: {2 ** int(math.log2(max(fitting) * LONGEST))}"
    packed = close.changed(layout=close.layout.changed({"micro_batch_tokens": 16 * LONGEST}))
    assert gpu_fit([packed], EIGHT_B, LONGEST, gpus).stages[0].remedies == row.remedies[1:]


def test_virtual_pipeline_stages_are_not_proposed_and_keep_their_micro_batches() -> None:
    flags = {"num-virtual-stages-per-pipeline-rank": 2, "microbatch-group-size-per-virtual-pipeline-stage": 6}
    # 6 micro-batches in one group. Of 12, 24 or 48 groups can be made, of smaller micro-batches there are others.
    virtual = stage(flags, batch=48, pipeline_parallel=4, data_parallel=2, micro_batch_size=4)
    fit = gpu_fit([virtual], EIGHT_B, 16384, parse_gpus("h100", 8))
    assert not fit.stages[0].fits and fit.proposals
    plain = stage({}, batch=48, pipeline_parallel=4, data_parallel=2, micro_batch_size=4)
    assert propose([plain], EIGHT_B, 16384, parse_gpus("h100", 8)) == fit.proposals


def test_what_no_change_helps() -> None:
    fit = gpu_fit([stage()], EIGHT_B, LONGEST, Gpus("tiny", 2**30, 1))
    assert not fit.stages[0].fits and fit.stages[0].remedies == [] and fit.proposals == []
    assert fit.enough is None or propose([stage()], EIGHT_B, LONGEST, Gpus("tiny", 2**30, fit.enough))


def test_how_many_gpus_are_enough() -> None:
    fit = gpu_fit([stage()], EIGHT_B, LONGEST, parse_gpus("24", 2))
    assert fit.enough is not None and fit.enough > 2
    assert propose([stage()], EIGHT_B, LONGEST, parse_gpus("24", fit.enough))
    assert not propose([stage()], EIGHT_B, LONGEST, parse_gpus("24", fit.enough // 2))


def test_a_layout_of_more_gpus_than_there_are() -> None:
    row = gpu_fit([stage(data_parallel=16)], EIGHT_B, LONGEST, parse_gpus("b200", 8)).stages[0]
    assert row.fits and not row.enough_gpus and row.num_processes == 16


def test_a_step_has_whole_micro_batches() -> None:
    found = propose([stage(batch=12)], EIGHT_B, LONGEST, parse_gpus("b200", 8), most=1000)
    assert {proposal.layout["data_parallel"] for proposal in found} == {1, 2, 4}
    # None larger than what a rank has in a step.
    held = (p.layout["micro_batch_tokens"] * p.layout["context_parallel"] * p.layout["data_parallel"] for p in found)
    assert max(held) <= 2 * 12 * LONGEST
