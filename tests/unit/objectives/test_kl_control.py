"""The controller against its rule, and on simulated policies: it must bring them to the budget and keep them there."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.kl_control import KlController


def trajectory(
    controller: KlController, num_steps: int, learning_rate: float, noise: float, seed: int = 0
) -> list[float]:
    """KL / budget after every step of a categorical policy: 32 contexts of 8 tokens, trained by Adam on
    advantage - coefficient * KL, with a measurement of the KL that is off by the factor exp(noise * normal)."""
    generator = torch.Generator().manual_seed(seed)
    base = (1.5 * torch.randn(32, 8, generator=generator)).log_softmax(-1)
    advantages = torch.randn(32, 8, generator=generator)
    logits = torch.zeros(32, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=learning_rate, betas=(0.9, 0.95))
    kls = []
    for _ in range(num_steps):
        policy = (base + logits).log_softmax(-1)
        kl = (policy.exp() * (policy - base)).sum(-1).mean()
        gain = (policy.exp() * advantages).sum(-1).mean()
        optimizer.zero_grad()
        (controller.coefficient * kl - gain).backward()
        kls.append(float(kl.detach()))
        controller.update(kls[-1] * math.exp(noise * float(torch.randn((), generator=generator))))
        optimizer.step()
    return [kl / controller.budget for kl in kls]


PLANTS = [(0.01, 0.02), (0.02, 0.05), (0.03, 0.2), (0.06, 0.2)]
"""(learning rate, budget): without a penalty they reach the budget after 10 to 30 steps."""


@pytest.mark.parametrize(("learning_rate", "budget"), PLANTS)
@pytest.mark.parametrize(
    ("initial", "settled"),
    [(0.03, 80), (0.3, 64), (3.0, 64), (30.0, 80)],  # the right coefficients are 0.1 to 2
)
def test_it_reaches_the_budget_and_stays(initial: float, settled: int, learning_rate: float, budget: float) -> None:
    """Within 10%, in means over 8 steps since a measurement is off by 5%: in the second half of 128 steps from within
    a decade of the right coefficient, in the last 48 steps from anywhere."""
    kls = trajectory(KlController(budget, initial, 128), 128, learning_rate, noise=0.05)
    means = [sum(kls[i : i + 8]) / 8 for i in range(settled, 121)]
    assert max(abs(mean - 1) for mean in means) < 0.1, means
    assert max(kls) < 2


def test_a_long_run_with_a_small_learning_rate() -> None:
    kls = trajectory(KlController(0.05, 3.0, 1000), 1000, 0.002, noise=0.05)
    assert max(abs(kl - 1) for kl in kls[660:]) < 0.1
    assert max(kls) < 1.15


def test_updates_by_hand() -> None:
    controller = KlController(budget=0.2, initial_coefficient=0.5)
    assert controller.coefficient == pytest.approx(0.5)  # at the base policy: near = -1, so the integral is log .5 + 2
    # sqrt(.1 / .2) is the distance .7071, smoothed .49497; velocity .8 * .49497; near 2.267 (clipped), far 3.455.
    assert controller.update(0.1) == pytest.approx(math.exp(math.log(0.5) + 2 + 0.4 + 2))
    # Back at 0: distance .14849, velocity -.1980; near -2.237 (clipped), far -2.831.
    assert controller.update(0.0) == pytest.approx(math.exp(math.log(0.5) + 2 + 0.4 - 0.4 - 2))


@pytest.mark.parametrize(
    ("velocity", "top_speed", "expected"),
    [
        (0.02, 0.5, -0.4 * 0.211),  # slow: distance .581, velocity .0208; near -.2734, far -.211: the smaller counts
        (0.15, 0.5, 0.0),  # on its way: velocity .0468; near -.0914, far +.049
        (0.02, 0.02, 0.0),  # slow, but never faster: the learning rate is what holds it back
    ],
)
def test_the_integral_waits_for_a_policy_that_is_on_its_way(velocity: float, top_speed: float, expected: float) -> None:
    controller = KlController(budget=1.0)
    controller.load_state_dict({"integral": 0.3, "distance": 0.56, "velocity": velocity, "top_speed": top_speed})
    controller.update(0.59**2)
    assert controller.integral == pytest.approx(0.3 + expected, abs=1e-3)
    near = controller.distance - 1 + 7 * controller.velocity
    assert controller.coefficient == pytest.approx(math.exp(controller.integral + 2 * near))


def test_a_wild_measurement_moves_the_integral_by_at_most_its_rate() -> None:
    controller = KlController(budget=0.1)
    before = controller.integral
    controller.update(1e9)
    assert controller.integral == pytest.approx(before + 0.4)


def test_bounds_hold_and_stop_the_integral() -> None:
    controller = KlController(0.1, 1.0, min_coefficient=0.5, max_coefficient=2.0)
    assert [controller.update(0.0) for _ in range(40)][-1] == pytest.approx(0.5)
    assert [controller.update(1.0) for _ in range(40)][-1] == pytest.approx(2.0)
    assert min(controller.update(0.0) for _ in range(8)) == pytest.approx(0.5)  # nothing was wound up


@pytest.mark.parametrize("rounding", [-3e-8, -1e-12, 3.6e-10, 5e-9, 1.7e-6, 5e-5])
def test_the_rounding_of_a_kl_of_zero_makes_no_difference(rounding: float) -> None:
    """Of fp32, and of bf16, also while a warm-up keeps the policy at the base."""
    exact, rounded = KlController(1e-3), KlController(1e-3)
    for noise, measured in ((1, 0.0), (2, 0.0), (0.5, 0.0), (0, 0.004), (0, 0.002)):
        exact.update(measured)
        rounded.update(measured + noise * rounding)
    assert rounded.state_dict() | {"rounding": 0.0} == exact.state_dict() | {"rounding": 0.0}


def test_a_policy_that_begins_elsewhere_is_measured_from_the_start() -> None:
    controller = KlController(1e-3)
    controller.update(5e-4)
    assert controller.distance > 0.3
    assert KlController(1e-3).update(5e-4) == controller.coefficient


def test_a_state_without_a_rounding_is_read() -> None:
    controller = KlController(1e-3)
    controller.load_state_dict({"integral": 0.0, "distance": 0.0, "velocity": 0.0, "top_speed": 0.0})
    controller.update(2e-8)
    assert controller.distance > 0


def test_state_continues_bit_for_bit() -> None:
    first, second = KlController(0.1), KlController(0.1, initial_coefficient=7.0)
    for kl in (0.3, 0.07, 0.11):
        first.update(kl)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.update(kl) for kl in (0.2, 0.1)] == [second.update(kl) for kl in (0.2, 0.1)]


def test_a_loaded_coefficient_respects_the_present_bounds() -> None:
    controller = KlController(0.1, max_coefficient=1.0)
    controller.load_state_dict({"integral": math.log(30.0), "distance": 1.0, "velocity": 0.0, "top_speed": 0.0})
    assert controller.coefficient == 1.0


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"coefficient": 0.3},
        {"integral": math.nan, "distance": 1.0, "velocity": 0.0, "top_speed": 0.0},
        {"integral": 0.0, "distance": 1.0, "velocity": 0.0, "top_speed": 0.0, "x": 1.0},
    ],
)
def test_foreign_states_are_refused(state: dict[str, float]) -> None:
    with pytest.raises(ErpdError, match="must hold integral, distance, velocity, top_speed.*delete the stage's folder"):
        KlController(0.1).load_state_dict(state)


def test_a_diverged_policy_is_loud() -> None:
    for measured in (math.nan, math.inf):
        with pytest.raises(ErpdError, match="diverged"):
            KlController(0.1).update(measured)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0.0},
        {"budget": math.inf},
        {"budget": 0.1, "num_steps": 0},
        {"budget": 0.1, "initial_coefficient": 0.0},
        {"budget": 0.1, "min_coefficient": 0.0},
        {"budget": 0.1, "initial_coefficient": 2.0, "max_coefficient": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="KL controller"):
        KlController(**settings)
