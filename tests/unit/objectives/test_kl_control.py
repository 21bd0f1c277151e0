"""The controller against its rule, and on simulated policies: it must bring them to the budget and keep them there."""

from __future__ import annotations

import math

import pytest

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.kl_control import KlController


def test_one_update_by_hand() -> None:
    controller = KlController(budget=0.2, initial_coefficient=0.5, rate=0.1)
    assert controller.update(0.25) == pytest.approx(0.5 * math.exp(0.1 * 0.25))
    assert controller.update(0.1) == pytest.approx(0.5 * math.exp(0.1 * (0.25 - 0.5)))


def test_a_wild_measurement_moves_it_by_at_most_the_rate() -> None:
    controller = KlController(budget=0.1, initial_coefficient=1.0, rate=0.2)
    assert controller.update(1e9) == pytest.approx(math.exp(0.2))
    controller = KlController(budget=0.1, initial_coefficient=1.0, rate=0.2)
    assert controller.update(-1e9) == pytest.approx(math.exp(-0.2))


def test_bounds_hold() -> None:
    controller = KlController(0.1, 1.0, rate=0.5, min_coefficient=0.5, max_coefficient=2.0)
    assert [controller.update(0.0) for _ in range(4)][-1] == 0.5
    assert [controller.update(1.0) for _ in range(8)][-1] == 2.0


@pytest.mark.parametrize("budget", [0.05, 0.5])
@pytest.mark.parametrize("initial", [0.002, 50.0])
def test_it_reaches_the_budget(budget: float, initial: float) -> None:
    """A policy with one parameter x: reward x, KL = x^2 / 2, gradient steps on reward - coefficient * KL.

    The optimum of reward subject to KL <= budget has x = sqrt(2 budget) and coefficient 1 / x.
    """
    controller = KlController(budget, initial, rate=0.1)
    x, history = 0.0, []
    for _ in range(1500):
        x += min(0.1, 0.5 / controller.coefficient) * (1 - controller.coefficient * x)
        controller.update(x * x / 2)
        history.append(x * x / 2)
    assert sum(history[-200:]) / 200 == pytest.approx(budget, rel=0.05)
    assert max(history[-200:]) < 1.3 * budget
    assert controller.coefficient == pytest.approx(1 / math.sqrt(2 * budget), rel=0.2)


def test_state_continues() -> None:
    first, second = KlController(0.1), KlController(0.1)
    first.update(0.3)
    second.load_state_dict(first.state_dict())
    assert first.update(0.2) == second.update(0.2)


def test_a_loaded_coefficient_respects_the_present_bounds() -> None:
    controller = KlController(0.1, max_coefficient=1.0)
    controller.load_state_dict({"coefficient": 30.0})
    assert controller.coefficient == 1.0


@pytest.mark.parametrize("state", [{}, {"coefficient": 0.0}, {"coefficient": math.nan}, {"coefficient": 1.0, "x": 1.0}])
def test_foreign_states_are_refused(state: dict[str, float]) -> None:
    with pytest.raises(ErpdError, match="must hold one coefficient"):
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
        {"budget": 0.1, "rate": 0.0},
        {"budget": 0.1, "initial_coefficient": 0.0},
        {"budget": 0.1, "min_coefficient": 0.0},
        {"budget": 0.1, "initial_coefficient": 2.0, "max_coefficient": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="KL controller"):
        KlController(**settings)
