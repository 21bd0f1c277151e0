"""From rollouts and cached rows to the micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_erpd import platform
from megatron_erpd.data.collate import Batch, TokenSource, collate
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, validate_against_vocabulary
from megatron_erpd.errors import RolloutError

TokenRow = Callable[[int], np.ndarray]
"""Given a row of the rollouts, its response-aligned array: `[R]`, or `[R, K]` for top-k targets."""


@dataclass(frozen=True)
class BatchSource:
    """Collates micro-batches and moves them to the device.

    Every rank reads the memory-mapped rows that it needs itself, so no batch is broadcast.
    """

    rollouts: TokenSource
    pad_multiple: int
    token_rows: Mapping[str, TokenRow]
    sequence_rows: Mapping[str, np.ndarray]
    """Per-rollout values `[N]`, such as rewards and advantages."""

    def batch(self, indices: np.ndarray) -> Batch:
        """The micro-batch of these rows of the rollouts, on the device."""
        batch = collate(
            self.rollouts,
            indices,
            pad_token_id=0,
            pad_multiple=self.pad_multiple,
            token_rows={name: [row(int(i)) for i in indices] for name, row in self.token_rows.items()},
            seq_rows={name: values[indices] for name, values in self.sequence_rows.items()},
        )
        return batch.to(platform.device(), non_blocking=True)

    def replay(self, order: BatchOrder, consumed: int, micro_batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """Endless micro-batches of one data-parallel rank, from where `consumed` rollouts were trained on."""
        for indices in order.micro_batches(consumed, micro_batch_size, rank, size):
            yield self.batch(indices)

    def once(self, micro_batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """Every rollout once, spread over the data-parallel ranks, those of similar length together.

        All ranks yield the same number of batches, since pipeline schedules and collectives count on it: where the
        rows run out, a rank yields a filler, a batch whose `loss_mask` is all 0.
        """
        by_length = np.argsort(self.rollouts.lengths, kind="stable")[::-1]
        groups = [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]
        for position in range(rank, -(-len(groups) // size) * size, size):
            batch = self.batch(groups[min(position, len(groups) - 1)])
            if position >= len(groups):
                batch.loss_mask.zero_()
            yield batch


def open_rollouts(path: Path, vocab_size: int, max_positions: int) -> Rollouts:
    """Reads and checks rollouts against the model that will see them.

    Raises:
        RolloutError: no row, a token id beyond the vocabulary, or a rollout longer than the model's positions.
    """
    rollouts = read_rollouts(path)
    if len(rollouts) == 0:
        raise RolloutError(f"{path}: holds no rollout; there is nothing to train on")
    validate_against_vocabulary(rollouts, vocab_size)
    longest = int(np.argmax(rollouts.lengths))
    if rollouts.lengths[longest] > max_positions:
        raise RolloutError(
            f"{path}: row {longest} ({rollouts.sample_ids[longest]}) has {rollouts.lengths[longest]} tokens, the model "
            f"has {max_positions} positions; shorten or drop such rollouts"
        )
    return rollouts
