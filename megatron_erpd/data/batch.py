"""From rollouts and cached rows to the micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_erpd import platform
from megatron_erpd.data.collate import Batch, TokenSource, collate
from megatron_erpd.data.prefetch import Prefetch
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, validate_against_vocabulary
from megatron_erpd.errors import RolloutError
from megatron_erpd.settings import Layout

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
        return _to_device(self._collate(indices))

    def _collate(self, indices: np.ndarray) -> Batch:
        # Rollout by rollout, since several values of one may come from the same row of a cache.
        rows = [{name: row(int(i)) for name, row in self.token_rows.items()} for i in indices]
        batch = collate(
            self.rollouts,
            indices,
            pad_token_id=0,
            pad_multiple=self.pad_multiple,
            token_rows={name: [row[name] for row in rows] for name in self.token_rows},
            seq_rows={name: values[indices] for name, values in self.sequence_rows.items()},
        )
        return batch if platform.is_cpu() else batch.pinned()

    def replay(self, order: BatchOrder, consumed: int, micro_batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """Endless micro-batches of one data-parallel rank, from where `consumed` rollouts were trained on.

        The next ones are read and collated on a thread of their own while the model works on this one.
        """
        with Prefetch(map(self._collate, order.micro_batches(consumed, micro_batch_size, rank, size))) as ahead:
            for batch in ahead:
                yield _to_device(batch)

    def once(self, groups: Sequence[np.ndarray], rank: int, size: int) -> Iterator[Batch]:
        """A batch of each group of rows, in turns over the data-parallel ranks.

        All ranks yield the same number of batches, since pipeline schedules and collectives count on it: where the
        groups run out, a rank yields a filler, a batch whose `loss_mask` is all 0.

        Args:
            groups: such as `length_groups` makes.
        """
        own = [min(at, len(groups) - 1) for at in range(rank, -(-len(groups) // size) * size, size)]
        with Prefetch(self._collate(groups[at]) for at in own) as ahead:
            for number, batch in enumerate(ahead):
                if rank + number * size >= len(groups):
                    batch.loss_mask.zero_()
                yield _to_device(batch)


def length_groups(lengths: np.ndarray, max_tokens: int, pad_multiple: int) -> list[np.ndarray]:
    """Rows sorted by length, longest first, cut into groups of at most `max_tokens` tokens with padding.

    Args:
        lengths: `[N]`, prompt and response; a model reads one token less.
        max_tokens: of a group; a rollout that is longer has one of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    padded = -(-(lengths[order] - 1) // pad_multiple) * pad_multiple
    groups, start = [], 0
    while start < len(order):
        count = max(1, max_tokens // max(1, int(padded[start])))
        groups.append(order[start : start + count])
        start += count
    return groups


def _to_device(batch: Batch) -> Batch:
    return batch.to(platform.device(), non_blocking=True)


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


def pad_multiple(layout: Layout) -> int:
    """What sequence lengths are rounded up to: shards of the sequence must be equal."""
    shards = layout.tensor_parallel if layout.sequence_parallel else 1
    return shards * (2 * layout.context_parallel if layout.context_parallel > 1 else 1)
