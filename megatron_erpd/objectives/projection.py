"""Projection of a signal onto a trust region around the base policy (this project's choice (B) of ERPD's second stage).

Among all q with KL(q || pi_0) <= delta, the one with the largest expected signal E_q[s] is an exponential tilt of pi_0:

    q_eta(v) = pi_0(v) exp(eta s(v)) / Z(eta),    K(eta) = log Z(eta) = log E_{pi_0}[exp(eta s)].

K is convex and holds everything needed: K' = E_q[s], K'' = Var_q[s], KL(q_eta || pi_0) = eta K' - K, and
d KL / d eta = eta K'' >= 0. So the KL grows with eta and the wanted eta is the root of a monotone function.

How the root is found without walking the vocabulary, or a collective, at each iteration: the law of s under pi_0 is
compressed to a few hundred atoms per token in one pass (`signal_law`; on shards with one all-reduce), K and its
derivatives are sums over these atoms, and `solve_eta` runs safeguarded Newton steps on them until the KL is delta. The
functions here take rows of a vocabulary and such a law alike. docs/method.md has what the same steps on the vocabulary
itself would cost.

Accuracy, as |KL - delta| / delta where the budget binds, the KL taken on the whole row: rows of 300 and 400 entries;
Gaussian signals of scale .01 to 15, one, several, rare and very rare (e^-80) spikes up to +-100 nats, clusters of
likely and unlikely entries up to 45 nats away from the rest, heavy tails; delta .003 to 2, eta_max .5, 1 and 3.

- float64: 8e-6 at worst. log q is normalised to 3e-6 nats, the KL that is returned is the true one to 3e-5 nats.
- float32 inputs and results: 2e-5 at worst (at delta = .003, from the rounding of a signal of 45 nats); log q is
  normalised to 2e-5 nats.
- The same with the signal of *all* entries moved by up to +-100 nats: 5e-6 up to eta_max = 1. With eta_max = 3, where
  the bulk then lies at eta_max s = 90 to 300, up to .008, and log q is normalised to .003 only.
- `global` (`global_eta`): 8e-5 at worst for data sets of 1 and 4 tokens of one kind. The exception is eta_max = 3 on a
  signal with a spike of 100 nats and the probability e^-80 in every token: .002.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError

SOLVED = 1e-10
"""`solve_eta` ends when every token's KL is within this fraction of delta, far beyond what a law is good for."""

MAX_STEPS = 120
"""Twice the halvings that exhaust a float64: `solve_eta` halves its bracket at least every second step."""


class Partition(NamedTuple):
    """K and its derivatives, each [...]: log_partition = K = log E_{pi_0}[exp(eta s)], mean = K', variance = K''."""

    log_partition: Tensor
    mean: Tensor
    variance: Tensor

    def kl(self, eta: Tensor | float, log_mass: Tensor) -> Tensor:
        """KL(q_eta || pi_0) = eta K' - (K(eta) - K(0)): [...] nats, clamped at 0.

        `log_mass` is K(0), 0 for a normalised pi_0; subtracting it removes the rounding of its normalisation.
        """
        return (eta * self.mean - (self.log_partition - log_mass)).clamp(min=0)


class Projection(NamedTuple):
    """eta [...], log_probs of q_eta [..., V], and forward KL(q_eta || pi_0) [...] in nats."""

    eta: Tensor
    log_probs: Tensor
    kl: Tensor


def tilt(base_log_probs: Tensor, signal: Tensor, eta: Tensor | float) -> Tensor:
    """log pi_0 + eta s, not normalised; -inf stays where pi_0 is 0, whatever the signal holds there.

    Args:
        base_log_probs, signal: [..., V] (or a shard of it).
        eta: [...] or a number.
    """
    support = ~torch.isneginf(base_log_probs)
    factor = eta.unsqueeze(-1) if isinstance(eta, Tensor) else eta
    return torch.where(support, base_log_probs + factor * torch.where(support, signal, 0.0), -torch.inf)


def log_partition(base_log_probs: Tensor, signal: Tensor, eta: Tensor | float) -> Partition:
    """K, K' and K'' at eta.

    Args:
        base_log_probs: [..., V] nats; -inf allowed, with at least one finite entry per row.
        signal: [..., V] nats, finite where base_log_probs is (see `signals.combine`).
        eta: [...] or a number.

    Returns:
        Three tensors [...]. K' and K'' are moments of the normalised q, so also right if pi_0 is not quite normalised.
    """
    tilted = tilt(base_log_probs, signal, eta)
    value = tilted.logsumexp(dim=-1)
    q = (tilted - value.unsqueeze(-1)).exp()
    signal = torch.where(torch.isneginf(base_log_probs), 0.0, signal)
    mean = (q * signal).sum(dim=-1)
    variance = (q * (signal - mean.unsqueeze(-1)).square()).sum(dim=-1)
    return Partition(value, mean, variance)


def project(base_log_probs: Tensor, signal: Tensor, eta: Tensor | float) -> Tensor:
    """log q_eta, normalised: [..., V], -inf exactly where base_log_probs is. Arguments as `log_partition`."""
    return tilt(base_log_probs, signal, eta).log_softmax(dim=-1)


