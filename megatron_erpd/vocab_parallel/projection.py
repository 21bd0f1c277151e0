"""The trust-region projection of a base policy along a signal, over a split vocabulary.

The mathematics, and what the names mean, are those of `megatron_erpd.objectives.projection`: per token the base pi_0 is
tilted, q(v) ~ pi_0(v) exp(eta s(v)), as far as KL(q || pi_0) <= delta and eta <= eta_max allow. Finding that eta takes
many evaluations of K(eta) = log E_{pi_0}[exp(eta s)], and over a split vocabulary each would cost collectives. Here K
and K' are tabulated at a grid of eta in one pass and two collectives of a few numbers per token; the root of the
interpolated table is found without any, identically on every rank, and a fixed number of exact Newton steps polishes
it.

Everything is computed without gradient: base and signal are fixed in stage 2. Where the base's log-probability is
-inf, q is 0 and the signal isn't looked at; elsewhere the signal must be finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_erpd.objectives.projection import (
    DEFAULT_NEWTON_STEPS,
    DEFAULT_NUM_ETAS,
    Partition,
    Projection,
    eta_grid,
    solve_eta,
)
from megatron_erpd.vocab_parallel.log_probs import log_softmax_of, normalizer
from megatron_erpd.vocab_parallel.shard import VocabShard


@torch.no_grad()
def partition_table(
    base_log_probs: Tensor, signal: Tensor, etas: Tensor | Sequence[float], shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """K(eta) and K'(eta) = E_{q_eta}[s] per token at every value of the grid.

    Args:
        base_log_probs, signal: [..., v/tp] nats; padding columns don't matter.
        etas: [J] values, any order.

    Returns:
        K, K': `[..., J]` float32 (float64 for a float64 base), the same on every rank. K is the log of the sum as it
        is: K(0) is 0 up to the rounding of the base's own normalisation.
        Collectives: one MAX of `[..., J]` and one packed SUM of `[..., 2, J]`, whatever J is.
    """
    base, signal = _values(base_log_probs, signal, shard)
    maxima, sums, moments = [], [], []
    for eta in etas.tolist() if isinstance(etas, Tensor) else etas:
        exponents = base + eta * signal
        maximum = shard.local_max(exponents)
        weights = exponents.sub_(maximum.unsqueeze(-1)).exp_()
        maxima.append(maximum)
        sums.append(weights.sum(dim=-1))
        moments.append(weights.mul_(signal).sum(dim=-1))
    local_maximum = torch.stack(maxima, dim=-1)
    partial = torch.stack([torch.stack(sums, dim=-1), torch.stack(moments, dim=-1)], dim=-2)
    maximum = shard.all_reduce_max(local_maximum.clone())
    # The sums were taken below each rank's own maximum; bring them below the common one before they are added.
    totals = shard.all_reduce_sum(partial * (local_maximum - maximum).exp().unsqueeze(-2))
    total, moment = totals[..., 0, :], totals[..., 1, :]
    return maximum + total.log(), moment / total


@torch.no_grad()
def apply_eta(base_log_probs: Tensor, signal: Tensor, eta: Tensor | float, shard: VocabShard) -> Tensor:
    """log q_eta of this rank's columns, `[..., v/tp]`, normalised over the whole vocabulary; padding columns are -inf.

    Args:
        base_log_probs, signal: [..., v/tp] nats.
        eta: [...] per token, or one number for all.

    Returns:
        float32 (float64 for a float64 base). Collectives: one MAX and one SUM of `[...]`.
    """
    base, signal = _values(base_log_probs, signal, shard)
    step = eta.to(base.dtype).unsqueeze(-1) if isinstance(eta, Tensor) and eta.dim() else eta
    exponents = base + step * signal
    log_probs = log_softmax_of(exponents, *normalizer(exponents, shard))
    return shard.with_padding(log_probs, like=log_probs, fill=-torch.inf)


@torch.no_grad()
def kl_from_base(log_probs: Tensor, base_log_probs: Tensor, shard: VocabShard) -> Tensor:
    """KL(q || pi_0) in nats, `[...]`, of a normalised q given as `log_probs [..., v/tp]`; one SUM of `[...]`."""
    log_q, base = shard.values(log_probs), shard.values(base_log_probs)
    probs = log_q.exp()
    return shard.all_reduce_sum((log_q - base).mul_(probs).masked_fill_(probs == 0, 0.0).sum(dim=-1))


@torch.no_grad()
def project_shard(
    base_log_probs: Tensor,
    signal: Tensor,
    shard: VocabShard,
    delta: float,
    eta_max: float,
    num_etas: int = DEFAULT_NUM_ETAS,
    num_steps: int = DEFAULT_NEWTON_STEPS,
) -> Projection:
    """The `per_token` projection of this rank's columns.

    The KL meets `delta` as closely as `objectives.projection` states for `num_etas` and `num_steps`; the returned
    log-probabilities are normalised and the returned KL is measured for the eta chosen, both exactly.

    Args:
        base_log_probs, signal: [..., v/tp] nats; padding columns don't matter.
        delta: the trust region in nats per token.
        eta_max: the largest step.
        num_etas: size of the table; one pass over the columns each.
        num_steps: Newton steps; one pass over the columns each. With 0 the table's answer is taken.

    Returns:
        eta `[...]` and KL(q || pi_0) `[...]`, the same on every rank, and log q `[..., v/tp]`, -inf in padding columns.
        Collectives: two MAX and three SUM, and one MAX and one SUM of `[..., 3]` per Newton step: a number that doesn't
        depend on the data, of a few numbers per token each.

    Raises:
        RecipeError: delta, eta_max or num_etas out of range.
    """
    etas = eta_grid(eta_max, num_etas).to(base_log_probs.device)
    log_partitions, means = partition_table(base_log_probs, signal, etas, shard)
    values = _values(base_log_probs, signal, shard)
    eta = solve_eta(
        lambda step: _partition_at(*values, step, shard), etas, log_partitions, means, delta, eta_max, num_steps
    )
    log_probs = apply_eta(base_log_probs, signal, eta, shard)
    # K(0) is 0 for a normalised base; adding it takes the base's own rounding out of the divergence.
    kl = kl_from_base(log_probs, base_log_probs, shard) + log_partitions[..., 0]
    return Projection(eta, log_probs, kl.clamp_min_(0.0))


def _partition_at(base: Tensor, signal: Tensor, eta: Tensor, shard: VocabShard) -> Partition:
    """K, K' and K'' at one eta per token, `[...]` each; one MAX and one SUM of `[..., 3]`."""
    exponents = base + eta.unsqueeze(-1) * signal
    maximum = shard.all_reduce_max(shard.local_max(exponents))
    weights = exponents.sub_(maximum.unsqueeze(-1)).exp_()
    first = weights * signal
    sums = [weights.sum(dim=-1), first.sum(dim=-1), first.mul_(signal).sum(dim=-1)]
    total, moment, square = shard.all_reduce_sum(torch.stack(sums, dim=-1)).unbind(dim=-1)
    mean = moment / total
    return Partition(maximum + total.log(), mean, (square / total - mean.square()).clamp_min_(0.0))


def _values(base_log_probs: Tensor, signal: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The valid columns of both in one type, the signal 0 where the base excludes the token."""
    base = shard.values(base_log_probs)
    values = shard.values(signal).to(base.dtype)
    return base, values.masked_fill(base == -torch.inf, 0.0)
