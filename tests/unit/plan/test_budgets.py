"""The token budget that a stage on GPUs takes by their memory, and rollouts that a budget can't hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_erpd.checkpoint.mapping.parallel_layout import Schedule
from megatron_erpd.errors import LayoutError
from megatron_erpd.plan.budgets import (
    StageRollouts,
    budgets,
    check_prompts,
    chosen_budget,
    over_budget,
    precision_warning,
    sized,
    usable_bytes,
    with_budget,
)
from megatron_erpd.plan.memory import micro_batches, stage_memory
from megatron_erpd.recipe.requests import Precompute
from megatron_erpd.recipe.stages import Stage
from tests.unit.plan.test_gpu_fit import EIGHT_B, stage

GIB = 2**30


def open_stage(**sizes: Any) -> Stage:
    return stage(**{**sizes, "micro_batch_size": None})


def precompute() -> Stage:
    request = Precompute(base=Path("base"), rollouts=Path("rollouts"), output=Path("cache"))
    return Stage("cache", request.model_copy(update={"layout": stage(tensor_parallel=8).layout}))


def rollouts(*sizes: tuple[int, int]) -> StageRollouts:
    prompts, lengths = np.array(sizes).T
    return StageRollouts(prompts, lengths, lambda row: f"rollout {'abc'[row]}")


@pytest.mark.parametrize(
    ("sizes", "longest", "mean", "expected"),
    [
        ({}, 3000, 3000.0, [3072, 4096, 8192, 16384, 32768, 65536]),
        ({"context_parallel": 4}, 3000, 3000.0, [1024, 2048, 4096, 8192, 16384, 32768, 65536]),
        # 64 rollouts of 300 tokens on each of 4 ranks: more than 19,200 tokens a rank never has.
        ({"data_parallel": 4}, 4096, 300.0, [4096, 8192, 16384, 32768]),
        ({}, 100_000, 1.0, [100_352]),
    ],
)
def test_budgets_worth_a_try(sizes: dict[str, int], longest: int, mean: float, expected: list[int]) -> None:
    assert list(budgets(stage(**sizes), longest, mean)) == expected


@pytest.mark.parametrize("given", [stage(tensor_parallel=8, sequence_parallel=True), precompute()])
@pytest.mark.parametrize("gib", [12, 80, 141])
def test_the_largest_budget_that_fits_the_memory(given: Stage, gib: int) -> None:
    longest, memory = 4096, gib * GIB
    budget = chosen_budget(given, EIGHT_B, longest, 1000.0, memory)
    fitting = [
        n
        for n in budgets(given, longest, 1000.0)
        if stage_memory(with_budget(given, n), EIGHT_B, longest).total <= usable_bytes(memory)
    ]
    assert budget == max(fitting, default=None)
    assert (budget is None) == (given.command != "precompute" and gib == 12)


def test_a_pipeline_takes_the_budget_with_which_it_waits_least() -> None:
    given = stage(tensor_parallel=8, pipeline_parallel=4, sequence_parallel=True)
    assert chosen_budget(given, EIGHT_B, 4096, 1000.0, 141 * GIB) == 4096
    # So few rollouts that a pack of each is the most.
    few = stage(batch=2, tensor_parallel=8, pipeline_parallel=4, sequence_parallel=True)
    assert chosen_budget(few, EIGHT_B, 4096, 1000.0, 141 * GIB) == 4096


def test_packs_of_a_step() -> None:
    given = stage(micro_batch_tokens=4096, data_parallel=4)
    assert micro_batches(given, Schedule()) == 64
    assert micro_batches(given, Schedule(), 1000.0) == 16  # of 256,000 tokens
    assert micro_batches(given, Schedule(), 9000.0) == 64
    assert micro_batches(given, Schedule(2, 6), 1000.0) == 18
    assert micro_batches(stage(micro_batch_size=2, data_parallel=4), Schedule(2, 6), 1000.0) == 32


def test_packs_are_as_many_as_virtual_stages_want() -> None:
    """Where padded micro-batches are refused; the first stage keeps those of one group more."""
    flags = {"num-virtual-stages-per-pipeline-rank": 2, "microbatch-group-size-per-virtual-pipeline-stage": 6}
    sizes = {"batch": 4, "pipeline_parallel": 4}
    with pytest.raises(LayoutError, match="virtual pipeline stages: 4 micro-batches"):
        stage_memory(stage(flags, **sizes), EIGHT_B, 4096)
    many, few = (
        stage_memory(stage(flags, batch=n, pipeline_parallel=4, micro_batch_tokens=4096), EIGHT_B, 4096)
        for n in (64, 4)
    )
    assert few.activations and many.activations and few.activations == many.activations * 12 // 13


def test_rollouts_over_the_budget() -> None:
    """Have a pack of their own where the memory allows it, or isn't known."""
    given = stage(micro_batch_tokens=2048, context_parallel=2, data_parallel=8)
    assert over_budget(given.layout, rollouts((10, 100), (10, 4097))) is None  # a model reads one token less
    assert over_budget(stage().layout, rollouts((10, 9000))) is None  # padded
    two = rollouts((10, 100), (10, 5000), (10, 9000))
    line = over_budget(given.layout, two)
    assert line == (
        "2 rollouts of 3 are longer than micro_batch_tokens 2048 (x context_parallel 2 = 4,096) and have a pack of "
        "their own; the longest is rollout c with 9,000 tokens, for which 5120 would do"
    )
    needed = stage_memory(given, EIGHT_B, 9000).total
    memory = int(needed / 0.9) + 2
    for known in (None, memory):
        assert sized(given, EIGHT_B, two, known) == (given.layout, [line])
    with pytest.raises(LayoutError) as caught:
        sized(given, EIGHT_B, two, memory - 4)
    for words in ("micro_batch_tokens 2048", "the longest rollout c with 9,000 tokens", "a budget of 5120 would hold"):
        assert words in str(caught.value)


