"""Divergences between a fixed target and the policy, per token, on whole (dense) rows of the vocabulary.

These are the reference for the vocabulary-parallel versions. Directions are named by what the policy p is to the target
q: `forward_kl` = KL(q || p), `reverse_kl` = KL(p || q), `js` = (KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2.

Log-probs of -inf (padding of the vocabulary, entries of probability 0) are handled exactly: 0 log 0 = 0, and mass where
the other distribution has none makes a KL +inf. Gradients are exact and never NaN where the divergence is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.types import DivergenceKind

LOG_2 = 0.6931471805599453


class TopKTarget(NamedTuple):
    """The largest entries of a distribution and the log of the mass of all others.

    Attributes:
        indices: [..., K] int64 vocabulary ids.
        log_probs: [..., K] nats, of those ids.
        tail_log_prob: [...] nats; -inf when nothing is left.
    """

    indices: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor


def forward_kl(target_log_probs: Tensor, policy_log_probs: Tensor) -> Tensor:
    """KL(target || policy) = sum_v q (log q - log p).

    Args:
        target_log_probs, policy_log_probs: [..., V] nats, normalised. Gradients flow into both.

    Returns:
        [...] nats, >= 0 up to rounding.
    """
    return _kl(target_log_probs, policy_log_probs)


def reverse_kl(target_log_probs: Tensor, policy_log_probs: Tensor) -> Tensor:
    """KL(policy || target) = sum_v p (log p - log q). Shapes and gradients as `forward_kl`."""
    return _kl(policy_log_probs, target_log_probs)


def js(target_log_probs: Tensor, policy_log_probs: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in [0, log 2] nats. Shapes and gradients as `forward_kl`."""
    neither = torch.isneginf(target_log_probs) & torch.isneginf(policy_log_probs)
    # logaddexp of two -inf has a NaN gradient; what stands there doesn't matter because both masses are 0.
    mixture = (
        torch.logaddexp(torch.where(neither, 0.0, target_log_probs), torch.where(neither, 0.0, policy_log_probs))
        - LOG_2
    )
    return (_kl(target_log_probs, mixture) + _kl(policy_log_probs, mixture)) / 2


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """sum exp(left) (left - right) with 0 log 0 = 0."""
    support = ~torch.isneginf(left)
    left = torch.where(support, left, 0.0)
    right = torch.where(support, right, 0.0)
    return torch.where(support, left.exp() * (left - right), 0.0).sum(dim=-1)


DIVERGENCES: dict[DivergenceKind, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
}


def divergence(kind: DivergenceKind, target_log_probs: Tensor, policy_log_probs: Tensor) -> Tensor:
    """[..., V], [..., V] -> [...]: the divergence called `kind`; RecipeError if there is none."""
    if kind not in DIVERGENCES:
        raise RecipeError(f"divergence {kind!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[kind](target_log_probs, policy_log_probs)


def topk_with_tail(log_probs: Tensor, k: int) -> TopKTarget:
    """The K largest entries and the exact log of the remaining mass.

    The tail is a logsumexp of the entries that are left, not log(1 - sum): that would lose all digits once the top K
    hold nearly everything.

    Args:
        log_probs: [..., V] nats.
        k: 1 <= K <= V.
    """
    values, indices = log_probs.topk(k, dim=-1)
    return TopKTarget(indices, values, _log_mass_outside(log_probs, indices))


def topk_divergence(kind: DivergenceKind, target: TopKTarget, policy_log_probs: Tensor) -> Tensor:
    """A divergence between the target and the policy after both were coarse-grained to K entries and one tail bucket.

    The policy's bucket is the exact mass that it gives to all entries outside of the target's top K. Coarse-graining
    can't raise a divergence (data-processing inequality), so each value is at most that of the full vocabulary, and
    equal to it where the tails of both are proportional. For `forward_kl` the lost part is weighted by the target's
    tail mass, which is small by construction; for `reverse_kl` (and half of `js`) it is weighted by the *policy's* tail
    mass, which nothing keeps small: with a fixed top K of the target it is an approximation.

    Args:
        kind: `forward_kl`, `reverse_kl` or `js`.
        target: of fixed log-probs; [..., K] and [...].
        policy_log_probs: [..., V] nats, normalised; gradients flow into it.

    Returns:
        [...] nats.
    """
    policy = policy_log_probs.gather(-1, target.indices)
    tail = _log_mass_outside(policy_log_probs, target.indices)
    return divergence(
        kind,
        torch.cat([target.log_probs, target.tail_log_prob.unsqueeze(-1)], dim=-1),
        torch.cat([policy, tail.unsqueeze(-1)], dim=-1),
    )


def _log_mass_outside(log_probs: Tensor, indices: Tensor) -> Tensor:
    """[..., V], [..., K] -> [...]: log of the mass of all entries but `indices`; -inf (gradient 0) if it is 0."""
    rest = log_probs.scatter(-1, indices, -torch.inf)
    peak = rest.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(torch.isneginf(peak), 0.0, peak)
    mass = (rest - peak).exp().sum(dim=-1)
    empty = mass == 0
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, mass).log() + peak.squeeze(-1))
