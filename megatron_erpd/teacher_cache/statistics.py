"""Sums that describe a column, added up over parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass
class Statistic:
    """Mean, minimum and maximum of what was added, in float64."""

    total: float = 0.0
    count: int = 0
    min: float = np.inf
    max: float = -np.inf

    def add(self, values: np.ndarray) -> None:
        """Adds the values of an array that isn't empty."""
        self.merge(
            Statistic(float(values.sum(dtype=np.float64)), values.size, float(values.min()), float(values.max()))
        )

    def merge(self, other: Statistic) -> None:
        """Adds what another one has seen."""
        self.total += other.total
        self.count += other.count
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def summary(self) -> dict[str, float]:
        return {"mean": self.total / self.count, "min": self.min, "max": self.max}

    @classmethod
    def from_json(cls, values: Mapping[str, float]) -> Statistic:
        """The inverse of `asdict`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        if int(values["count"]) < 1:
            raise ValueError(f"count {values['count']}")
        return cls(float(values["total"]), int(values["count"]), float(values["min"]), float(values["max"]))
