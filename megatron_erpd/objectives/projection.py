"""Projection of a signal onto a trust region around the base policy (this project's choice (B) of ERPD's second stage).

Among all q with KL(q || pi_0) <= delta, the one with the largest expected signal E_q[s] is an exponential tilt of pi_0:

    q_eta(v) = pi_0(v) exp(eta s(v)) / Z(eta),    K(eta) = log Z(eta) = log E_{pi_0}[exp(eta s)].

K is convex and holds everything needed: K' = E_q[s], K'' = Var_q[s], KL(q_eta || pi_0) = eta K' - K, and
d KL / d eta = eta K'' >= 0. So the KL grows with eta and the wanted eta is the root of a monotone function.

How the root is found without walking the vocabulary at each iteration, and without a collective at each iteration:

1. K and K' at a fixed grid of J values of eta: 2 J sums over the vocabulary, on shards one packed all-reduce.
2. The grid interval that holds the root; inside it K is interpolated by the cubic with the exact values and slopes at
   both ends (Hermite), whose KL is matched to delta by bisection: cheap arithmetic on [tokens].
3. A few (default 3) Newton steps, each from exact K, K', K'' at one eta per token (3 sums, a small all-reduce). They
   solve sqrt(KL) = sqrt(delta), which is nearly linear in eta, and fall back to halving the bracket.

Accuracy, as |KL - delta| / delta over 2,400 rows of 50 entries with Gaussian, one-spike and rare-spike signals up to
+-50 nats (and beyond), delta from .003 to 2, eta_max 1, grid of 16: after the table alone up to 4 and above .001 for
half of the rows (a spike turns K' within a fraction of an interval); after 1, 2, 3 steps up to .6, .05 and 5e-4. So 16
and 3 are the defaults; a grid of 24 with two steps gives .002. All solving is in float64, whatever the dtype of the
sums; sums in fp32 add an absolute error of about 1e-7 max|K| to the KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError

DEFAULT_NUM_ETAS = 16
DEFAULT_NEWTON_STEPS = 3

GRID_POWER = 1.5
"""Grid points are eta_max (j / (J - 1))^1.5: denser near 0, where strong signals have their root, yet not so that the
steps near eta_max, where weak ones have it, grow wide. Measured against 2 and 3."""

SOLVED = 1e-5
"""A token whose KL is within this fraction of delta is left alone: fp32 sums can't tell a better eta."""

BISECTION_STEPS = 48
"""Halvings of an interval on interpolants: enough to exhaust the digits of a float64 that matter."""


class Partition(NamedTuple):
    """K and its derivatives, each [...]: log_partition = K = log E_{pi_0}[exp(eta s)], mean = K', variance = K''."""

    log_partition: Tensor
    mean: Tensor
    variance: Tensor


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
    """KL(q_eta || pi_0) = eta K' - (K(eta) - K(0)): [...] nats, clamped at 0. Arguments as `log_partition`.

    K(0) is 0 for a normalised pi_0; subtracting it removes the rounding of its normalisation.
    """
    partition = log_partition(base_log_probs, signal, eta)
    return _kl(eta, partition.log_partition, partition.mean, base_log_probs.logsumexp(dim=-1)).clamp(min=0)


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
    _check_region(delta, eta_max)
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


def eta_grid(eta_max: float, num_etas: int = DEFAULT_NUM_ETAS) -> Tensor:
    """[J] float64: the grid of `solve_eta_from_table`, from exactly 0 to exactly eta_max (see `GRID_POWER`)."""
    if not (eta_max > 0 and math.isfinite(eta_max)):
        raise RecipeError(f"eta_max must be a number above 0, not {eta_max}")
    if num_etas < 2:
        raise RecipeError(f"a grid of eta needs at least 2 values, not {num_etas}")
    return eta_max * torch.linspace(0, 1, num_etas, dtype=torch.float64) ** GRID_POWER


def solve_eta_from_table(etas: Tensor, log_partitions: Tensor, means: Tensor, delta: float, eta_max: float) -> Tensor:
    """Steps 1 and 2 of the module: eta per token from K and K' on a grid.

    The largest eta <= eta_max with KL <= delta, up to the interpolation's error (see the module); exactly 0 for
    delta = 0, exactly eta_max where the KL at eta_max is within delta (a constant signal among them).

    Args:
        etas: [J] ascending, first 0, last eta_max (see `eta_grid`).
        log_partitions: [..., J], K at each eta.
        means: [..., J], K' at each eta.
        delta: nats per token, >= 0.
        eta_max: > 0.

    Returns:
        eta [...] of the dtype of `log_partitions`. No collectives: equal tables give equal results on every rank.

    Raises:
        RecipeError: delta or eta_max out of range, or a grid that does not span [0, eta_max].
    """
    eta, _, _ = _start(etas, log_partitions, means, delta, eta_max)
    return eta.to(log_partitions.dtype)


