"""Log-ratios between the policy in training and the policy that the data come from, and what is reported of them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_erpd.objectives.reduction import aggregate, masked, sequence_sum, sum_rows, token_mask
from megatron_erpd.objectives.types import Metrics, ReplayInputs

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
