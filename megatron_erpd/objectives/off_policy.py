"""Sampled KL to the base policy, and correction for data that were not sampled from pi_old."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.ratios import importance_ratios
from megatron_erpd.objectives.reduction import aggregate, masked, sequence_sum, token_mask
from megatron_erpd.objectives.types import Aggregation, CorrectionLevel, KlEstimator

KL_ESTIMATORS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")


def kl_penalty(
    policy_log_probs: Tensor,
    base_log_probs: Tensor,
    loss_mask: Tensor,
    estimator: KlEstimator,
    aggregation: Aggregation,
) -> tuple[Tensor, Tensor]:
    """Estimate KL(pi_theta || pi_0) from tokens that were sampled from **pi_0**, with the right gradient.

    The usual estimators (Schulman, "Approximating KL divergence", 2020) take tokens from pi_theta. Here the data are
    fixed samples of pi_0, so every token carries the weight rho = pi_theta / pi_0. With l = log rho, per token:

    | estimator | value             | E value               | gradient per token        | E gradient |
    |-----------|-------------------|-----------------------|---------------------------|------------|
    | k1        | rho l             | KL, exactly           | rho (l + 1) grad log pi   | grad KL, exactly |
    | k2        | sg(rho) l^2 / 2   | KL + O(l^3)           | rho l grad log pi         | grad KL, exactly |
    | k3        | rho l - rho + 1   | KL, exactly; >= 0     | rho l grad log pi         | grad KL, exactly |

    E is over y ~ pi_0(. | prefix), `sg` stops the gradient. k3 is the one to use: never negative, no score-function
    noise (k1's extra rho grad log pi has mean 0 and only adds variance). k2 has k3's gradient and another value. The
    weight is the token's own: prefixes stay those that pi_0 visits, so this estimates the *mean per-token* KL on pi_0's
    prefixes, not the KL between the two distributions over whole responses.

    Args:
        policy_log_probs: [b, s] nats, with gradient.
        base_log_probs: [b, s] nats, log pi_0 of the same tokens; no gradient.
        loss_mask: [b, s], > 0 where counted; other positions may hold anything.
        estimator: `k1`, `k2` or `k3`.
        aggregation: see `reduction.aggregate`; use the loss's own, so that both are divided by the same count.

    Returns:
        (sum, count): scalar with gradient, scalar int64. No collectives. Ratios are clamped: `ratios.MAX_LOG_RATIO`.

    Raises:
        RecipeError: unknown estimator or aggregation.
    """
    if estimator not in KL_ESTIMATORS:
        raise RecipeError(f"KL estimator {estimator!r} is unknown; use one of {', '.join(KL_ESTIMATORS)}")
    mask = token_mask(loss_mask)
    log_ratios = masked(policy_log_probs, mask) - masked(base_log_probs.detach(), mask)
    ratios = importance_ratios(log_ratios)
    if estimator == "k1":
        per_token = ratios * log_ratios
    elif estimator == "k2":
        per_token = ratios.detach() * log_ratios.square() / 2
    elif estimator == "k3":
        per_token = ratios * log_ratios - ratios + 1
    else:
        assert_never(estimator)
    return aggregate(per_token, loss_mask, aggregation)


@torch.no_grad()
def importance_correction(
    old_log_probs: Tensor,
    behavior_log_probs: Tensor,
    loss_mask: Tensor,
    level: CorrectionLevel,
    cap: float,
) -> Tensor:
    """Truncated importance weights min(pi_old / mu, cap) for data whose sampler mu is not exactly pi_old.

    The sampling engine and the trainer compute slightly different probabilities for the same weights. `token` corrects
    each token by its own ratio (low variance, ignores the prefix's mismatch); `sequence` gives every token of a row the
    product of the row's ratios (unbiased but for the cap, high variance on long responses).

    Args:
        old_log_probs: [b, s] nats, pi_old as the trainer computes it.
        behavior_log_probs: [b, s] nats, as the sampler recorded them. A NaN at a trained position (nothing was
            recorded) makes the weight NaN on purpose: rollouts without them can't be corrected.
        loss_mask: [b, s].
        level: `token` or `sequence`.
        cap: the largest weight, > 0.

    Returns:
        [b, s] weights without gradient, 0 at untrained positions. No collectives.

    Raises:
        RecipeError: unknown level, or cap <= 0.
    """
    if not cap > 0:
        raise RecipeError(f"the cap of importance weights must be above 0, not {cap}")
    mask = token_mask(loss_mask)
    log_weights = masked(old_log_probs, mask) - masked(behavior_log_probs, mask)
    if level == "sequence":
        log_weights = sequence_sum(log_weights, loss_mask).unsqueeze(-1).expand_as(log_weights)
    elif level != "token":
        raise RecipeError(f"importance correction level {level!r} is unknown; use token or sequence")
    return masked(importance_ratios(log_weights).clamp(max=cap), mask)
