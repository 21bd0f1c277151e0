"""Sums and counts against loops; masked tokens, empty rows, split batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.per_token import AGGREGATIONS, aggregate, sequence_mean, sequence_sum
from megatron_erpd.objectives.types import Aggregation
from tests.tolerances import FLOAT64

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]])


def values() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator)


def by_hand(per_token: Tensor, mask: Tensor, aggregation: Aggregation) -> tuple[float, int]:
    rows = [[float(x) for x, m in zip(row, keep, strict=True) if m] for row, keep in zip(per_token, mask, strict=True)]
    rows = [row for row in rows if row]
    if aggregation == "token_mean":
        return sum(sum(row) for row in rows), sum(len(row) for row in rows)
    if aggregation == "seq_mean_token_mean":
        return sum(sum(row) / len(row) for row in rows), len(rows)
    return sum(sum(row) for row in rows), len(rows)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_matches_a_loop(aggregation: Aggregation) -> None:
    total, count = aggregate(values(), MASK, aggregation)
    expected_total, expected_count = by_hand(values(), MASK, aggregation)
    FLOAT64.assert_close(total, expected_total)
    assert int(count) == expected_count
    assert count.dtype == torch.int64


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_garbage_at_untrained_positions_is_not_seen(aggregation: Aggregation) -> None:
    clean = values().requires_grad_()
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e300, -1e300], dtype=torch.float64)
    dirty = torch.where(MASK > 0, values(), garbage.expand(4, 5)).requires_grad_()
    for tensor in (clean, dirty):
        aggregate(tensor, MASK, aggregation)[0].backward()
    assert clean.grad is not None and dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)
    assert torch.equal(dirty.grad[MASK == 0], torch.zeros(int((MASK == 0).sum()), dtype=torch.float64))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_batch_gives_zero_and_zero(aggregation: Aggregation) -> None:
    per_token = torch.full((3, 4), float("nan"), requires_grad=True)
    total, count = aggregate(per_token, torch.zeros(3, 4), aggregation)
    total.backward()
    assert float(total.detach()) == 0 and int(count) == 0
    assert per_token.grad is not None and bool((per_token.grad == 0).all())


def test_sequence_sum_and_mean() -> None:
    ones = torch.ones(4, 5)
    assert sequence_sum(ones, MASK).tolist() == [3, 0, 4, 1]
    assert sequence_mean(2 * ones, MASK).tolist() == [2, 0, 2, 2]


def test_unknown_aggregation_is_named() -> None:
    with pytest.raises(RecipeError, match="'mean' is unknown; use one of token_mean"):
        aggregate(values(), MASK, "mean")  # type: ignore[arg-type]
