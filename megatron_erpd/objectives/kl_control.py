"""A coefficient for the KL penalty that makes the policy meet a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_erpd.errors import ErpdError, RecipeError

# Found by a search on simulated policies (categorical, trained by Adam on exact and on noisy gradients, some 50
# settings of learning rate, budget and first coefficient); neighbours do about as well. Times are in `time_unit`s.
PROPORTIONAL_GAIN = 2.0
"""log(coefficient) per unit of error, at once: the damping."""
INTEGRAL_RATE = 0.4
"""log(coefficient) per unit of error and time: what finds the coefficient, over any number of decades."""
NEAR = 7.0
"""The error is that of the distance this far ahead: Adam's momentum answers a new coefficient about so late."""
FAR = 10.0
"""A policy that gets to the budget within this time, at its present pace, needs no other coefficient."""
FULL_SPEED = 0.75
"""A policy this fast, as a share of the fastest it has been, is held back by the learning rate, not by the penalty."""
ROUNDING = 1e-5
"""A KL below this share of the budget counts as 0, and so does one below `TIMES_FIRST` times the first measurement. At
the first step the policy is the base, and what is measured is rounding: its sign and size depend on the precision, the
layout and the machine (in bf16 1e-6 to 1e-4 nats per token), and any speed is full speed for one at rest."""
TIMES_FIRST = 3.0
LARGEST_ROUNDING = 0.1
"""A first measurement of more than this share of the budget is no rounding: the policy began elsewhere."""
DISTANCE_SMOOTHING = 0.7
"""Share of a new measurement in the smoothed distance, per time unit."""
VELOCITY_SMOOTHING = 0.8
"""Share of a new difference in the smoothed velocity."""
_STATE = ("integral", "distance", "velocity", "top_speed")
STEPS_PER_TIME_UNIT = 100
"""A run of more steps goes the same way more slowly: its time unit is this fraction of it, and at least one step."""


class KlController:
    """PI control of the coefficient of a KL penalty, in log space (this project's choice, for the policy gradient).

    The student maximises its objective subject to KL <= budget. The Lagrangian's multiplier, the penalty's coefficient,
    is unknown over orders of magnitude, and the KL answers it late: through the learning rate and Adam's momentum. With
    the distance x = sqrt(KL / budget), which grows about evenly as the weights move, and its velocity v per step, both
    smoothed exponentially, one update is

        near, far = x - 1 + NEAR v, x - 1 + FAR v
        integral <- integral + INTEGRAL_RATE clip(e, -1, 1),  e = the smaller of near and far
        coefficient = exp(integral + PROPORTIONAL_GAIN clip(near, -1, 1))

    `near` brakes before the budget is crossed. The integral waits (e = 0) where the signs of `near` and `far` differ,
    and below the budget while v is at `FULL_SPEED`: a KL that is on its way, or as fast as the learning rate lets it,
    does not wind the coefficient down (or, from above, up). The bounds of the coefficient stop the integral too.
    Integral alone needs a first coefficient within a factor of about 3, and then swings by half of the budget. Related:
    arXiv 1909.08593, section 2.2 (integral, clipped).

    Plain floats: every rank must pass the same, globally reduced KL and so keeps the same coefficient.
    """

    def __init__(
        self,
        budget: float,
        initial_coefficient: float = 1.0,
        num_steps: int = STEPS_PER_TIME_UNIT,
        min_coefficient: float = 1e-3,
        max_coefficient: float = 1e3,
    ) -> None:
        """Args:
            budget: nats, in the unit of the KL that `update` gets (per token or per sequence), > 0.
            initial_coefficient: while the policy is the base policy, whose KL is 0.
            num_steps: updates that the whole run makes, >= 1: sets the time unit.
            min_coefficient, max_coefficient: 0 < min <= initial <= max.

        Raises:
            RecipeError: a value out of range.
        """
        for name, value in (("budget", budget), ("num_steps", num_steps), ("min_coefficient", min_coefficient)):
            if not (value > 0 and math.isfinite(value)):
                raise RecipeError(f"KL controller: {name} must be a number above 0, not {value}")
        if not min_coefficient <= initial_coefficient <= max_coefficient:
            raise RecipeError(
                f"KL controller: initial_coefficient {initial_coefficient} must lie between min_coefficient "
                f"{min_coefficient} and max_coefficient {max_coefficient}"
            )
        self.budget = budget
        self.time_unit = max(1.0, num_steps / STEPS_PER_TIME_UNIT)
        self.bounds = math.log(min_coefficient), math.log(max_coefficient)
        self.distance, self.velocity, self.top_speed = 0.0, 0.0, 0.0
        self.rounding: float | None = None
        self.integral = math.log(initial_coefficient) - self._proportional()

    @property
    def coefficient(self) -> float:
        low, high = self.bounds
        return math.exp(max(low, min(high, self.integral + self._proportional())))

    def update(self, measured_kl: float) -> float:
        """Take one measurement in nats (a sampled estimate may be slightly negative); returns the new coefficient.

        Raises:
            ErpdError: the measurement is NaN or infinite: the policy has diverged and no coefficient repairs that.
        """
        if not math.isfinite(measured_kl):
            raise ErpdError(
                f"the measured KL is {measured_kl}: the policy has diverged; lower the learning rate or budget"
            )
        before = self.distance
        share = measured_kl / self.budget
        if self.rounding is None:
            self.rounding = max(ROUNDING, TIMES_FIRST * share if share < LARGEST_ROUNDING else 0.0)
        measured = math.sqrt(share) if share > self.rounding else 0.0
        self.distance += DISTANCE_SMOOTHING / self.time_unit * (measured - before)
        self.velocity += VELOCITY_SMOOTHING * (self.distance - before - self.velocity)
        self.top_speed = max(self.top_speed, self.velocity)
        near, far = self._ahead(NEAR), self._ahead(FAR)
        waits = near * far < 0 or (near < 0 and self.velocity > FULL_SPEED * self.top_speed)
        error = 0.0 if waits else min(near, far, key=abs)
        low, high = (bound - self._proportional() for bound in self.bounds)
        integral = self.integral + INTEGRAL_RATE / self.time_unit * _clip(error)
        self.integral = max(low, min(high, integral))
        return self.coefficient

    def _ahead(self, time: float) -> float:
        """The error of the distance in so many time units."""
        return self.distance - 1 + time * self.time_unit * self.velocity

    def _proportional(self) -> float:
        return PROPORTIONAL_GAIN * _clip(self._ahead(NEAR))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep. Settings come from the recipe, which may change them."""
        return {name: getattr(self, name) for name in _STATE} | {"rounding": self.rounding or ROUNDING}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`; a coefficient outside of the present bounds is moved to the nearest bound.

        Raises:
            ErpdError: keys that aren't those of `state_dict` (an earlier version kept the coefficient alone, a later
                one no `rounding`, which is then `ROUNDING`), or a value that isn't a finite number.
        """
        state = {"rounding": ROUNDING, **state}
        if set(state) != set(self.state_dict()) or not all(math.isfinite(value) for value in state.values()):
            raise ErpdError(
                f"the KL controller's state must hold {', '.join(self.state_dict())} as finite numbers, not "
                f"{dict(state)}; if an earlier version wrote it, delete the stage's folder to start it anew"
            )
        self.integral, self.distance = state["integral"], state["distance"]
        self.velocity, self.top_speed, self.rounding = state["velocity"], state["top_speed"], state["rounding"]


def _clip(error: float) -> float:
    return max(-1.0, min(1.0, error))
