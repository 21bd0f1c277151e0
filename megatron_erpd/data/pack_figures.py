"""How full the packs of a stage are and how evenly they share its work: what a plan and a training say of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron_erpd.data.batch import Padding
from megatron_erpd.data.packs import Packer
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.settings import Layout


@dataclass(frozen=True)
class PackFigures:
    """Of packs as they are dealt to data-parallel ranks, step by step. A pass of precompute is one step.

    Attributes:
        budget: tokens that a pack may hold, before context parallelism splits it.
        packs: of a rank in a step; the same in all steps.
        filled: tokens of all packs over the budgets of all packs.
        padding: the share of the packs' tokens that are of no rollout.
        spread: work of the rank with the most over the mean of all ranks, which wait for it at the end of a step.
        over_budget: rollouts with more tokens than the budget, each in a pack of its own.
    """

    budget: int
    packs: int
    filled: float
    padding: float
    spread: float
    over_budget: int

    def describe(self) -> str:
        """As a training's log has it."""
        return (
            f"packs of {self.budget:,} tokens: {self.packs} on each rank and step, {self.filled:.1%} full, "
            f"{self.padding:.1%} padding, work of the ranks (longest / mean) {self.spread:.3f}"
        )

    def summary(self) -> dict[str, float]:
        """As a manifest keeps it."""
        shares = {"pack_filled": self.filled, "pack_padding": self.padding, "pack_spread": self.spread}
        counts = {"pack_tokens": self.budget, "packs_per_step": self.packs}
        return counts | {name: round(value, 4) for name, value in shares.items()}


def training_packs(order: BatchOrder, packer: Packer, layout: Layout, num_packs: int, num_steps: int) -> PackFigures:
    """Of the steps of a training on fixed rollouts, up to the end of their first epoch.

    Args:
        num_packs: of a rank in a step (`BatchOrder.most_packs`, or as many more as a schedule wants).
        num_steps: of the training.
    """
    steps = min(num_steps, -(-order.samples_per_epoch // order.global_batch_size))
    dealt = order.dealt(0, packer, num_packs, layout.data_parallel)
    return _figures(order.lengths, packer, layout, list(islice(dealt, steps)))


def precompute_packs(groups: Sequence[np.ndarray], packer: Packer, layout: Layout, lengths: np.ndarray) -> PackFigures:
    """Of a pass of precompute: packs in the order in which the ranks take turns."""
    ranks, none = layout.data_parallel, np.empty(0, dtype=np.int64)
    taken = [*groups, *[none] * (-len(groups) % ranks)]
    return _figures(lengths, packer, layout, [[taken[at : at + ranks] for at in range(0, len(taken), ranks)]])


def _figures(
    lengths: np.ndarray, packer: Packer, layout: Layout, steps: Iterable[Sequence[Sequence[np.ndarray]]]
) -> PackFigures:
    """
    Args:
        lengths: `[N]`, prompt and response; a model reads one token less.
        steps: of each, for each micro-step a pack for each rank.
    """
    assert layout.pack_tokens is not None
    total, read = Padding.of(layout).total, lengths - 1
    held = of_rollouts = num_packs = count = 0
    most = mean = 0.0
    for step in steps:
        of_ranks = np.zeros(layout.data_parallel)
        count = len(step)
        for micro_step in step:
            for rank, pack in enumerate(micro_step):
                num_packs += 1
                of_ranks[rank] += packer.work[pack].sum()
                of_rollouts += int(read[pack].sum())
                held += -(-int(packer.tokens[pack].sum()) // total) * total
        most, mean = most + float(of_ranks.max()), mean + float(of_ranks.mean())
    return PackFigures(
        budget=layout.pack_tokens,
        packs=count,
        filled=held / (num_packs * layout.pack_tokens),
        padding=1 - of_rollouts / held,
        spread=most / mean,
        over_budget=int((packer.tokens > packer.max_tokens).sum()),
    )
