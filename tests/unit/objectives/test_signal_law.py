"""The compressed law of a signal against the signal itself: K and its derivatives, the KL, and where it is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError
from megatron_erpd.objectives.projection import kl_of_eta, log_partition, solve_eta, solve_eta_bisection
from megatron_erpd.objectives.signal_law import (
    NUM_BINS,
    NUM_MOMENTS,
    SignalLaw,
    law_of_moments,
    signal_moments,
)
from tests.tolerances import FLOAT64, PROJECTION_KL, PROJECTION_KL_FP32, SIGNAL_LAW
from tests.unit.objectives.signal_families import families


def law_of(base: Tensor, signal: Tensor, eta_max: float) -> SignalLaw:
    return law_of_moments(signal_moments(base, signal, eta_max), eta_max)


@pytest.mark.parametrize("eta_max", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.003, 0.05, 0.5, 2.0])
def test_the_budget_is_met_as_by_bisection(delta: float, eta_max: float) -> None:
    bound = 0
    for name, (base, signal) in families().items():
        if eta_max > 1 and name.startswith("offset"):
            continue  # see the test below
        exact = solve_eta_bisection(base, signal, delta, eta_max)
        eta = solve_eta(*law_of(base, signal, eta_max), delta, eta_max)
        binds = exact < eta_max
        assert torch.equal(eta < eta_max, binds), name
        reached = kl_of_eta(base, signal, eta)[binds]
        PROJECTION_KL.assert_close(reached, torch.full_like(reached, delta), name)
        bound += int(binds.sum())
    assert bound > 30


@pytest.mark.parametrize("delta", [0.003, 0.5])
def test_the_budget_is_met_in_fp32(delta: float) -> None:
    for name, (base, signal) in families().items():
        exact = solve_eta_bisection(base, signal, delta, 1.0)
        eta = solve_eta(*law_of(base.float(), signal.float(), 1.0), delta, 1.0).float()
        reached = kl_of_eta(base, signal, eta.double())[exact < 1]
        PROJECTION_KL_FP32.assert_close(reached, torch.full_like(reached, delta), name)


def test_a_bulk_far_from_zero_under_a_large_eta_max() -> None:
    """What the bins are not made for: all of the mass at eta_max s = 90 or more and several nats wide."""
    for name, (base, signal) in families().items():
        if not name.startswith("offset"):
            continue
        for delta in (0.003, 0.05, 0.5, 2.0):
            exact = solve_eta_bisection(base, signal, delta, 3.0)
            eta = solve_eta(*law_of(base, signal, 3.0), delta, 3.0)
            reached = kl_of_eta(base, signal, eta)[exact < 3]
            assert bool(((reached - delta).abs() <= 0.02 * delta).all()), name


def test_the_partition_function() -> None:
    for name, (base, signal) in families().items():
        law = law_of(base, signal, 1.0)
        for eta in (0.0, 0.3, 1.0):
            here, there = log_partition(*law, eta), log_partition(base, signal, eta)
            SIGNAL_LAW.assert_close(here.log_partition, there.log_partition, name)
        # Mean and variance under the base are moments, and those are exact.
        at_base, exact = log_partition(*law, 0.0), log_partition(base, signal, 0.0)
        FLOAT64.assert_close(at_base.mean, exact.mean, name)
        FLOAT64.assert_close(at_base.variance, exact.variance, name)


def test_the_kl_of_a_law_grows_and_is_convex() -> None:
    for base, signal in families().values():
        law = law_of(base, signal, 1.0)
        assert bool((law.log_masses <= 1e-12).all()) and bool(law.values.isfinite().all())
        kl = torch.stack([kl_of_eta(*law, float(eta)) for eta in torch.linspace(0, 1, 40, dtype=torch.float64)])
        assert bool((kl.diff(dim=0) >= -1e-12).all())


@pytest.mark.parametrize("centre", [0.0, 20.0, -55.0])
def test_five_values_in_a_bin_are_exact(centre: float) -> None:
    base = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01], dtype=torch.float64).log()
    signal = centre + torch.tensor([0.0, 0.3, -0.2, 0.55, -0.6], dtype=torch.float64)
    moments = signal_moments(base, signal, 1.0)
    law = law_of_moments(moments, 1.0)
    assert int((moments[0] > 0).sum()) <= 2
    for eta in (0.1, 1.0):
        FLOAT64.assert_close(kl_of_eta(*law, eta), kl_of_eta(base, signal, eta))


def test_one_value_is_exact_wherever_it_is() -> None:
    base = torch.tensor([[-1e-30, -80.0], [-1e-30, -700.0], [math.log(0.5)] * 2], dtype=torch.float64)
    for height in (1e-7, 1.0, 99.9, 1e3, 1e5, -1e5):
        signal = torch.tensor([0.0, height], dtype=torch.float64).expand(3, 2)
        law = law_of(base, signal, 1.0)
        for eta in (1e-3, 1.0):
            FLOAT64.assert_close(log_partition(*law, eta).log_partition, log_partition(base, signal, eta).log_partition)


def test_an_entry_at_the_edge_of_the_middle_bin_counts_once() -> None:
    """Whatever rounding makes of the edge, +-1.5 at eta_max = 1."""
    offsets = torch.arange(-50, 51, dtype=torch.float64) * 2.0**-52
    signal = torch.cat([1.5 + offsets, -1.5 + offsets])
    base = torch.full_like(signal, 1 / len(signal)).log()
    FLOAT64.assert_close(signal_moments(base, signal, 1.0)[0].sum(), 1.0)
    law = law_of(base, signal, 1.0)
    for eta in (0.1, 1.0):
        FLOAT64.assert_close(kl_of_eta(*law, eta), kl_of_eta(base, signal, eta))


def test_the_arguments_stay_as_they_are() -> None:
    base, signal = families()["gaussian 5.0"]
    before = base.clone(), signal.clone()
    signal_moments(base, signal, 2.0)
    assert torch.equal(base, before[0]) and torch.equal(signal, before[1])


def test_moments_add_over_shards_and_have_the_shape_that_is_reduced() -> None:
    base, signal = families()["gaussian 5.0"]
    whole = signal_moments(base, signal, 1.0)
    assert whole.shape == (4, NUM_MOMENTS, NUM_BINS) and whole.dtype == torch.float64
    parts = [signal_moments(base[:, a:b], signal[:, a:b], 1.0) for a, b in ((0, 7), (7, 7), (7, 250), (250, 300))]
    FLOAT64.assert_close(sum(parts), whole)
    assert torch.equal(signal_moments(base.float(), signal.float(), 1.0).sum(-1)[:, 0] > 0.99, torch.ones(4) > 0)


def test_nothing_but_one_token() -> None:
    base = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    law = law_of(base, torch.tensor([-50.0, math.nan], dtype=torch.float64), 1.0)
    assert law.log_masses.exp().sum() == 1
    FLOAT64.assert_close(log_partition(*law, 0.7).log_partition, -35.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_signal_that_is_no_number_is_refused(value: float) -> None:
    base, signal = (x.clone() for x in families()["gaussian 1.0"])
    signal[2, 5] = value
    with pytest.raises(ErpdError, match="NaN or infinity"):
        law_of(base, signal, 1.0)
