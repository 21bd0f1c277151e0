"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.advantages import ADVANTAGE_KINDS, AdvantageKind, compute_advantages, zero_variance_groups

NAN = math.nan
# Groups, out of order: 7 = {1, 0, 0, 1}, 3 = {.1, .1, .1}, 5 = {2, unverified, 0}, 9 = {unverified}, 4 = {1}.
GROUPS = np.array([7, 3, 7, 5, 5, 3, 7, 3, 9, 7, 5, 4])
REWARDS = np.array([1, 0.1, 0, 2, NAN, 0.1, 0, 0.1, NAN, 1, 0, 1])

EXPECTED: dict[AdvantageKind, list[float]] = {
    # std of {1, 0, 0, 1} is 1/2, of {2, 0} is 1.
    "group_norm": [1, 0, -1, 1, NAN, 0, -1, 0, NAN, 1, -1, 0],
    "group_mean": [0.5, 0, -0.5, 1, NAN, 0, -0.5, 0, NAN, 0.5, -1, 0],
    # In group 7: 1 - (0 + 0 + 1)/3 = 2/3 and 0 - (1 + 0 + 1)/3 = -2/3; in group 5: 2 - 0 and 0 - 2.
    "leave_one_out": [2 / 3, 0, -2 / 3, 2, NAN, 0, -2 / 3, 0, NAN, 2 / 3, -2, 0],
    "raw": [1, 0.1, 0, 2, NAN, 0.1, 0, 0.1, NAN, 1, 0, 1],
}


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_by_hand(kind: AdvantageKind) -> None:
    np.testing.assert_allclose(compute_advantages(REWARDS, GROUPS, kind, eps=0.0), EXPECTED[kind], atol=1e-12)


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_tensors_give_tensors_and_keep_their_dtype(kind: AdvantageKind) -> None:
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    advantages = compute_advantages(rewards, torch.tensor(GROUPS), kind)
    assert isinstance(advantages, torch.Tensor) and advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages.numpy(), EXPECTED[kind], atol=1e-5)


def test_eps_is_in_units_of_the_reward() -> None:
    advantages = compute_advantages(np.array([1.0, 0.0]), np.array([0, 0]), "group_norm", eps=0.5)
    np.testing.assert_allclose(advantages, [0.5, -0.5])


def test_equal_rewards_give_exactly_zero_despite_rounding() -> None:
    # The mean of three .1 is not .1 in floating point; divided by eps the difference would look like a signal.
    rewards = np.full(3, 0.1)
    assert np.all(compute_advantages(rewards, np.zeros(3, int), "group_norm", eps=1e-20) == 0)


def test_zero_variance_groups() -> None:
    expected = np.isin(GROUPS, [3, 4, 9])
    np.testing.assert_array_equal(zero_variance_groups(REWARDS, GROUPS), expected)
    flags = zero_variance_groups(torch.tensor(REWARDS), torch.tensor(GROUPS))
    assert flags.dtype == torch.bool and flags.tolist() == expected.tolist()


def test_no_rollouts() -> None:
    assert len(compute_advantages(np.zeros(0), np.zeros(0, int), "group_norm")) == 0
    assert len(zero_variance_groups(np.zeros(0), np.zeros(0, int))) == 0


def test_errors() -> None:
    with pytest.raises(RecipeError, match="'grpo' is unknown"):
        compute_advantages(REWARDS, GROUPS, "grpo")  # type: ignore[arg-type]
    with pytest.raises(ErpdError, match=r"must both be \[N\]"):
        compute_advantages(REWARDS, GROUPS[:3], "raw")
