"""Strong or weak? What a teacher's reward on held-out prompts says about the signal to distil from it.

The signals are those of ERPD, arXiv 2605.25582; the rule is this project's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError

SELECTION = "selection.json"

STRONG_ABOVE = 2.0
"""A teacher is strong when its reward is above the base's by more than so many standard errors of the difference."""
WORSE_BELOW = -2.0
"""One whose reward is below it by more than so many is worse than the base."""


@dataclass(frozen=True)
class Recommendation:
    """The signal that a teacher's reward recommends, and why, as a sentence."""

    signal: str
    why: str


def recommend_signal(difference: float, standard_error: float, has_unlearned: bool) -> Recommendation:
    """The signal for a teacher with this held-out reward.

    | teacher against base            | with an unlearned policy | without             |
    |---------------------------------|--------------------------|---------------------|
    | better by more than 2 errors    | `strong`                 | `strong`            |
    | neither                         | `unlearned`              | `strong`, a warning |
    | worse by more than 2 errors     | `contrast`               | `strong`, a warning |

    Args:
        difference: mean over prompts of the teacher's reward minus the base's.
        standard_error: of that mean; 0 makes any difference count.
        has_unlearned: whether there is an unlearned policy, which the other two signals need.
    """
    figures = f"the teacher's held-out reward minus the base's is {difference:+.3f} ± {standard_error:.3f}"
    if difference > STRONG_ABOVE * standard_error:
        return Recommendation("strong", f"{figures}: better by more than {STRONG_ABOVE:g} standard errors")
    is_worse = difference < WORSE_BELOW * standard_error
    verdict = f"worse by more than {-WORSE_BELOW:g}" if is_worse else f"within {STRONG_ABOVE:g}"
    why = f"{figures}: {verdict} standard errors"
    if not has_unlearned:
        warning = "warning: the teacher is weak, and only an unlearned policy (section unlearned) would allow another"
        return Recommendation("strong", f"{why}; {warning}")
    return Recommendation("contrast" if is_worse else "unlearned", why)


@dataclass(frozen=True)
class SelectionResult:
    """What a selection found out, as `selection.json` holds it.

    Attributes:
        by: `best_reward` or `last`.
        iteration: the chosen checkpoint's.
        base: the base policy's figures, keys as in `candidates` but `iteration` and `difference`.
        candidates: one mapping per checkpoint: `iteration`, `reward` and `greedy` (mean reward of samples at
            temperature 1, and of the likeliest responses), `difference` (`reward` minus the base's, paired by prompt),
            and of each its standard error over prompts (`..._se`).
        signal, why: the recommendation for the chosen checkpoint.
        num_prompts, num_samples: what it rests on.
    """

    by: str
    iteration: int
    base: dict[str, Any]
    candidates: list[dict[str, Any]]
    signal: str
    why: str
    num_prompts: int
    num_samples: int

    @property
    def chosen(self) -> dict[str, Any]:
        """The figures of the chosen checkpoint."""
        return next(c for c in self.candidates if c["iteration"] == self.iteration)

    def describe(self) -> str:
        """The finding for people."""
        ours, base = self.chosen, self.base
        return (
            f"teacher at iteration {self.iteration}: held-out reward {ours['reward']:.3f} ± {ours['reward_se']:.3f}, "
            f"base {base['reward']:.3f} ± {base['reward_se']:.3f} (greedy {ours['greedy']:.3f} and "
            f"{base['greedy']:.3f}); recommended signal: {self.signal}\n  {self.why}"
        )

    def figures(self) -> dict[str, Any]:
        """For a manifest's summary."""
        return {
            "teacher_iteration": self.iteration,
            "teacher_reward": self.chosen["reward"],
            "base_reward": self.base["reward"],
            "reward_difference": self.chosen["difference"],
            "reward_difference_se": self.chosen["difference_se"],
            "recommended_signal": self.signal,
        }


def read_selection(artifact: Path) -> SelectionResult:
    """The finding in a selection's artifact.

    Raises:
        StageError: there is none, or the file is damaged.
    """
    path = artifact / SELECTION
    try:
        selection = SelectionResult(**json.loads(path.read_text()))
        assert selection.chosen
    except (OSError, json.JSONDecodeError, TypeError, KeyError, StopIteration) as error:
        raise StageError(
            f"{path}: isn't a selection ({error}); give the folder that `megatron-erpd select` wrote"
        ) from None
    return selection
