"""Means over an optimizer step's global batch, measured while its micro-batches run."""

from __future__ import annotations

import torch
from torch import Tensor


class StepMeans:
    """Adds up `(sum, count)` pairs over a step's micro-batches and ranks, on last pipeline stages.

    With the step's last micro-batch there is one all-reduce of all pairs over the data-parallel group, which every
    rank of the last stage joins; all of them get the same means. (Under context parallelism every rank holds whole
    sequences: sums and counts grow alike.)

    Args:
        num_micro_batches: micro-batches of one rank in one step.
        group: data-parallel group, with context parallelism; None for a single rank.
    """

    def __init__(self, num_micro_batches: int, group: torch.distributed.ProcessGroup | None) -> None:
        self.num_micro_batches = num_micro_batches
        self.group = group
        self._measured: list[Tensor] = []

    def add(self, *pairs: tuple[Tensor, Tensor]) -> list[float] | None:
        """Takes a micro-batch's pairs; with the step's last one returns their means, in order, else None."""
        flat = [value.detach().double() for pair in pairs for value in pair]
        self._measured.append(torch.stack(flat))
        if len(self._measured) < self.num_micro_batches:
            return None
        total = torch.stack(self._measured).sum(dim=0)
        self._measured = []
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        sums, counts = total.reshape(-1, 2).unbind(dim=1)
        return (sums / counts.clamp(min=1)).tolist()
