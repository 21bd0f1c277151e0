"""A loss that is NaN or infinite: which rollouts are named."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch
from megatron_erpd.errors import TokenError
from megatron_erpd.model.forward import NonFiniteLoss, SequenceShard, StepChecks, loss_of
from megatron_erpd.vocab_parallel import VocabShard, token_terms
from tests.batches import grid_batch


def batch() -> Batch:
    grid = torch.zeros(3, 4, dtype=torch.int64)
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
    return grid_batch(grid, mask, torch.tensor([7, 3, 9]))


def total(batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return output[0].where(batch.loss_mask > 0, 0.0).sum(), batch.loss_mask.sum(), {}


def found(output: Tensor) -> NonFiniteLoss | None:
    """What a step says of a good micro-batch and of one with this output."""
    checks = StepChecks()
    loss_of(total, batch(), checks, torch.ones_like(output), SequenceShard())
    loss_of(total, batch(), checks, output, SequenceShard())
    error = checks.first()
    assert checks.first() is None
    return error


def test_a_finite_loss_goes_through_with_its_gradient() -> None:
    output, checks = torch.ones(2, 3, 4, requires_grad=True), StepChecks()
    loss, count, _ = loss_of(total, batch(), checks, output, SequenceShard())
    loss.backward()
    assert float(loss.detach()) == 6 == float(count)
    assert output.grad is not None and torch.equal(output.grad[0], batch().loss_mask)
    assert checks.first() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_rollout_with_the_value_is_named(value: float) -> None:
    output = torch.ones(2, 3, 4)
    output[0, 1, 2] = value
    error = found(output)
    assert error is not None and error.rows == [3] and error.what == f"the loss is {value}"


def test_values_outside_the_response_are_nobody_s() -> None:
    output = torch.ones(2, 3, 4)
    output[0, 1, 2] = math.nan
    output[1, 0, 0] = math.nan
    error = found(output)
    assert error is not None and error.rows == [3]


def test_a_sum_that_overflows_names_the_micro_batch() -> None:
    error = found(torch.full((1, 3, 4), 3e38))
    assert error is not None and error.rows == [7, 3, 9] and error.what == "the loss is inf"


def test_bad_logits_come_before_the_loss_that_they_make() -> None:
    """The head's flag is kept without an error; the rollouts are those of the wrong tokens."""
    data, checks = batch(), StepChecks()
    positions = data.response_positions
    logits = torch.zeros(len(positions), 5)
    wrong = [place for place, at in enumerate(positions.tolist()) if at % 3 == 2]
    logits[wrong] = math.nan
    terms = token_terms(logits, VocabShard.dense(5), later=partial(checks.add_tokens, data))
    assert terms.entropy[wrong].isnan().all()
    loss_of(total, data, checks, torch.full((1, 3, 4), math.nan), SequenceShard())
    error = checks.first()
    assert error is not None and error.rows == [9]
    assert error.what.startswith(f"the policy's logits of token {wrong[0]} hold NaN or +inf")
    with pytest.raises(TokenError, match="this rank's columns: nan at id 0"):
        token_terms(logits, VocabShard.dense(5))