def solve_eta(
    partition_at: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    etas: Tensor,
    log_partitions: Tensor,
    means: Tensor,
    delta: float,
    eta_max: float,
    num_steps: int = DEFAULT_NEWTON_STEPS,
) -> Tensor:
    """`solve_eta_from_table`, then `num_steps` safeguarded Newton steps on exact derivatives.

    Args:
        partition_at: eta [...] -> (K, K', K'') [...] at that eta: `log_partition` on dense rows, or a function that
            adds up shards with one packed all-reduce. Called `num_steps` times on every rank, whatever the data. K''
            only steers the step: an inexact one costs accuracy, never the bracket.
        etas, log_partitions, means, delta, eta_max: as `solve_eta_from_table`.
        num_steps: Newton steps; 0 gives the table's answer.

    Returns:
        eta [...] of the dtype of `log_partitions`.
    """
    dtype = log_partitions.dtype
    eta, lower, upper = _start(etas, log_partitions, means, delta, eta_max)
    normaliser = log_partitions[..., 0].double()
    for _ in range(num_steps if delta > 0 else 0):
        value, mean, variance = (item.double() for item in partition_at(eta.to(dtype)))
        kl = _kl(eta, value, mean, normaliser).clamp(min=0)
        solved = ((kl - delta).abs() <= SOLVED * delta) | (lower >= upper)
        inside = kl <= delta
        lower, upper = torch.where(inside, eta, lower), torch.where(inside, upper, eta)
        root = kl.sqrt()
        slope = (eta * variance).clamp(min=torch.finfo(torch.float64).tiny)
        newton = eta + (math.sqrt(delta) - root) * 2 * root / slope
        newton = torch.where((newton > lower) & (newton < upper), newton, (lower + upper) / 2)
        eta = torch.where(solved, eta, newton)
    return eta.to(dtype)


def project_per_token(
    base_log_probs: Tensor,
    signal: Tensor,
    delta: float,
    eta_max: float,
    num_etas: int = DEFAULT_NUM_ETAS,
    num_steps: int = DEFAULT_NEWTON_STEPS,
) -> Projection:
    """The `per_token` projection on dense rows: each token has its own trust region of delta nats.

    Args:
        base_log_probs, signal: [..., V], see `log_partition`.
        delta: nats per token, >= 0.
        eta_max: > 0; above 1 it spends the region on noise tokens.
        num_etas, num_steps: size of the grid, Newton steps.
    """
    etas = eta_grid(eta_max, num_etas)
    table = [log_partition(base_log_probs, signal, float(eta)) for eta in etas]
    eta = solve_eta(
        lambda x: log_partition(base_log_probs, signal, x),
        etas.to(base_log_probs.device),
        torch.stack([entry.log_partition for entry in table], dim=-1),
        torch.stack([entry.mean for entry in table], dim=-1),
        delta,
        eta_max,
        num_steps,
    )
    return Projection(eta, project(base_log_probs, signal, eta), kl_of_eta(base_log_probs, signal, eta))


def solve_global_eta(
    etas: Tensor, mean_kl: Tensor, delta: float, eta_max: float, mean_kl_slope: Tensor | None = None
) -> float:
    """The `global` projection: one eta for a data set, with mean KL over its response tokens equal to delta.

    sqrt(mean KL), nearly linear in eta, is interpolated by a monotone cubic (Fritsch and Carlson, 1980). Averages over
    tokens are smooth: 16 points reach delta to about 2e-4 of it (to .02 at worst, measured on 120 rows with spikes up
    to 50 nats; slopes give another factor of ten). For more, evaluate at the answer, add that point to etas and mean_kl
    (any ascending grid will do) and solve again. Per-token caps are the caller's: mean_kl may be that of min(eta,
    cap_t), without slopes.

    Args:
        etas: [J] ascending, first 0, last eta_max.
        mean_kl: [J] nats, mean over the response tokens of all ranks of KL(q_eta || pi_0) = eta mean(K') - mean(K).
        delta: nats per token on average, >= 0.
        eta_max: > 0.
        mean_kl_slope: [J] d mean_kl / d eta = eta mean(K''), or None to estimate it from the neighbours.

    Returns:
        eta: 0 for delta = 0, eta_max where the mean KL never exceeds delta.
    """
    _check_region(delta, eta_max)
    points = etas.detach().double().cpu()
    _check_grid(points, eta_max)
    kl = mean_kl.detach().double().cpu().clamp(min=0).cummax(dim=0).values
    if delta == 0:
        return 0.0
    if float(kl[-1]) <= delta:
        return float(eta_max)
    root = kl.sqrt()
    slopes = _monotone_slopes(points, root, None if mean_kl_slope is None else mean_kl_slope.detach().double().cpu())
    index = int((kl <= delta).sum()) - 1
    width = points[index + 1] - points[index]
    lower, upper = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (lower + upper) / 2
        value, _ = _hermite(
            torch.tensor(middle, dtype=torch.float64),
            width,
            (root[index], root[index + 1]),
            (slopes[index], slopes[index + 1]),
        )
        lower, upper = (middle, upper) if float(value) <= math.sqrt(delta) else (lower, middle)
    return float(points[index] + lower * width)


