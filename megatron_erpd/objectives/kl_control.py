"""A coefficient for the KL penalty that makes the policy meet a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_erpd.errors import ErpdError, RecipeError

MAX_RELATIVE_ERROR = 1.0
"""One update sees the relative error (KL - budget) / budget clipped to this, so that one wild measurement moves the
coefficient by no more than a factor exp(rate). From below the error is at least -1 anyway, up to estimator noise."""


class KlController:
    """Multiplicative dual ascent on the coefficient of a KL penalty (this project's choice, for the policy gradient).

    The student maximises its objective subject to KL <= budget. The Lagrangian's multiplier, the penalty's coefficient,
    grows while the measured KL is above the budget and shrinks while it is below:

        coefficient <- clip(coefficient * exp(rate * clip((KL - budget) / budget, -1, 1)), min, max)

    The bounds keep it able to come back in a few updates after a long time on one side (at the start KL is 0).
    Related to the adaptive coefficient of arXiv 1909.08593, section 2.2. Plain floats: every rank must pass the same,
    globally reduced KL and so keeps the same coefficient.
    """

    def __init__(
        self,
        budget: float,
        initial_coefficient: float = 0.1,
        rate: float = 0.1,
        min_coefficient: float = 1e-3,
        max_coefficient: float = 1e2,
    ) -> None:
        """Args:
            budget: nats, in the unit of the KL that `update` gets (per token or per sequence), > 0.
            initial_coefficient: > 0: a multiplicative rule can't leave 0.
            rate: largest change of log(coefficient) in one update, > 0.
            min_coefficient, max_coefficient: 0 < min <= initial <= max.

        Raises:
            RecipeError: a value out of range.
        """
        for name, value in (("budget", budget), ("rate", rate), ("min_coefficient", min_coefficient)):
            if not (value > 0 and math.isfinite(value)):
                raise RecipeError(f"KL controller: {name} must be a number above 0, not {value}")
        if not min_coefficient <= initial_coefficient <= max_coefficient:
            raise RecipeError(
                f"KL controller: initial_coefficient {initial_coefficient} must lie between min_coefficient "
                f"{min_coefficient} and max_coefficient {max_coefficient}"
            )
        self.budget = budget
        self.rate = rate
        self.min_coefficient = min_coefficient
        self.max_coefficient = max_coefficient
        self.coefficient = initial_coefficient

    def update(self, measured_kl: float) -> float:
        """Take one measurement in nats (a sampled estimate may be slightly negative); returns the new coefficient.

        Raises:
            ErpdError: the measurement is NaN or infinite: the policy has diverged and no coefficient repairs that.
        """
        if not math.isfinite(measured_kl):
            raise ErpdError(
                f"the measured KL is {measured_kl}: the policy has diverged; lower the learning rate or budget"
            )
        error = (measured_kl - self.budget) / self.budget
        error = max(-MAX_RELATIVE_ERROR, min(MAX_RELATIVE_ERROR, error))
        coefficient = self.coefficient * math.exp(self.rate * error)
        self.coefficient = max(self.min_coefficient, min(self.max_coefficient, coefficient))
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep: the coefficient. Settings come from the recipe, which may change them."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`; a coefficient outside of the present bounds is moved to the nearest bound.

        Raises:
            ErpdError: keys that aren't those of `state_dict`, or a coefficient that isn't a number above 0.
        """
        if set(state) != {"coefficient"} or not (math.isfinite(state["coefficient"]) and state["coefficient"] > 0):
            raise ErpdError(f"the KL controller's state must hold one coefficient above 0, not {dict(state)}")
        self.coefficient = max(self.min_coefficient, min(self.max_coefficient, float(state["coefficient"])))
