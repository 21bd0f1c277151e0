"""From log-probs per token to one sum and one count: masks and sums, importance ratios, KL estimates, corrections.

No function here divides a loss by the size of a batch: a mean of per-rank means depends on how rows are spread over
ranks and micro-batches, a quotient of sums does not. The caller adds up sums and counts, then divides once.

Rows whose mask is empty (padding rows of the last batch, responses of length 0) add nothing to a sum or a count.
A sequence lies whole in one row: under context parallelism sequence-level sums need the pieces of a row added first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.types import Aggregation, CorrectionLevel, KlEstimator, Metrics, ReplayInputs

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


def cpu_sees(values: Tensor, condition: Callable[[], Tensor]) -> bool:
    """Whether `condition()` (a bool `[]` of `values`) is found to hold: looked at on a CPU, where that costs less than
    the work that it may save; False on other devices, for which the host would have to wait."""
    return values.device.type == "cpu" and bool(condition())


# Importance ratios

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this many nats from above before they are exponentiated, and nowhere else.

exp overflows fp32 at 88, and a squared gradient norm does so at half of that. A token sampled from pi_old has
log rho <= -log pi_old(y), so the clamp acts only on tokens that pi_old gave a probability below exp(-20) = 2e-9. Beyond
it the ratio is constant, and so its gradient is 0. There is no clamp from below: exp(-large) is a harmless 0."""


def token_log_ratios(inputs: ReplayInputs) -> Tensor:
    """[b, s] nats: l_t = log pi_theta(y_t) - log pi_old(y_t), 0 at untrained positions; pi_old gets no gradient."""
    mask = token_mask(inputs.loss_mask)
    return masked(inputs.policy_log_probs, mask) - masked(inputs.old_log_probs.detach(), mask)


def importance_ratios(log_ratios: Tensor) -> Tensor:
    """exp of log-ratios of any shape, safe from overflow (see `MAX_LOG_RATIO`)."""
    return log_ratios.clamp(max=MAX_LOG_RATIO).exp()


def token_advantages_of(inputs: ReplayInputs) -> Tensor:
    """[b, s]: the advantages per token, those per sequence repeated along their row; 0 at untrained positions."""
    advantages = inputs.advantages.detach()
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    return masked(advantages.expand_as(inputs.policy_log_probs), token_mask(inputs.loss_mask))


def weighted(per_token: Tensor, inputs: ReplayInputs) -> Tensor:
    """[b, s]: token losses times the constant importance weights, where there are any."""
    if inputs.importance_weights is None:
        return per_token
    return per_token * masked(inputs.importance_weights.detach(), token_mask(inputs.loss_mask))


@torch.no_grad()
def ratio_metrics(inputs: ReplayInputs, clipped: Tensor | None = None) -> Metrics:
    """The statistics that every replay loss reports, all as (sum, count).

    - `log_ratio`: mean over tokens of l_t.
    - `reward_weighted_log_ratio`: mean over sequences of sum_t A_t l_t: how far the policy moved *in the direction of*
      the advantages, in nats. It grows with useful movement and ignores movement that the advantages don't ask for.
    - `importance_ratio`: mean over tokens of rho_t (its expectation under pi_old is 1).
    - `clip_fraction`: share of tokens whose gradient is removed (or, for `cispo`, whose weight is capped) by clipping;
      0 for a loss without clipping.
    - `kl_k1`, `kl_k3`: mean over tokens of -l_t and of rho_t - 1 - l_t: unbiased estimates of KL(pi_old || pi_theta),
      the direction that tokens from pi_old measure without weights (k3 is never negative and has the lower variance).

    Args:
        inputs: the loss's inputs.
        clipped: [b, s] bool, or None for a loss without clipping.
    """
    mask = inputs.loss_mask
    log_ratios = token_log_ratios(inputs)
    ratios = importance_ratios(log_ratios)
    if clipped is None:
        clipped = torch.zeros_like(log_ratios)
    return {
        "log_ratio": aggregate(log_ratios, mask, "token_mean"),
        "reward_weighted_log_ratio": sum_rows(sequence_sum(token_advantages_of(inputs) * log_ratios, mask), mask),
        "importance_ratio": aggregate(ratios, mask, "token_mean"),
        "clip_fraction": aggregate(clipped.to(log_ratios.dtype), mask, "token_mean"),
        "kl_k1": aggregate(-log_ratios, mask, "token_mean"),
        "kl_k3": aggregate(ratios - 1 - log_ratios, mask, "token_mean"),
    }


# KL to the base policy, and data that were not sampled from pi_old

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
        aggregation: see `aggregate`; use the loss's own, so that both are divided by the same count.

    Returns:
        (sum, count): scalar with gradient, scalar int64. No collectives. Ratios are clamped: `MAX_LOG_RATIO`.

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
