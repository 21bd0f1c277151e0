"""The KL penalty against the exact KL of an enumerated categorical; importance weights by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.per_token import KL_ESTIMATORS, importance_correction, kl_penalty
from megatron_erpd.objectives.types import KlEstimator
from tests.tolerances import FLOAT64, Tolerance

V = 7
# k2's value is the KL's second-order expansion; at log-ratios of .02 its relative error is of that order.
SECOND_ORDER = Tolerance(0.05)


def categorical(spread: float) -> tuple[Tensor, Tensor]:
    """(policy logits with gradient, base log-probs)."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(V, dtype=torch.float64, generator=generator)
    policy = base + spread * torch.randn(V, dtype=torch.float64, generator=generator)
    return policy.requires_grad_(), base.log_softmax(0)


def expected_estimate(logits: Tensor, base: Tensor, estimator: KlEstimator) -> Tensor:
    """E over y ~ pi_0 of the estimate for the one-token response y, by enumeration."""
    policy = logits.log_softmax(0)
    one = torch.ones(1, 1)
    terms = [
        base[v].exp() * kl_penalty(policy[v].view(1, 1), base[v].view(1, 1), one, estimator, "token_mean")[0]
        for v in range(V)
    ]
    return torch.stack(terms).sum()


def exact(logits: Tensor, base: Tensor) -> Tensor:
    policy = logits.log_softmax(0)
    return (policy.exp() * (policy - base)).sum()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_exact_value_and_gradient_in_expectation(estimator: KlEstimator) -> None:
    logits, base = categorical(spread=1.0)
    estimate, reference = expected_estimate(logits, base, estimator), exact(logits, base)
    FLOAT64.assert_close(estimate, reference)
    FLOAT64.assert_close(gradient(estimate, logits), gradient(reference, logits))


def test_k2_has_the_exact_gradient_and_a_value_of_second_order() -> None:
    logits, base = categorical(spread=1.0)
    estimate, reference = expected_estimate(logits, base, "k2"), exact(logits, base)
    FLOAT64.assert_close(gradient(estimate, logits), gradient(reference, logits))
    policy = logits.log_softmax(0)
    FLOAT64.assert_close(estimate, (policy.exp() * (policy - base).square() / 2).sum())
    near, near_base = categorical(spread=0.02)
    SECOND_ORDER.assert_close(expected_estimate(near, near_base, "k2"), exact(near, near_base))


def test_without_weights_k3_would_be_another_divergence() -> None:
    """What the weights are for: the plain k3 on tokens of pi_0 estimates KL(pi_0 || pi_theta)."""
    logits, base = categorical(spread=1.0)
    policy = logits.log_softmax(0)
    plain = (base.exp() * ((policy - base).exp() - 1 - (policy - base))).sum()
    FLOAT64.assert_close(plain, (base.exp() * (base - policy)).sum())
    assert abs(float(plain.detach()) - float(exact(logits, base).detach())) > 0.01


def test_k3_is_never_negative() -> None:
    policy = torch.linspace(-30, 0, 301, dtype=torch.float64).view(1, -1)
    for base in (-0.01, -3.0, -12.0):
        for j in range(0, 301, 10):
            token = policy[:, j : j + 1]
            value, _ = kl_penalty(token, torch.full_like(token, base), torch.ones(1, 1), "k3", "token_mean")
            assert float(value) >= -1e-9


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("log_ratio", [-300.0, 300.0])
def test_extreme_ratios_stay_finite_in_fp32(estimator: KlEstimator, log_ratio: float) -> None:
    policy = torch.full((1, 1), log_ratio, requires_grad=True)
    total, _ = kl_penalty(policy, torch.zeros(1, 1), torch.ones(1, 1), estimator, "token_mean")
    (slope,) = torch.autograd.grad(total, policy)
    assert bool(total.isfinite()) and bool(slope.isfinite().all())


def test_importance_weights_by_hand() -> None:
    old = torch.tensor([[-1.0, -2.0, -0.5, 9.0], [-1.0, -1.0, math.nan, -math.inf]], dtype=torch.float64)
    behavior = torch.tensor([[-1.5, -1.5, -2.0, -9.0], [-1.1, -0.8, math.nan, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    token = importance_correction(old, behavior, mask, "token", 2.0)
    FLOAT64.assert_close(token, [[math.exp(0.5), math.exp(-0.5), 2.0, 0], [math.exp(0.1), math.exp(-0.2), 0, 0]])
    sequence = importance_correction(old, behavior, mask, "sequence", 2.0)
    FLOAT64.assert_close(sequence, [[2.0, 2.0, 2.0, 0], [math.exp(-0.1), math.exp(-0.1), 0, 0]])


def test_equal_policies_have_weight_one() -> None:
    log_probs = -torch.rand(2, 3)
    for level in ("token", "sequence"):
        assert bool((importance_correction(log_probs, log_probs, torch.ones(2, 3), level, 1.0) == 1).all())


def test_missing_behavior_log_probs_are_loud() -> None:
    behavior = torch.tensor([[math.nan, -1.0]])
    assert bool(importance_correction(-torch.ones(1, 2), behavior, torch.ones(1, 2), "token", 2.0).isnan().any())


def test_errors() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(RecipeError, match="KL estimator 'k4' is unknown"):
        kl_penalty(one, one, one, "k4", "token_mean")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="cap"):
        importance_correction(one, one, one, "token", 0.0)
    with pytest.raises(RecipeError, match="'batch' is unknown"):
        importance_correction(one, one, one, "batch", 1.0)  # type: ignore[arg-type]
