"""Results by section, setting, arm and seed; means over seeds and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
ENOUGH = 3
"""Seeds below which a comparison gets no verdict."""


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, sample standard deviation, and how many seeds."""

    mean: float
    deviation: float
    count: int

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for one seed."""
        return self.deviation / math.sqrt(self.count) if self.count > 1 else math.inf

    def __str__(self) -> str:
        return f"{_short(self.mean)} ± {_short(self.deviation)}" if self.count > 1 else _short(self.mean)


class Results:
    """The rows of `results.json`, found by what they are."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._by_arm: dict[tuple[str, str, str], dict[int, Mapping[str, float]]] = {}
        self._configs: dict[tuple[str, str, str], Mapping[str, Any]] = {}
        for row in self.rows:
            key = (row["section"], row["setting"], row["arm"])
            self._by_arm.setdefault(key, {})[row["seed"]] = row["metrics"]
            self._configs[key] = row["config"]

    def arms(self, section: str, setting: str | None = None) -> list[tuple[str, str]]:
        """(setting, arm) of a section, in the order in which they were made."""
        return [(s, a) for part, s, a in self._by_arm if part == section and setting in (None, s)]

    def of_form(self, signal: str, form: str) -> list[str]:
        """The arms of the signals section with this form of stage 2."""
        arms = [arm for _, arm in self.arms("signals", signal)]
        return [arm for arm in arms if self.config("signals", signal, arm)["form"] == form]

    def config(self, section: str, setting: str, arm: str) -> Mapping[str, Any]:
        return self._configs[(section, setting, arm)]

    def values(self, section: str, setting: str, arm: str, metric: str) -> dict[int, float]:
        """Seed to value."""
        found = self._by_arm.get((section, setting, arm), {})
        return {seed: m[metric] for seed, m in found.items() if m.get(metric) is not None}

    def spread(self, section: str, setting: str, arm: str, metric: str) -> Spread | None:
        values = list(self.values(section, setting, arm, metric).values())
        return spread(values) if values else None

    def seeds(self, section: str) -> list[int]:
        return sorted({row["seed"] for row in self.rows if row["section"] == section})


def spread(values: Sequence[float]) -> Spread:
    array = np.asarray(values, dtype=float)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0, len(array))


def difference(left: Mapping[int, float], right: Mapping[int, float]) -> Spread | None:
    """left - right, seed by seed (the same base, rollouts and held-out samples); None without a common seed."""
    seeds = sorted(left.keys() & right.keys())
    return spread([left[s] - right[s] for s in seeds]) if seeds else None


def verdict(gap: Spread | None) -> str:
    """Whether a paired difference is more than two standard errors from 0."""
    if gap is None:
        return "not run"
    if gap.count < ENOUGH:
        return "too few seeds"
    if gap.mean > 2 * gap.error:
        return "ahead"
    return "behind" if gap.mean < -2 * gap.error else "level"


def signed(gap: Spread | None) -> str:
    """A difference with its standard error."""
    if gap is None:
        return ""
    text = f"{gap.mean:+.3f}".replace("0.", ".", 1)
    return f"{text} (s.e. {_short(gap.error)})" if gap.count > 1 else text


def _short(value: float) -> str:
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"
