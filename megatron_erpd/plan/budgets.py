"""Token budgets of packed micro-batches: which are worth a try, which one a stage on GPUs takes where none is given,
and rollouts that a budget can't hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_erpd.checkpoint.mapping.parallel_layout import read_schedule
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.data.batch import packer
from megatron_erpd.errors import LayoutError
from megatron_erpd.plan.memory import global_batch_size, micro_batches, stage_memory
from megatron_erpd.recipe.requests import ModelRequest
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings import Layout
from megatron_erpd.units import counted

SPARE = 0.1
"""Part of a GPU's memory that stays free: CUDA's context, NCCL's buffers, fragments, what the formulas leave out."""
UNIT = 1024
"""Proposed budgets are multiples of it."""
_ROOM = "raise context_parallel or tensor_parallel, or set recompute-granularity: full under megatron"
LARGEST = 65_536
"""Tokens of a rank's forward pass beyond which a larger one gains nothing: its products are large enough for a GPU."""


def usable_bytes(memory: int) -> int:
    """Of a GPU's memory, what a process may plan to use."""
    return int(memory * (1 - SPARE))


def waiting(stage: Stage, shape: ModelShape, mean_tokens: float) -> float:
    """What the ends of the pipeline add to a training step, as a share of it: (PP - 1) / micro-batches."""
    schedule = read_schedule(stage.megatron, shape.num_layers, stage.layout.pipeline_parallel)
    count = micro_batches(stage, schedule, mean_tokens) * schedule.virtual_stages
    return (stage.layout.pipeline_parallel - 1) / count if global_batch_size(stage) else 0.0