def test_a_prompt_over_the_budget() -> None:
    given = stage(micro_batch_tokens=100)
    layout = given.layout
    check_prompts(layout, rollouts((100, 101)))
    check_prompts(stage().layout, rollouts((101, 102)))
    message = "^micro_batch_tokens 100: the prompt of rollout b alone has 101 tokens; give at least 2048, which holds"
    for memory in (None, 80 * GIB):
        with pytest.raises(LayoutError, match=message):
            sized(given, EIGHT_B, rollouts((5, 2000), (101, 102)), memory)


def test_a_layout_without_a_size() -> None:
    """Stays as it is on CPUs; on GPUs it gets the budget that a plan chooses, said with its reason."""
    sizes = {"tensor_parallel": 8, "sequence_parallel": True}
    given, data = open_stage(**sizes), rollouts((100, 1000), (100, 3000))
    assert sized(given, EIGHT_B, data, None) == (given.layout, [])
    layout, lines = sized(given, EIGHT_B, data, 80 * GIB)
    assert layout == given.layout.changed({"micro_batch_tokens": 65536})
    assert layout.micro_batch_tokens == chosen_budget(given, EIGHT_B, 3000, 2000.0, 80 * GIB)
    needed = stage_memory(with_budget(given, 65536), EIGHT_B, 3000).total / GIB
    assert lines == [
        "micro_batch_tokens 65536: chosen, as no size of micro-batches is given; by plan it takes "
        f"{needed:.1f} GiB of 72.0 that can be used on this GPU"
    ]
    with pytest.raises(LayoutError, match=r"by plan none fits that holds rollout b with 3,000 tokens: .* 3072 takes"):
        sized(given, EIGHT_B, data, 8 * GIB)
    # What is given is taken, whatever a plan says; in fp32 with a warning.
    padded = stage(**sizes, micro_batch_size=2, precision="fp32")
    layout, lines = sized(padded, EIGHT_B, data, 8 * GIB)
    assert layout == padded.layout and [line[:33] for line in lines] == ["warning: teacher: fp32 on GPUs le"]


def test_fp32_on_gpus() -> None:
    def named(name: str, **sizes: Any) -> Stage:
        return Stage(name, stage(**sizes).request)

    assert precision_warning([named("teacher", precision="bf16")]) is None
    found = precision_warning([named("a", precision="fp32"), named("b"), named("c", precision="fp32")])
    assert found and found.startswith("a, c: fp32 on GPUs") and "set layout.precision: bf16" in found
