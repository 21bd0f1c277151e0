"""The `global` projection: one eta for a data set, such that the mean KL over its response tokens is delta.

It is the optimum of max mean E_q[s] subject to mean KL(q || pi_0) <= delta. K differs from token to token, and a mean
of K is no K of a mean law, so what adds up over tokens, batches and ranks is a curve: the KL and its first two
derivatives in eta at `NUM_ETAS` fixed values. Between two of them the curve is the quintic with these values and
derivatives at both ends (Hermite), whose root is found by bisection.

*Accuracy*: see `projection`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.projection import check_region, log_partition

NUM_ETAS = 129
"""Enough that the curve of a single token with a spike of 50 nats is a quintic between two points."""

GRID_POWER = 1.5
"""Points are eta_max (j / (NUM_ETAS - 1))^1.5: denser near 0, where strong signals have their root."""

BISECTION_STEPS = 60
"""Halvings of an interval: enough to exhaust a float64."""


def eta_grid(eta_max: float) -> Tensor:
    """[NUM_ETAS] float64, from exactly 0 to exactly eta_max.

    Raises:
        RecipeError: eta_max isn't above 0.
    """
    check_region(0.0, eta_max)
    return eta_max * torch.linspace(0, 1, NUM_ETAS, dtype=torch.float64) ** GRID_POWER


def kl_curve(base_log_probs: Tensor, signal: Tensor, etas: Tensor) -> Tensor:
    """KL(q_eta || pi_0), its first and its second derivative in eta, summed over tokens: [3, J] float64.

    Args:
        base_log_probs, signal: [..., V] as `projection.log_partition`, or the two parts of a `SignalLaw`.
        etas: [J].
    """
    base, signal = base_log_probs.double(), signal.double()
    support = ~torch.isneginf(base)
    log_mass = base.logsumexp(dim=-1)
    columns = []
    for eta in etas.tolist():
        partition = log_partition(base, signal, eta)
        value, mean, variance = partition
        q = torch.where(support, base + eta * signal - value.unsqueeze(-1), -torch.inf).exp()
        third = (q * torch.where(support, signal - mean.unsqueeze(-1), 0.0).pow(3)).sum(dim=-1)
        kl = partition.kl(eta, log_mass)
        columns.append(torch.stack([kl.sum(), (eta * variance).sum(), (variance + eta * third).sum()]))
    return torch.stack(columns, dim=-1)


def solve_global_eta(etas: Tensor, curve: Tensor, delta: float, eta_max: float) -> float:
    """The eta at which the mean KL is delta.

    Args:
        etas: [J] ascending, first 0, last eta_max (see `eta_grid`).
        curve: [3, J] mean over the response tokens of all ranks of what `kl_curve` sums.
        delta: nats per token on average, >= 0.
        eta_max: > 0.

    Returns:
        eta: 0 for delta = 0, eta_max where the mean KL never exceeds delta.

    Raises:
        RecipeError: delta or eta_max out of range, or a grid that does not span [0, eta_max].
    """
    check_region(delta, eta_max)
    etas, curve = etas.detach().double().cpu(), curve.detach().double().cpu()
    if len(etas) < 2 or float(etas[0]) != 0 or float(etas[-1]) != eta_max or bool((etas.diff() <= 0).any()):
        raise RecipeError(f"the grid of eta must ascend from 0 to eta_max = {eta_max}; use global_eta.eta_grid")
    if delta == 0:
        return 0.0
    if float(curve[0, -1]) <= delta:
        return float(eta_max)
    index = int((curve[0].cummax(dim=0).values <= delta).sum()) - 1
    width = float(etas[index + 1] - etas[index])
    # Derivatives by t, the fraction of the interval.
    scales = torch.tensor([1.0, width, width**2], dtype=torch.float64)
    left, right = ((curve[:, index + side] * scales).tolist() for side in (0, 1))
    lower, upper = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if _quintic(middle, left, right) <= delta else (lower, middle)
    return float(etas[index]) + lower * width


def _quintic(t: float, left: list[float], right: list[float]) -> float:
    """At t in [0, 1], the polynomial with this value, slope and second derivative at 0 and at 1."""
    (f, d, c), (g, e, b) = left, right
    rise = g - f - d - c / 2
    bend, turn = e - d - c, b - c
    cubic = 10 * rise - 4 * bend + turn / 2
    quartic = -15 * rise + 7 * bend - turn
    quintic = 6 * rise - 3 * bend + turn / 2
    return f + t * (d + t * (c / 2 + t * (cubic + t * (quartic + t * quintic))))