def least_budget(layout: Layout, longest: int) -> int:
    """The least proposed budget of a rank under which no rollout is over budget."""
    return max(1, -(-longest // (layout.context_parallel * UNIT))) * UNIT


def budgets(stage: Stage, longest: int, mean_tokens: float) -> Iterator[int]:
    """Budgets of a rank that are worth a try, the smallest first: the least, and powers of two above it, up to one that
    holds all that a rank has in a step, or to `LARGEST`."""
    layout, batch = stage.layout, global_batch_size(stage)
    budget = least_budget(layout, longest)
    of_rank = math.inf
    if batch:
        of_rank = batch * mean_tokens / (layout.data_parallel * layout.context_parallel)
    while True:
        yield budget
        larger = 2 ** budget.bit_length()
        if budget >= of_rank or larger > LARGEST:
            return
        budget = larger


def chosen_budget(stage: Stage, shape: ModelShape, longest: int, mean_tokens: float | None, memory: int) -> int | None:
    """The budget of a stage on GPUs that is given none: of those that fit, the one with the least waiting in the
    pipeline, and of equals the largest. None where not even the least fits.

    Args:
        longest, mean_tokens: of the rollouts; without a mean all are taken to be the longest.
        memory: bytes of a GPU.
    """
    mean_tokens = mean_tokens or longest
    best: tuple[float, int] | None = None
    for budget in budgets(stage, longest, mean_tokens):
        tried = with_budget(stage, budget)
        if stage_memory(tried, shape, longest).total <= usable_bytes(memory):
            best = min(filter(None, (best, (waiting(tried, shape, mean_tokens), -budget))))
    return None if best is None else -best[1]


def with_budget(stage: Stage, budget: int) -> Stage:
    """The stage with a token budget in place of the size that it has."""
    return stage.changed(layout=stage.layout.changed({"micro_batch_tokens": budget}))


def packed(stage: Stage) -> Stage:
    """A stage that leaves the size of micro-batches open, as what it is on GPUs before a budget is chosen: packed."""
    return with_budget(stage, LARGEST) if has_no_size(stage.layout) else stage


def has_no_size(layout: Layout) -> bool:
    """Whether a layout leaves the size of micro-batches open."""
    return layout.micro_batch_size is None and layout.micro_batch_tokens is None


@dataclass(frozen=True)
class StageRollouts:
    """What a stage reads, as far as its budget goes.

    Attributes:
        prompts, lengths: int64 `[N]`, tokens of the prompt, and of prompt and response.
        name: what a rollout is called.
        what: they are: `rollout`, or `possible rollout` where responses are still to be drawn.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    name: Callable[[int], str]
    what: str = "rollout"

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def longest_one(self) -> str:
        return f"{self.name(int(np.argmax(self.lengths)))} with {self.longest:,} tokens"


def sized(stage: Stage, shape: ModelShape, rollouts: StageRollouts, memory: int | None) -> tuple[Layout, list[str]]:
    """A stage's layout with a size of micro-batches, and lines on what was chosen and what is longer than it.

    On GPUs a layout that gives none gets the token budget that its memory is planned to hold; on CPUs it stays as it is
    (`DEFAULT_MICRO_BATCH_SIZE` rollouts).

    Args:
        memory: bytes of a GPU; None on CPUs.

    Raises:
        LayoutError: a prompt is over the budget; a rollout is and has no room in the memory by plan; or no budget that
            holds the longest rollout has.
    """
    lines = []
    if memory is not None and has_no_size(stage.layout):
        longest = rollouts.longest
        budget = chosen_budget(stage, shape, longest, float(rollouts.lengths.mean()), memory)
        if budget is None:
            least = with_budget(stage, least_budget(stage.layout, longest))
            needed = stage_memory(least, shape, longest).total
            raise LayoutError(
                f"no size of micro-batches is given, and by plan none fits that holds {rollouts.longest_one}: "
                f"micro_batch_tokens {least.layout.micro_batch_tokens} takes {needed / 2**30:.1f} GiB of "
                f"{usable_bytes(memory) / 2**30:.1f} that can be used; {_ROOM}, or give micro_batch_tokens to try it "
                "all the same"
            )
        stage = with_budget(stage, budget)
        needed = stage_memory(stage, shape, longest).total
        lines.append(
            f"micro_batch_tokens {_budget(stage.layout)}: chosen, as no size of micro-batches is given; by plan it "
            f"takes {needed / 2**30:.1f} GiB of {usable_bytes(memory) / 2**30:.1f} that can be used on this GPU"
        )
    check_prompts(stage.layout, rollouts)
    if line := over_budget(stage.layout, rollouts):
        lines.append(line)
    if memory is not None:
        _check_room(stage, shape, rollouts, memory)
        lines += [f"warning: {warning}"] if (warning := precision_warning([stage])) else []
    return stage.layout, lines


def check_prompts(layout: Layout, rollouts: StageRollouts) -> None:
    """Raises `LayoutError` where a prompt alone is over the budget, so that no response to it would fit."""
    row = int(np.argmax(rollouts.prompts))
    tokens = int(rollouts.prompts[row])
    if layout.pack_tokens is not None and tokens > layout.pack_tokens:
        raise LayoutError(
            f"micro_batch_tokens {_budget(layout)}: the prompt of {rollouts.name(row)} alone has {tokens:,} tokens; "
            f"give at least {least_budget(layout, rollouts.longest)}, which holds every rollout"
        )


def over_budget(layout: Layout, rollouts: StageRollouts) -> str | None:
    """A line on rollouts that are longer than the budget, each of which has a pack of its own; None where none is."""
    if not (count := _num_over_budget(layout, rollouts)):
        return None
    is_one = count == 1
    return (
        f"{counted(count, rollouts.what)} of {len(rollouts.lengths):,} {'is' if is_one else 'are'} longer than "
        f"micro_batch_tokens {_budget(layout)} and {'has' if is_one else 'have'} a pack of "
        f"{'its' if is_one else 'their'} own; the longest is {rollouts.longest_one}, for which "
        f"{least_budget(layout, rollouts.longest)} would do"
    )


def _check_room(stage: Stage, shape: ModelShape, rollouts: StageRollouts, memory: int) -> None:
    """Raises `LayoutError` where the longest rollout is over the budget and its pack doesn't fit a GPU, by plan."""
    count, usable = _num_over_budget(stage.layout, rollouts), usable_bytes(memory)
    needed = stage_memory(stage, shape, rollouts.longest).total
    if count and needed > usable:
        raise LayoutError(
            f"micro_batch_tokens {_budget(stage.layout)}: {counted(count, rollouts.what)} of "
            f"{len(rollouts.lengths):,} {'has' if count == 1 else 'have'} more, the longest {rollouts.longest_one}; a "
            f"pack of its own takes {needed / 2**30:.1f} GiB by plan, of {usable / 2**30:.1f} that can be used; a "
            f"budget of {least_budget(stage.layout, rollouts.longest)} would hold it: {_ROOM}, until that fits, or "
            "leave such rollouts out"
        )


def _num_over_budget(layout: Layout, rollouts: StageRollouts) -> int:
    if layout.pack_tokens is None:
        return 0
    packing = packer(layout, rollouts.lengths, math.inf)
    return int((packing.tokens > packing.max_tokens).sum())


def precision_warning(on_gpus: Sequence[Stage]) -> str | None:
    """What there is to say of stages that run a model on GPUs in fp32; None where none does."""
    names = [
        stage.name for stage in on_gpus if isinstance(stage.request, ModelRequest) and stage.layout.precision == "fp32"
    ]
    if not names:
        return None
    return (
        f"{', '.join(names)}: fp32 on GPUs leaves their matrix units unused (67 of an H100's 989 teraflop/s) and has "
        "no fused attention; set layout.precision: bf16"
    )


def _budget(layout: Layout) -> str:
    """The budget as it is given, and what a pack may then hold."""
    of_pack = f" (x context_parallel {layout.context_parallel} = {layout.pack_tokens:,})"
    return f"{layout.micro_batch_tokens}" + of_pack * (layout.context_parallel > 1)
