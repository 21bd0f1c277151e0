"""A loss that is no number ends the training before it changes the weights, and names the rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.errors import StageError, TokenError

LossAndMetrics = Callable[[Batch, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


class NonFiniteLoss(StageError):
    """The loss of a micro-batch is NaN or infinite, or so are the logits that it is made of.

    Attributes:
        what: which of them, and what it is.
        rows: the rollouts whose own values are no numbers, by their number in the data; all of the micro-batch's where
            none is (the sum over them overflows, say).
    """

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        super().__init__(f"{what} (rollouts number {', '.join(map(str, rows))})")
        self.what, self.rows = what, list(dict.fromkeys(rows))


def finite_loss(loss: LossAndMetrics, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What `loss` gives for a micro-batch. Reads one number back from the device.

    Args:
        output: `[k, b, s]`, what the policy head computed per token.

    Raises:
        NonFiniteLoss: the sum of the loss is NaN or infinite.
    """
    result = loss(batch, output)
    value = float(result[0].detach())
    if math.isfinite(value):
        return result
    wrong = (~torch.isfinite(output.detach()) & (batch.loss_mask > 0)).flatten(2).any(dim=2).any(dim=0)
    rows = batch.row_indices[wrong] if wrong.any() else batch.row_indices
    raise NonFiniteLoss(f"the loss is {value}", rows.tolist())


def has_finite_gradients(models: Iterable[Any]) -> bool:
    """Whether this rank's gradients are finite, as Megatron checks them before the collective over data-parallel ranks
    (`--check-for-nan-in-loss-and-grad`, on by default).

    Args:
        models: model chunks in Megatron's `DistributedDataParallel`.
    """
    groups = [group for model in models for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups)]
    return all(math.isfinite(bucket.grad_data.norm(p=2)) for group in groups for bucket in group.buckets)


@contextmanager
def naming_rollouts(batch: Batch, positions: Tensor) -> Iterator[None]:
    """Turns the error of response tokens into one that names their rollouts.

    Args:
        positions: int64 `[n]`, the response tokens in the flat order `[s, b]`.

    Raises:
        NonFiniteLoss: something of these tokens is no number.
    """
    try:
        yield
    except TokenError as error:
        columns = positions[torch.tensor(error.tokens, device=positions.device)] % batch.loss_mask.shape[0]
        raise NonFiniteLoss(str(error), batch.row_indices[columns].tolist()) from error
