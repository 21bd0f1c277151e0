"""Losses that train a policy on a fixed set of scored rollouts (stage 1), and on token advantages (stage 2).

Every loss is a pure function of a `ReplayInputs`: it returns a sum, a count and metrics (`LossOutput`), has no
collectives, sends gradients to `policy_log_probs` only, and ignores untrained positions whatever they hold. Symbols:
l_t is the token log-ratio log pi_theta(y_t) - log pi_old(y_t), rho_t = exp(l_t), A the advantage, r the reward, sg
stops the gradient.

`unlearn=True` trains against the outcome: the sign of A (or the label) is flipped. The product is the *unlearned
policy* of ERPD (arXiv 2605.25582), deliberately degenerate and used as a reference in signals. It is not itself a loss.

Importance weights, where given, multiply the token losses. Losses with one term per sequence (`ce`, `mse`) take the
mean weight of the row, which is the weight itself when the correction is at sequence level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.per_token import (
    aggregate,
    importance_ratios,
    masked,
    non_empty_rows,
    ratio_metrics,
    sequence_mean,
    sequence_sum,
    sum_rows,
    token_advantages_of,
    token_log_ratios,
    token_mask,
    weighted,
)
from megatron_erpd.objectives.types import Aggregation, LossOutput, ReplayInputs, SequenceAggregation


def ppo_loss(
    inputs: ReplayInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token_mean",
    unlearn: bool = False,
) -> LossOutput:
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7), which is GRPO's loss on group advantages.

    Per token: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). With `dual_clip` = c (arXiv 1912.09729, eq. 5) the
    objective is bounded by c A from below where A < 0, which stops the gradient of tokens with rho > c.

    Args:
        inputs: advantages per sequence or per token.
        clip_low, clip_high: distances from 1, 0 <= clip_low <= 1, clip_high >= 0.
        dual_clip: c > 1, or None for no second clip.
        aggregation: see `per_token.aggregate`; count is tokens or sequences accordingly.
        unlearn: use -A.

    Raises:
        RecipeError: a parameter out of range.
    """
    _check_clips(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise RecipeError(f"dual_clip must be above 1, not {dual_clip}")
    advantages = _signed(token_advantages_of(inputs), unlearn)
    ratios = importance_ratios(token_log_ratios(inputs))
    objective, clipped = _clipped_surrogate(ratios, advantages, clip_low, clip_high)
    if dual_clip is not None:
        floor = dual_clip * advantages
        at_floor = (advantages < 0) & (objective < floor)
        objective = torch.where(at_floor, floor, objective)
        clipped = clipped | at_floor
    return _token_output(-objective, inputs, aggregation, clipped)


def gspo_loss(
    inputs: ReplayInputs,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregation: Aggregation = "seq_mean_token_mean",
    unlearn: bool = False,
) -> LossOutput:
    """Group sequence policy optimisation (arXiv 2507.18071, eqs. 5-7): PPO's surrogate on the sequence ratio.

    The ratio of every token of a row is exp(mean_t l_t), the length-normalised sequence ratio. `seq_mean_token_mean` is
    the paper's loss; its clips are the paper's too, far smaller than PPO's because the ratio is a geometric mean.

    Args:
        inputs: advantages must be per sequence, [b].
        clip_low, clip_high: distances from 1, 0 <= clip_low <= 1, clip_high >= 0.
        aggregation: see `per_token.aggregate`.
        unlearn: use -A.

    Raises:
        RecipeError: a parameter out of range.
        ErpdError: token advantages.
    """
    _check_clips(clip_low, clip_high)
    _require_sequence_advantages(inputs, "gspo")
    log_ratios = token_log_ratios(inputs)
    ratios = importance_ratios(sequence_mean(log_ratios, inputs.loss_mask)).unsqueeze(-1).expand_as(log_ratios)
    advantages = _signed(token_advantages_of(inputs), unlearn)
    objective, clipped = _clipped_surrogate(ratios, advantages, clip_low, clip_high)
    return _token_output(-objective, inputs, aggregation, clipped)


def cispo_loss(
    inputs: ReplayInputs,
    *,
    clip_high: float = 0.2,
    aggregation: Aggregation = "token_mean",
    unlearn: bool = False,
) -> LossOutput:
    """Clipped importance-sampled policy gradient (arXiv 2506.13585, eqs. 4-5): per token
    -sg(min(rho, 1 + clip_high)) A log pi_theta.

    The cap bounds a token's weight but, unlike PPO's clip, never removes its gradient. As in the paper there is no
    lower clip. The value of the loss has no meaning of its own; its gradient does.

    Args:
        inputs: advantages per sequence or per token.
        clip_high: the cap's distance from 1, >= 0. `clip_fraction` is the share of tokens at the cap.
        aggregation: see `per_token.aggregate`.
        unlearn: use -A.

    Raises:
        RecipeError: a parameter out of range.
    """
    _check_clips(0.0, clip_high)
    advantages = _signed(token_advantages_of(inputs), unlearn)
    ratios = importance_ratios(token_log_ratios(inputs)).detach()
    policy_log_probs = masked(inputs.policy_log_probs, token_mask(inputs.loss_mask))
    per_token = -ratios.clamp(max=1 + clip_high) * advantages * policy_log_probs
    return _token_output(per_token, inputs, aggregation, ratios > 1 + clip_high)


def sapo_loss(
    inputs: ReplayInputs,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    aggregation: Aggregation = "token_mean",
    unlearn: bool = False,
) -> LossOutput:
    """Soft adaptive policy optimisation (arXiv 2511.20347): a smooth gate in the place of PPO's clip.

    Per token: -(4 / tau) sigmoid(tau (rho - 1)) A, with tau = tau_positive where A > 0 and tau_negative elsewhere. The
    factor 4 / tau makes the gradient at rho = 1 that of rho A; it decays smoothly, like sigma', as rho leaves 1.
    Without a constraint it drifts in many off-policy epochs: that is the "extreme region" of ERPD.

    Args:
        inputs: advantages per sequence or per token.
        tau_positive, tau_negative: temperatures of the gate, > 0; larger ones gate more tightly.
        aggregation: see `per_token.aggregate`.
        unlearn: use -A (the temperatures follow the flipped sign).

    Raises:
        RecipeError: a parameter out of range.
    """
    for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if not tau > 0:
            raise RecipeError(f"{name} must be above 0, not {tau}")
    advantages = _signed(token_advantages_of(inputs), unlearn)
    ratios = importance_ratios(token_log_ratios(inputs))
    # full_like, because `where` of two numbers would round them to the default dtype.
    taus = torch.where(advantages > 0, torch.full_like(ratios, tau_positive), tau_negative)
    per_token = -4 / taus * torch.sigmoid(taus * (ratios - 1)) * advantages
    return _token_output(per_token, inputs, aggregation)


def ce_loss(
    inputs: ReplayInputs,
    *,
    beta: float = 1.0,
    agg: SequenceAggregation = "sum",
    unlearn: bool = False,
) -> LossOutput:
    """Outcome cross-entropy on the implicit reward (this project's choice of teacher loss).

    Per sequence: z = beta agg_t l_t is the logit of the outcome; the loss is
    -[r log sigmoid(z) + (1 - r) log sigmoid(-z)].
    It saturates once outcomes are told apart, which is what keeps it from drifting. `sum` with beta near 1 is what
    works: with `mean` or a small beta the loss never saturates and the policy drifts.

    Args:
        inputs: rewards in [0, 1] on every row with a non-empty mask; one outside makes the loss NaN (for an error here
            the host would wait for the device). Advantages enter the metrics only.
        beta: scale of the logit, > 0.
        agg: `sum` or `mean` of the log-ratio over response tokens.
        unlearn: use 1 - r.

    Returns:
        sum over sequences; count is the number of sequences (rows with a non-empty mask).

    Raises:
        RecipeError: a parameter out of range.
    """
    rewards = inputs.rewards.detach()
    rewards = rewards.masked_fill((rewards < 0) | (rewards > 1), torch.nan)
    labels = masked(rewards, non_empty_rows(inputs.loss_mask)).to(inputs.policy_log_probs.dtype)
    labels = 1 - labels if unlearn else labels
    logits = _implicit_reward(inputs, beta, agg)
    per_sequence = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return _sequence_output(per_sequence, inputs)


def mse_loss(
    inputs: ReplayInputs,
    *,
    beta: float = 1.0,
    agg: SequenceAggregation = "sum",
    unlearn: bool = False,
) -> LossOutput:
    """Regression of the implicit reward on the advantage (this project's reading of ERPD's "MSE-based teacher loss").

    Per sequence: (z - A)^2 with z = beta agg_t l_t. The target is the advantage per sequence; for the centred reward
    compute advantages with kind `group_mean`.

    Args:
        inputs: advantages must be per sequence, [b].
        beta: scale of the implicit reward, > 0.
        agg: `sum` or `mean` of the log-ratio over response tokens.
        unlearn: use -A.

    Returns:
        sum over sequences; count is the number of sequences (rows with a non-empty mask).

    Raises:
        RecipeError: a parameter out of range.
        ErpdError: token advantages.
    """
    _require_sequence_advantages(inputs, "mse")
    targets = _signed(masked(inputs.advantages.detach(), non_empty_rows(inputs.loss_mask)), unlearn)
    per_sequence = (_implicit_reward(inputs, beta, agg) - targets).square()
    return _sequence_output(per_sequence, inputs)


def sft_loss(
    inputs: ReplayInputs,
    *,
    threshold: float = 0.5,
    aggregation: Aggregation = "token_mean",
    unlearn: bool = False,
) -> LossOutput:
    """Imitation of the good rollouts (rejection sampling, a baseline): -log pi_theta where reward > threshold.

    Other rows add nothing to the sum or the count, nor to a KL penalty beside the loss. Unverified rollouts (NaN) are
    never imitated.

    Args:
        inputs: advantages and old_log_probs enter the metrics only (which cover all rows).
        threshold: in units of the reward.
        aggregation: see `per_token.aggregate`, over the imitated rows.
        unlearn: flip the label: imitate the rows with reward <= threshold instead. (This project's choice: raising
            -log pi of good rollouts has no bound, imitating failures does.)
    """
    chosen = inputs.rewards <= threshold if unlearn else inputs.rewards > threshold
    loss_mask = token_mask(inputs.loss_mask) & chosen.unsqueeze(-1)
    per_token = weighted(-masked(inputs.policy_log_probs, loss_mask), inputs)
    loss_sum, count = aggregate(per_token, loss_mask, aggregation)
    return LossOutput(loss_sum, count, ratio_metrics(inputs), loss_mask)


REPLAY_LOSSES: dict[str, Callable[..., LossOutput]] = {
    "ppo": ppo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "ce": ce_loss,
    "mse": mse_loss,
    "sft": sft_loss,
}
"""The losses by their names in a recipe. Their keyword parameters are their settings."""


def _check_clips(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low <= 1:
        raise RecipeError(f"clip_low is a distance below 1 and must lie in [0, 1], not {clip_low}")
    if not clip_high >= 0:
        raise RecipeError(f"clip_high is a distance above 1 and must not be negative, not {clip_high}")


def _require_sequence_advantages(inputs: ReplayInputs, loss: str) -> None:
    if inputs.advantages.dim() != 1:
        raise ErpdError(f"loss {loss} needs advantages per sequence [b]; token advantages go with ppo or sapo")


def _signed(advantages: Tensor, unlearn: bool) -> Tensor:
    return -advantages if unlearn else advantages


def _clipped_surrogate(ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """PPO's objective per token (to be maximised), and where the clip took the gradient away."""
    objective = ratios * advantages
    clipped_objective = ratios.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.minimum(objective, clipped_objective), clipped_objective < objective


def _implicit_reward(inputs: ReplayInputs, beta: float, agg: SequenceAggregation) -> Tensor:
    """[b]: z = beta agg_t l_t; 0 for an empty row."""
    if not beta > 0:
        raise RecipeError(f"beta must be above 0, not {beta}")
    if agg not in ("sum", "mean"):
        raise RecipeError(f"agg {agg!r} is unknown; use sum or mean")
    log_ratios = token_log_ratios(inputs)
    if agg == "sum":
        return beta * sequence_sum(log_ratios, inputs.loss_mask)
    if agg == "mean":
        return beta * sequence_mean(log_ratios, inputs.loss_mask)
    assert_never(agg)


def _token_output(
    per_token: Tensor, inputs: ReplayInputs, aggregation: Aggregation, clipped: Tensor | None = None
) -> LossOutput:
    loss_sum, count = aggregate(weighted(per_token, inputs), inputs.loss_mask, aggregation)
    return LossOutput(loss_sum, count, ratio_metrics(inputs, clipped))


def _sequence_output(per_sequence: Tensor, inputs: ReplayInputs) -> LossOutput:
    if inputs.importance_weights is not None:
        per_sequence = per_sequence * sequence_mean(inputs.importance_weights.detach(), inputs.loss_mask)
    loss_sum, count = sum_rows(per_sequence, inputs.loss_mask)
    return LossOutput(loss_sum, count, ratio_metrics(inputs))
