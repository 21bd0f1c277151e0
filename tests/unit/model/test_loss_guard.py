"""A loss that is NaN or infinite: which rollouts are named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch
from megatron_erpd.model.forward import NonFiniteLoss, SequenceShard, loss_of


def batch() -> Batch:
    grid = torch.zeros(3, 4, dtype=torch.int64)
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
    return Batch(grid, grid, grid, mask, torch.tensor([7, 3, 9]))


def total(batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return output[0].where(batch.loss_mask > 0, 0.0).sum(), batch.loss_mask.sum(), {}


def test_a_finite_loss_goes_through_with_its_gradient() -> None:
    output = torch.ones(2, 3, 4, requires_grad=True)
    loss, count, _ = loss_of(total, batch(), output, SequenceShard())
    loss.backward()
    assert float(loss.detach()) == 6 == float(count)
    assert output.grad is not None and torch.equal(output.grad[0], batch().loss_mask)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_rollout_with_the_value_is_named(value: float) -> None:
    output = torch.ones(2, 3, 4)
    output[0, 1, 2] = value
    with pytest.raises(NonFiniteLoss) as caught:
        loss_of(total, batch(), output, SequenceShard())
    assert caught.value.rows == [3]


def test_values_outside_the_response_are_nobody_s() -> None:
    output = torch.ones(2, 3, 4)
    output[0, 1, 2] = math.nan
    output[1, 0, 0] = math.nan
    with pytest.raises(NonFiniteLoss) as caught:
        loss_of(total, batch(), output, SequenceShard())
    assert caught.value.rows == [3]


def test_a_sum_that_overflows_names_the_micro_batch() -> None:
    with pytest.raises(NonFiniteLoss) as caught:
        loss_of(total, batch(), torch.full((1, 3, 4), 3e38), SequenceShard())
    assert caught.value.rows == [7, 3, 9] and caught.value.what == "the loss is inf"
