"""Statistics of values that come in pieces and are not kept."""

from __future__ import annotations

import numpy as np


class Moments:
    """Number, means and co-moments of several variables, merged piece by piece (Chan, Golub, LeVeque 1979).

    No sum of squares of raw values is formed, so that a small spread about a large mean keeps its digits.

    Attributes:
        count: observations.
        mean: float64 `[k]`.
        products: float64 `[k, k]`, sums of the products of the deviations from the means.
    """

    def __init__(self, num_variables: int) -> None:
        self.count = 0
        self.mean = np.zeros(num_variables)
        self.products = np.zeros((num_variables, num_variables))

    def add(self, values: np.ndarray) -> None:
        """Takes float64 `[k, n]`, n observations of every variable."""
        n = values.shape[1]
        if n == 0:
            return
        mean = values.mean(axis=1)
        deviations = values - mean[:, None]
        shift, total = mean - self.mean, self.count + n
        self.products += deviations @ deviations.T + np.outer(shift, shift) * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def std(self, i: int) -> float:
        """Standard deviation of the observations themselves (divided by their number)."""
        return float(np.sqrt(self.products[i, i] / self.count))

    def correlation(self, i: int, j: int) -> float | None:
        """Pearson's; None where one of the variables never changes."""
        spread = float(np.sqrt(self.products[i, i] * self.products[j, j]))
        return float(np.clip(self.products[i, j] / spread, -1.0, 1.0)) if spread > 0 else None


class LogHistogram:
    """Percentiles of non-negative values, from counts on a fixed grid.

    The grid has 1,000 bins per decade from 1e-8 to 1e4: a percentile is off by at most 0.12% of its value. What is
    below the grid counts as 0; what is above it, as its end. 96 kB, however many values there are.
    """

    _LOWEST, _DECADES, _PER_DECADE = -8, 12, 1000

    def __init__(self) -> None:
        self._counts = np.zeros(self._DECADES * self._PER_DECADE + 1, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Takes float64 `[n]`, finite and at least 0."""
        with np.errstate(divide="ignore"):
            place = (np.log10(values) - self._LOWEST) * self._PER_DECADE
        # Bin 0 is for what is below the grid.
        bins = np.clip(np.floor(place) + 1, 0, len(self._counts) - 1).astype(np.int64)
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def percentile(self, percent: float) -> float:
        """The middle of the bin with the smallest value that at least so many percent of the values don't exceed."""
        cumulated = np.cumsum(self._counts)
        # An integer number of values: rounding of the product must not ask for one more.
        rank = max(1, int(np.ceil(cumulated[-1] * percent / 100 - 1e-9)))
        place = int(np.searchsorted(cumulated, rank))
        return 0.0 if place == 0 else float(10 ** (self._LOWEST + (place - 0.5) / self._PER_DECADE))