def _kl(eta: Tensor | float, value: Tensor, mean: Tensor, normaliser: Tensor) -> Tensor:
    return eta * mean - (value - normaliser)


def _check_region(delta: float, eta_max: float) -> None:
    if not (delta >= 0 and math.isfinite(delta)):
        raise RecipeError(f"delta, the KL of the trust region, must be a number of at least 0, not {delta}")
    if not (eta_max > 0 and math.isfinite(eta_max)):
        raise RecipeError(f"eta_max must be a number above 0, not {eta_max}")


def _check_grid(etas: Tensor, eta_max: float) -> None:
    spans = etas.dim() == 1 and len(etas) >= 2 and float(etas[0]) == 0 and math.isclose(float(etas[-1]), eta_max)
    if not spans or bool((etas.diff() <= 0).any()):
        raise RecipeError(f"the grid of eta must ascend from 0 to eta_max = {eta_max}; use projection.eta_grid")


def _start(
    etas: Tensor, log_partitions: Tensor, means: Tensor, delta: float, eta_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(eta, lower, upper), each [...] float64: the table's answer and the grid interval that holds the root.

    Where the root is known exactly (0 or eta_max) all three are equal.
    """
    _check_region(delta, eta_max)
    _check_grid(etas, eta_max)
    etas = etas.to(device=log_partitions.device, dtype=torch.float64)
    values, means = log_partitions.double(), means.double()
    kl = _kl(etas, values, means, values[..., :1]).cummax(dim=-1).values
    last = etas.shape[0] - 1
    index = ((kl <= delta).sum(dim=-1) - 1).clamp(min=0)
    saturated = index == last
    index = index.clamp(max=last - 1)
    if delta == 0:
        zero = torch.zeros_like(values[..., 0])
        return zero, zero, zero

    def at(table: Tensor, offset: int) -> Tensor:
        return table.gather(-1, (index + offset).unsqueeze(-1)).squeeze(-1)

    lower, upper = etas[index], etas[index + 1]
    normaliser = values[..., 0]
    ends = (at(values, 0), at(values, 1))
    end_means = (at(means, 0), at(means, 1))
    low, high = torch.zeros_like(lower), torch.ones_like(lower)
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        value, mean = _hermite(middle, upper - lower, ends, end_means)
        inside = _kl(lower + middle * (upper - lower), value, mean, normaliser) <= delta
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    eta = lower + low * (upper - lower)
    return tuple(torch.where(saturated, etas[-1], item) for item in (eta, lower, upper))  # type: ignore[return-value]


def _hermite(
    t: Tensor, width: Tensor, values: tuple[Tensor, Tensor], slopes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Value and slope, at the fraction t of an interval, of the cubic with these values and slopes at its ends."""
    rise = (values[1] - values[0]) / width
    # Newton's form around the left end: f = f0 + x (d0 + x (c2 + x c3)), with x = t * width folded into t.
    quadratic = 3 * rise - 2 * slopes[0] - slopes[1]
    cubic = slopes[0] + slopes[1] - 2 * rise
    value = values[0] + width * t * (slopes[0] + t * (quadratic + t * cubic))
    return value, slopes[0] + t * (2 * quadratic + 3 * t * cubic)


def _monotone_slopes(points: Tensor, root: Tensor, kl_slope: Tensor | None) -> Tensor:
    """Slopes of sqrt(KL) at the grid points, limited so that the cubic between two points is monotone."""
    chords = root.diff() / points.diff()
    slopes = torch.empty_like(root)
    slopes[1:-1] = (chords[1:] + chords[:-1]) / 2
    slopes[-1] = chords[-1]
    if kl_slope is not None:
        positive = root > 0
        slopes = torch.where(positive, kl_slope / (2 * torch.where(positive, root, 1.0)), slopes)
    # At 0 KL and its slope are 0 and don't give the slope of the root; a parabola in the first interval does.
    slopes[0] = (3 * chords[0] - slopes[1]) / 2
    # Three times the smaller chord beside a point is the limit within which the cubic can't overshoot.
    left = torch.cat([chords[:1], chords])
    right = torch.cat([chords, chords[-1:]])
    return torch.minimum(slopes.clamp(min=0), 3 * torch.minimum(left, right))
