"""From values per token to one sum and one count.

No function here divides a loss by the size of a batch: a mean of per-rank means depends on how rows are dealt to ranks
and micro-batches, a quotient of sums does not. The caller adds up sums and counts, then divides once.

Rows whose mask is empty (padding rows of the last batch, responses of length 0) add nothing to a sum or a count.
A sequence lies whole in one row: under context parallelism sequence-level sums need the pieces of a row added first.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.types import Aggregation

AGGREGATIONS: tuple[Aggregation, ...] = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")


def token_mask(loss_mask: Tensor) -> Tensor:
    """[...] bool: whether a position is trained (`loss_mask` > 0)."""
    return loss_mask > 0


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is true, 0 elsewhere, with a gradient of exactly 0 elsewhere.

    Multiplying by the mask would turn a NaN or an infinity at an untrained position into a NaN of the sum. For the same
    reason inputs are masked before any arithmetic: the backward of arithmetic on garbage multiplies 0 by infinity.
    """
    return torch.where(mask, values, 0.0)


def sequence_sum(per_token: Tensor, loss_mask: Tensor) -> Tensor:
    """[b, s] -> [b]: sum over the trained tokens of each row; 0 for a row without any."""
    return masked(per_token, token_mask(loss_mask)).sum(dim=-1)


def sequence_mean(per_token: Tensor, loss_mask: Tensor) -> Tensor:
    """[b, s] -> [b]: mean over the trained tokens of each row; 0 for a row without any."""
    num_tokens = token_mask(loss_mask).sum(dim=-1).clamp(min=1)
    return sequence_sum(per_token, loss_mask) / num_tokens


def non_empty_rows(loss_mask: Tensor) -> Tensor:
    """[b, s] -> [b] bool: whether a row has at least one trained token."""
    return token_mask(loss_mask).any(dim=-1)


def sum_rows(per_row: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the non-empty rows of a value per row.

    Args:
        per_row: [b].
        loss_mask: [b, s].

    Returns:
        (sum, count): scalars; count is the number of non-empty rows, int64.
    """
    rows = non_empty_rows(loss_mask)
    return masked(per_row, rows).sum(), rows.sum()


def aggregate(per_token: Tensor, loss_mask: Tensor, aggregation: Aggregation) -> tuple[Tensor, Tensor]:
    """Reduce values per token to a sum and a count whose global quotient is the aggregated value.

    | aggregation           | sum                                     | count              | a token's weight |
    |-----------------------|-----------------------------------------|--------------------|------------------|
    | `token_mean`          | over tokens                             | tokens             | the same for all |
    | `seq_mean_token_mean` | over rows of the mean over their tokens | non-empty rows     | 1 / its row's length |
    | `seq_mean_token_sum`  | over tokens                             | non-empty rows     | the same for all |

    Args:
        per_token: [b, s]; untrained positions may hold anything, but a NaN there in `per_token` that was *computed*
            from inputs with a gradient poisons their backward: mask such inputs first.
        loss_mask: [b, s], > 0 where trained.
        aggregation: one of `AGGREGATIONS`.

    Returns:
        (sum, count): scalar of `per_token`'s dtype, scalar int64. No collectives.

    Raises:
        RecipeError: unknown aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise RecipeError(f"aggregation {aggregation!r} is unknown; use one of {', '.join(AGGREGATIONS)}")
    if aggregation == "token_mean":
        mask = token_mask(loss_mask)
        return masked(per_token, mask).sum(), mask.sum()
    if aggregation == "seq_mean_token_mean":
        return sum_rows(sequence_mean(per_token, loss_mask), loss_mask)
    if aggregation == "seq_mean_token_sum":
        return sum_rows(sequence_sum(per_token, loss_mask), loss_mask)
    assert_never(aggregation)
