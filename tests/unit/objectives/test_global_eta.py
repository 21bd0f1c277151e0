"""One eta for a data set: the mean KL is the budget, for few tokens as for many; the edges; the curve's derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.global_eta import eta_grid, kl_curve, solve_global_eta
from megatron_erpd.objectives.projection import kl_of_eta
from megatron_erpd.objectives.signal_law import law_of_moments, signal_moments
from tests.tolerances import FINITE_DIFFERENCE, FLOAT64, GLOBAL_KL
from tests.unit.objectives.signal_families import families


@pytest.mark.parametrize("delta", [0.003, 0.05, 0.5])
def test_the_mean_budget_is_spent(delta: float) -> None:
    """Over all families together, and over each alone."""
    etas = eta_grid(1.0)
    rows = families()
    curves, solved = [], 0
    for name, (base, signal) in rows.items():
        curve = kl_curve(*law_of_moments(signal_moments(base, signal, 1.0), 1.0), etas) / 4
        curves.append(curve)
        eta = solve_global_eta(etas, curve, delta, 1.0)
        reached = kl_of_eta(base, signal, eta).mean()
        if eta == 1:
            assert float(reached) <= delta
        else:
            GLOBAL_KL.assert_close(reached, delta, name)
            solved += 1
    assert solved > 15
    eta = solve_global_eta(etas, torch.stack(curves).mean(0), delta, 1.0)
    GLOBAL_KL.assert_close(sum(kl_of_eta(b, s, eta).mean() for b, s in rows.values()) / len(rows), delta)


def test_the_curve_and_its_derivatives() -> None:
    base, signal = families()["many spikes"]
    etas, step = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-5
    at, above, below = (kl_curve(base, signal, etas + x) for x in (0, step, -step))
    FLOAT64.assert_close(at[0], torch.stack([kl_of_eta(base, signal, float(eta)).sum() for eta in etas]))
    FINITE_DIFFERENCE.assert_close(at[1], (above[0] - below[0]) / (2 * step))
    FINITE_DIFFERENCE.assert_close(at[2], (above[1] - below[1]) / (2 * step))


def test_a_quintic_is_solved_exactly() -> None:
    etas = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    curve = torch.stack([etas**5 + etas**2, 5 * etas**4 + 2 * etas, 20 * etas**3 + 2])
    for eta in (0.3, 0.7, 1.3):
        FLOAT64.assert_close(solve_global_eta(etas, curve, eta**5 + eta**2, 2.0), eta)


def test_edges() -> None:
    etas = eta_grid(2.0)
    assert float(etas[0]) == 0 and float(etas[-1]) == 2 and bool((etas.diff() > 0).all())
    curve = torch.stack([etas**2, 2 * etas, torch.full_like(etas, 2)])
    assert solve_global_eta(etas, torch.zeros(3, len(etas)), 0.1, 2.0) == 2.0
    assert solve_global_eta(etas, curve, 0.0, 2.0) == 0.0
    assert solve_global_eta(etas, curve, 4.0, 2.0) == 2.0


def test_errors() -> None:
    with pytest.raises(RecipeError, match="eta_max must be a number above 0"):
        eta_grid(0.0)
    etas = eta_grid(1.0)
    for delta, eta_max, message in ((-1.0, 1.0, "delta"), (math.nan, 1.0, "delta"), (0.1, -1.0, "eta_max")):
        with pytest.raises(RecipeError, match=message):
            solve_global_eta(etas, torch.zeros(3, len(etas)), delta, eta_max)
    for grid in ([0.1, 1.0], [0.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.0]):
        with pytest.raises(RecipeError, match="must ascend from 0 to eta_max"):
            solve_global_eta(torch.tensor(grid), torch.zeros(3, len(grid)), 0.1, 1.0)
