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


def has_no_size(layout: Layout) -> bool:
    """Whether a layout leaves the size of micro-batches open."""
    return layout.micro_batch_size is None and layout.micro_batch_tokens is None


@dataclass(frozen=True)
class StageRollouts:
    """What a stage reads, as far as its budget goes.

    Attributes:
        prompts, lengths: int64 `[N]`, tokens of the prompt, and of prompt and response.
        name: what a rollout is called.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    name: Callable[[int], str]

    @property
    def longest(self) -> int:
        return int(self.lengths.max())


def check_prompts(layout: Layout, rollouts: StageRollouts) -> None:
    """Raises `LayoutError` where a prompt alone is over the budget, so that no response to it would fit."""
    row = int(np.argmax(rollouts.prompts))
    tokens = int(rollouts.prompts[row])
    if layout.pack_tokens is not None and tokens > layout.pack_tokens:
        raise LayoutError(
            f"micro_batch_tokens {_budget(layout)}: the prompt of {rollouts.name(row)} alone has {tokens:,} tokens; "
            f"give at least {least_budget(layout, rollouts.longest)}, which holds every rollout"
        )


def over_budget(stage: Stage, shape: ModelShape, rollouts: StageRollouts, memory: int | None) -> str | None:
    """A line on rollouts that are longer than the budget, each of which has a pack of its own; None where none is.

    Args:
        memory: bytes of a GPU; None where it isn't known, or the stage runs on CPUs.

    Raises:
        LayoutError: the longest doesn't fit the memory, by plan.
    """
    layout = stage.layout
    if layout.pack_tokens is None:
        return None
    packing = packer(layout, rollouts.lengths, math.inf)
    count = int((packing.tokens > packing.max_tokens).sum())
    if not count:
        return None
    row = int(np.argmax(rollouts.lengths))
    longest, least = int(rollouts.lengths[row]), least_budget(layout, rollouts.longest)
    named = f"{rollouts.name(row)} with {longest:,} tokens"
    if memory is not None and (needed := stage_memory(stage, shape, longest).total) > usable_bytes(memory):
        raise LayoutError(
            f"micro_batch_tokens {_budget(layout)}: {counted(count, 'rollout')} of {len(rollouts.lengths):,} "
            f"{'has' if count == 1 else 'have'} more, the longest {named}, and a pack of its own takes "
            f"{needed / 2**30:.1f} GiB by plan, of {usable_bytes(memory) / 2**30:.1f} that can be used; a budget of "
            f"{least} would hold it: raise context_parallel or tensor_parallel, or set recompute-granularity: full "
            "under megatron, until that fits, or leave such rollouts out"
        )
    return (
        f"{counted(count, 'rollout')} of {len(rollouts.lengths):,} {'is' if count == 1 else 'are'} longer than "
        f"micro_batch_tokens {_budget(layout)} and {'has' if count == 1 else 'have'} a pack of "
        f"{'its' if count == 1 else 'their'} own; the longest is {named}, for which {least} would do"
    )


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