def kl_of_eta(base_log_probs: Tensor, signal: Tensor, eta: Tensor | float) -> Tensor:
    """KL(q_eta || pi_0), [...] nats. Arguments as `log_partition`."""
    return log_partition(base_log_probs, signal, eta).kl(eta, base_log_probs.logsumexp(dim=-1))


def solve_eta_bisection(base_log_probs: Tensor, signal: Tensor, delta: float, eta_max: float) -> Tensor:
    """The largest eta <= eta_max with KL(q_eta || pi_0) <= delta, by bisection on the whole row.

    The reference: about 60 passes over the vocabulary in float64. delta = 0 gives 0, also for a constant signal.

    Args:
        base_log_probs, signal: [..., V], see `log_partition`.
        delta: nats per token, >= 0.
        eta_max: > 0.

    Returns:
        eta [...], float64.
    """
    check_region(delta, eta_max)
    base, signal = base_log_probs.double(), signal.double()
    lower = base.new_zeros(base.shape[:-1])
    if delta == 0:
        return lower
    upper = torch.full_like(lower, eta_max)
    saturated = kl_of_eta(base, signal, upper) <= delta
    for _ in range(60):
        middle = (lower + upper) / 2
        inside = kl_of_eta(base, signal, middle) <= delta
        lower, upper = torch.where(inside, middle, lower), torch.where(inside, upper, middle)
    return torch.where(saturated, eta_max, lower)


def solve_eta(base_log_probs: Tensor, signal: Tensor, delta: float, eta_max: float) -> Tensor:
    """The largest eta <= eta_max with KL(q_eta || pi_0) <= delta, by Newton steps that a bracket guards.

    They solve sqrt(KL) = sqrt(delta), which is nearly linear in eta; a step that leaves the bracket, or that does not
    halve the one before the last, gives way to halving the bracket (as `rtsafe` of Press et al., Numerical Recipes).

    Args:
        base_log_probs, signal: [..., V] as `log_partition`, or the two parts of a `SignalLaw`.
        delta: nats per token, >= 0.
        eta_max: > 0.

    Returns:
        eta [...], float64: exactly 0 for delta = 0, exactly eta_max where the KL at eta_max is within delta (a constant
        signal among them), elsewhere KL = delta to `SOLVED`. No collectives: equal arguments give equal results.

    Raises:
        RecipeError: delta or eta_max out of range.
    """
    check_region(delta, eta_max)
    base, signal = base_log_probs.double(), signal.double()
    lower = base.new_zeros(base.shape[:-1])
    if delta == 0:
        return lower
    log_mass = base.logsumexp(dim=-1)
    upper = torch.full_like(lower, eta_max)
    eta, done = upper, torch.zeros_like(lower, dtype=torch.bool)
    step = before = upper
    for iteration in range(MAX_STEPS):
        partition = log_partition(base, signal, eta)
        kl = partition.kl(eta, log_mass)
        inside = kl <= delta
        # The first eta is eta_max: a token whose KL is within delta there is solved.
        done = done | ((kl - delta).abs() <= SOLVED * delta) | (inside if iteration == 0 else False)
        lower, upper = torch.where(inside, eta, lower), torch.where(inside, upper, eta)
        middle = (lower + upper) / 2
        done = done | (middle <= lower) | (middle >= upper)
        if bool(done.all()):
            break
        root = kl.sqrt()
        slope = (eta * partition.variance).clamp(min=torch.finfo(torch.float64).tiny)
        newton = eta + (math.sqrt(delta) - root) * 2 * root / slope
        good = (newton > lower) & (newton < upper) & ((newton - eta).abs() <= before / 2)
        proposal = torch.where(good, newton, middle)
        before, step = step, (proposal - eta).abs()
        eta = torch.where(done, eta, proposal)
    return eta


def project_per_token(base_log_probs: Tensor, signal: Tensor, delta: float, eta_max: float) -> Projection:
    """The `per_token` projection on dense rows, nothing compressed: each token has its own trust region of delta nats.

    Args:
        base_log_probs, signal: [..., V], see `log_partition`.
        delta: nats per token, >= 0.
        eta_max: > 0; above 1 it spends the region on noise tokens.
    """
    eta = solve_eta(base_log_probs, signal, delta, eta_max).to(base_log_probs.dtype)
    return Projection(eta, project(base_log_probs, signal, eta), kl_of_eta(base_log_probs, signal, eta))


def check_region(delta: float, eta_max: float) -> None:
    """Refuses a delta below 0 and an eta_max that isn't above 0.

    Raises:
        RecipeError: naming the one that is out of range.
    """
    if not (delta >= 0 and math.isfinite(delta)):
        raise RecipeError(f"delta, the KL of the trust region, must be a number of at least 0, not {delta}")
    if not (eta_max > 0 and math.isfinite(eta_max)):
        raise RecipeError(f"eta_max must be a number above 0, not {eta_max}")
