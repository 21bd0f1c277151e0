"""The projection: derivatives by finite differences, eta against bisection, the edges, and that it is the optimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives import projection
from megatron_erpd.objectives.projection import (
    kl_of_eta,
    log_partition,
    project,
    project_per_token,
    solve_eta,
    solve_eta_bisection,
)
from tests.tolerances import FINITE_DIFFERENCE, FLOAT64, PROJECTION_KL, PROJECTION_KL_FP32

V = 40
INF = math.inf


def random_rows(num: int = 3, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = (3 * torch.randn(num, V, dtype=torch.float64, generator=generator)).log_softmax(-1)
    return base, scale * torch.randn(num, V, dtype=torch.float64, generator=generator)


def hard_rows() -> tuple[Tensor, Tensor]:
    """Every kind of signal that the solver should survive, with parts of the vocabulary padded in half of the rows."""
    bases, signals = [], []
    for scale in (0.1, 1.0, 5.0, 15.0, 50.0):
        base, signal = random_rows(8, scale, seed=int(scale * 10))
        spike = torch.zeros_like(signal)
        spike[:, 0] = scale
        rare = torch.zeros_like(signal)
        rare[torch.arange(8), base.argmin(-1)] = scale
        bases += [base] * 3
        signals += [signal.clamp(-50, 50), spike, rare]
    base, signal = torch.cat(bases), torch.cat(signals)
    base[::2, -7:] = -INF
    signal[::2, -7:] = math.nan
    return base.log_softmax(-1), signal


def test_partition_by_hand() -> None:
    """Two entries: K = log(1 - p + p e^(eta s)), q = p e^(eta s) / Z."""
    p, s, eta = 0.2, 3.0, 0.7
    base = torch.tensor([1 - p, p], dtype=torch.float64).log()
    signal = torch.tensor([0.0, s], dtype=torch.float64)
    partition = log_partition(base, signal, eta)
    z = 1 - p + p * math.exp(eta * s)
    q = p * math.exp(eta * s) / z
    FLOAT64.assert_close(torch.stack(partition), [math.log(z), q * s, q * (1 - q) * s * s])
    FLOAT64.assert_close(project(base, signal, eta).exp(), [1 - q, q])
    expected_kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    FLOAT64.assert_close(kl_of_eta(base, signal, eta), expected_kl)


def test_derivatives_are_finite_differences() -> None:
    base, signal = random_rows()
    eta, step = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-5
    at, above, below = (log_partition(base, signal, eta + x) for x in (0, step, -step))
    FINITE_DIFFERENCE.assert_close(at.mean, (above.log_partition - below.log_partition) / (2 * step))
    FINITE_DIFFERENCE.assert_close(at.variance, (above.mean - below.mean) / (2 * step))
    slope = (kl_of_eta(base, signal, eta + step) - kl_of_eta(base, signal, eta - step)) / (2 * step)
    FINITE_DIFFERENCE.assert_close(eta * at.variance, slope)


def test_kl_identity() -> None:
    base, signal = random_rows()
    eta = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    q = project(base, signal, eta)
    FLOAT64.assert_close(q.exp().sum(-1), torch.ones(3))
    FLOAT64.assert_close(kl_of_eta(base, signal, eta), (q.exp() * (q - base)).sum(-1))


def test_it_is_the_most_signal_within_the_region() -> None:
    """No random q with at most the same KL has a larger E_q[s]."""
    base, signal = random_rows(1)
    result = project_per_token(base, signal, delta=0.1, eta_max=5.0)
    best = (result.log_probs.exp() * signal).sum()
    generator = torch.Generator().manual_seed(1)
    others = (base + torch.randn(500, V, dtype=torch.float64, generator=generator) * 0.3 + 0.1 * signal).log_softmax(-1)
    inside = (others.exp() * (others - base)).sum(-1) <= 0.1
    assert int(inside.sum()) > 20
    assert bool(((others[inside].exp() * signal).sum(-1) <= best + 1e-6).all())


@pytest.mark.parametrize("delta", [0.003, 0.05, 0.5, 2.0])
def test_the_solver_reaches_delta_as_bisection_does(delta: float) -> None:
    base, signal = hard_rows()
    expected = solve_eta_bisection(base, signal, delta, eta_max=1.0)
    result = project_per_token(base, signal, delta, eta_max=1.0)
    saturated = expected == 1.0
    assert bool(saturated.any()) and not bool(saturated.all())
    assert bool((result.eta[saturated] == 1).all())
    PROJECTION_KL.assert_close(result.kl[~saturated], torch.full_like(expected[~saturated], delta))
    PROJECTION_KL.assert_close(result.eta[~saturated], expected[~saturated])
    assert bool(result.kl.isfinite().all()) and not bool(result.log_probs.isnan().any())
    assert torch.equal(torch.isneginf(result.log_probs), torch.isneginf(base))


@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_the_solver_in_fp32(delta: float) -> None:
    base, signal = hard_rows()
    expected = solve_eta_bisection(base, signal, delta, eta_max=1.0)
    result = project_per_token(base.float(), signal.float(), delta, eta_max=1.0)
    assert result.eta.dtype == torch.float32
    reached = kl_of_eta(base, signal, result.eta.double())
    inside = expected < 1.0
    PROJECTION_KL_FP32.assert_close(reached[inside], torch.full_like(expected[inside], delta))


def test_the_solver_needs_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton steps, not halvings, do the work: about a dozen evaluations for all rows and budgets."""
    base, signal = hard_rows()
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return log_partition(*args)

    monkeypatch.setattr(projection, "log_partition", counted)
    for delta in (0.003, 0.05, 0.5, 2.0):
        calls.clear()
        solve_eta(base, signal, delta, 1.0)
        assert len(calls) <= 30


