"""Batches and losses under context parallelism: the model sees a slice of every sequence, the loss sees all of it.

Megatron gives each rank two of 2 * CP equal pieces of a sequence, one from the front and one from the back, so that
causal attention costs all ranks the same. The per-token results (log-probs, entropy, divergence; a few numbers per
token) are gathered, and every rank computes the whole loss from them. Sequence-level losses need no other code that
way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.data.collate import Batch

_SEQUENCE_FIELDS = ("tokens", "labels", "position_ids", "loss_mask", "token_rows")


def rank_positions(length: int, rank: int, size: int) -> Tensor:
    """The positions `[length / size]` of a sequence that a context-parallel rank holds, ascending.

    Args:
        length: a multiple of 2 * size.
    """
    pieces = torch.arange(length).view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def slice_batch(batch: Batch, rank: int, size: int) -> Batch:
    """This rank's positions of a batch, `[b, s / size]`; the batch itself where `size` is 1."""
    if size == 1:
        return batch
    positions = rank_positions(batch.tokens.shape[1], rank, size).to(batch.tokens.device)

    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: take(item) for name, item in value.items()}
        return value.index_select(1, positions)

    names = [item.name for item in fields(batch) if item.name in _SEQUENCE_FIELDS]
    return replace(batch, **{name: take(getattr(batch, name)) for name in names})


def gather_sequence(values: Tensor, group: torch.distributed.ProcessGroup, rank: int, size: int) -> Tensor:
    """Per-token values of the whole sequence, the same on every rank.

    Args:
        values: `[..., s / size]`, this rank's positions (`rank_positions`).

    Returns:
        `[..., s]` in the order of the sequence. One all-gather forward, none backward: every rank computes the same
        loss from the result and keeps its own slice of the gradient.
    """
    return values if size == 1 else _Gather.apply(values, group, rank, size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any, rank: int, size: int) -> Tensor:
        length = values.shape[-1] * size
        ctx.positions = rank_positions(length, rank, size).to(values.device)
        parts = [torch.empty_like(values) for _ in range(size)]
        torch.distributed.all_gather(parts, values.contiguous(), group=group)
        whole = values.new_empty((*values.shape[:-1], length))
        for other, part in enumerate(parts):
            whole[..., rank_positions(length, other, size).to(values.device)] = part
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return upstream.index_select(-1, ctx.positions), None, None, None


Loss = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""Megatron's loss contract: per-token values `[n, b, s]` to (sum, count, {name: [sum, count]})."""


def whole_sequence_loss(loss: Loss, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss on whole sequences, from this rank's slice of the per-token values `[n, b, s / cp]`."""
    from megatron.core import mpu

    rank, size = context_parallel_rank()
    return loss_once(loss, output, mpu.get_context_parallel_group() if size > 1 else None, rank, size)


def context_parallel_rank() -> tuple[int, int]:
    """This process's place in its context-parallel group, and the group's size."""
    from megatron.core import mpu

    return mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()


def loss_once(
    loss: Loss, output: Tensor, group: torch.distributed.ProcessGroup | None, rank: int, size: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`loss` of the gathered values; count and report from the first rank alone.

    Megatron sums gradients, counts and reports over DP x CP. Each rank's gradient holds its own positions' part only,
    so the gradients' sum is right as it is; counts and reports would come out CP times too large.
    """
    if size == 1 or group is None:
        return loss(output)
    total, count, report = loss(gather_sequence(output, group, rank, size))
    if rank > 0:
        count = torch.zeros_like(count)
        report = {name: torch.zeros_like(value) for name, value in report.items()}
    return total, count, report
