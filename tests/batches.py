"""Micro-batches made by hand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, arange

from megatron_erpd.data.batch import Batch, rank_positions


def grid_batch(
    labels: Tensor,
    mask: Tensor,
    row_indices: Tensor | None = None,
    token_rows: Mapping[str, Tensor] | None = None,
    seq_rows: Mapping[str, Tensor] | None = None,
    target_rows: Mapping[str, Tensor] | None = None,
    context_parallel: tuple[int, int] = (0, 1),
) -> Batch:
    """A padded micro-batch whose labels and target rows are given on the grid `[b, s]`; its tokens are the labels."""
    b, s = mask.shape
    here = rank_positions(s, *context_parallel) if context_parallel[1] > 1 else arange(s)
    own = mask[:, here]
    positions = (own.T > 0).flatten().nonzero().squeeze(-1)
    places = (positions % b) * s + here[positions // b]
    return Batch(
        tokens=labels[:, here],
        position_ids=here.expand(b, len(here)).contiguous(),
        row_indices=arange(b) if row_indices is None else row_indices,
        loss_mask=mask,
        response_positions=positions,
        response_places=places,
        labels=labels.flatten()[places],
        token_rows=dict(token_rows or {}),
        seq_rows=dict(seq_rows or {}),
        target_rows={name: rows.flatten(0, 1)[places] for name, rows in (target_rows or {}).items()},
    )