def test_eta_grows_with_delta() -> None:
    base, signal = hard_rows()
    etas = torch.stack([solve_eta(base, signal, delta, 1.0) for delta in (0.0, 1e-6, 0.003, 0.05, 0.5, 2.0)])
    assert bool((etas.diff(dim=0) >= 0).all()) and bool((etas <= 1).all())


@pytest.mark.parametrize("constant", [0.0, 50.0, -50.0])
def test_a_constant_signal_takes_eta_max_and_changes_nothing(constant: float) -> None:
    base, _ = random_rows()
    signal = torch.full_like(base, constant)
    result = project_per_token(base, signal, delta=0.01, eta_max=1.5)
    assert result.eta.tolist() == [1.5] * 3 == solve_eta_bisection(base, signal, 0.01, 1.5).tolist()
    FLOAT64.assert_close(result.log_probs, base)
    in_fp32 = project_per_token(base.float(), signal.float(), delta=0.01, eta_max=1.5)
    assert in_fp32.eta.tolist() == [1.5] * 3
    # Of order 1e-7 * 75, the rounding of eta s.
    torch.testing.assert_close(in_fp32.log_probs, base.float(), rtol=0, atol=5e-5)


def test_no_region_no_step() -> None:
    base, signal = random_rows()
    result = project_per_token(base, signal, delta=0.0, eta_max=1.0)
    assert result.eta.tolist() == [0, 0, 0] == solve_eta_bisection(base, signal, 0.0, 1.0).tolist()
    FLOAT64.assert_close(result.log_probs, base)
    assert result.kl.tolist() == [0, 0, 0]


def test_a_wide_region_takes_eta_max() -> None:
    base, signal = random_rows()
    delta = float(kl_of_eta(base, signal, 1.0).max()) + 1e-6
    assert project_per_token(base, signal, delta, eta_max=1.0).eta.tolist() == [1, 1, 1]


def test_one_certain_token_stays_certain() -> None:
    base = torch.tensor([0.0, -INF, -INF])
    result = project_per_token(base, torch.tensor([-50.0, 50.0, math.nan]), delta=0.1, eta_max=1.0)
    assert result.log_probs.tolist() == [0, -INF, -INF] and float(result.kl) == 0


def test_extreme_signals_against_a_tiny_probability() -> None:
    base = torch.tensor([-1e-13, -30.0], dtype=torch.float64).log_softmax(-1)
    for sign in (1, -1):
        signal = torch.tensor([-50.0 * sign, 50.0 * sign], dtype=torch.float64)
        expected = solve_eta_bisection(base, signal, 0.5, 1.0)
        result = project_per_token(base, signal, 0.5, 1.0)
        PROJECTION_KL.assert_close(result.eta, expected)


def test_errors() -> None:
    base, signal = random_rows()
    for delta, eta_max, message in ((-0.1, 1.0, "delta"), (math.nan, 1.0, "delta"), (0.1, 0.0, "eta_max")):
        with pytest.raises(RecipeError, match=message):
            solve_eta_bisection(base, signal, delta, eta_max)
        with pytest.raises(RecipeError, match=message):
            solve_eta(base, signal, delta, eta_max)
