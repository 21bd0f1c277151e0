"""Do the sampler and the training engine agree about the sampled tokens?

Rollouts carry the log-probs that the sampler recorded; precompute recomputes them. For each response token

    d = log p_train - log p_sampler

would be 0 if both computed the same policy. It never is quite: kernels and precisions differ. What it should not be is
large: the tokens were then drawn from another distribution than the one that is trained, and ratios and KL estimates
are biased. The usual figures, under the names that they have elsewhere:

- mean exp(|d|): NeMo-RL's Token Mult Prob Error, `token_mult_prob_error` (docs/guides/grpo.md).
- mean(exp(d) - 1 - d): the k3 estimate of KL(sampler || train); NeMo-RL's `gen_kl_error`, verl's
  `rollout_corr/k3_kl` (docs/algo/rollout_corr.md).
- mean |p_train - p_sampler| and the Pearson correlation of the two: verl's `training/rollout_probs_diff_mean` and
  `training/rollout_actor_probs_pearson_corr` (verl/utils/debug/metrics.py).
- mean |d|: slime's `train_rollout_logprob_abs_diff`.

`mismatch_verdicts` says what a good value is, and keeps the report.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_erpd.errors import RolloutError
from megatron_erpd.evaluation.streaming import LogHistogram, Moments

PERCENTS = (50.0, 90.0, 99.0, 99.9)
SEQUENCE_PERCENTS = (0.0, 1.0, 50.0, 99.0, 100.0)
FACTORS = (1.05, 1.2, 2.0, 10.0)
"""Shares are counted of tokens whose probabilities differ by more than these factors."""
NUM_WORST = 10
MAX_EXPONENT = 80.0
"""|d| is cut to this many nats before it is exponentiated, and nowhere else: no token must make a mean infinite."""
MIN_TOKENS = 100
"""With fewer tokens no slope is computed."""
MIN_STD = 1e-6
"""Nats; with a smaller spread, which is rounding of fp32 log-probs, no slope is computed either."""


@dataclass(frozen=True)
class WorstToken:
    """A rollout that stands out, and its token with the largest |d|.

    Attributes:
        num_tokens: of the response; abs_mean: mean |d| over them.
        position: of the token in the response, from 0.
        sampler, train: its two log-probs.
    """

    sample_id: str
    num_tokens: int
    abs_mean: float
    position: int
    sampler: float
    train: float

    @property
    def difference(self) -> float:
        return self.train - self.sampler


@dataclass(frozen=True)
class Mismatch:
    """What a comparison found. Log-probs and their differences are in nats.

    Attributes:
        num_rollouts, num_tokens: that were compared.
        num_without: rollouts without the sampler's log-probs, which were not.
        num_not_finite: tokens with an infinite log-prob or NaN; they are in no other figure.
        mean, abs_mean, std: of d, of |d|, of d.
        abs_percentiles: of |d|, `p50` to `p99.9` (to 0.12% of the value) and `max`.
        kl_k3: mean(exp(d) - 1 - d). (The direct estimate of the same KL is -mean.)
        mult_error: mean exp(|d|); mult_error_percentiles: as above, of exp(|d|).
        prob_difference: mean |p_train - p_sampler|.
        pearson: correlation of the two probabilities; None where one of them never changes.
        shares: `1.05` etc. -> share of tokens whose probabilities differ by more than that factor.
        sequence_ratio: percentiles over rollouts of exp(mean d), the geometric mean of the ratios.
        largest_sum, largest_sum_id: the largest |sum of d| of a rollout, and which.
        slope, slope_error: of log p_train regressed on log p_sampler over tokens, and its standard error.
        explained: the share of the variance of d that the regression accounts for. None where these aren't computed.
        worst_mean, worst_token: rollouts by mean |d| and by largest |d|, the worst first.
    """

    num_rollouts: int
    num_tokens: int
    num_without: int
    num_not_finite: int
    mean: float
    abs_mean: float
    std: float
    abs_percentiles: dict[str, float]
    kl_k3: float
    mult_error: float
    mult_error_percentiles: dict[str, float]
    prob_difference: float
    pearson: float | None
    shares: dict[str, float]
    sequence_ratio: dict[str, float]
    largest_sum: float
    largest_sum_id: str
    slope: float | None
    slope_error: float | None
    explained: float | None
    worst_mean: list[WorstToken] = field(default_factory=list)
    worst_token: list[WorstToken] = field(default_factory=list)


def measure_mismatch(rows: Iterable[tuple[str, np.ndarray | None, np.ndarray]]) -> Mismatch:
    """Compares log-probs rollout by rollout. Nothing is kept but 8 bytes per rollout and fixed tables.

    Args:
        rows: `sample_id`, the sampler's log-probs `[R]` (None where it recorded none) and the training engine's `[R]`.

    Raises:
        RolloutError: a rollout's two rows aren't equally long (names it), or there was nothing to compare.
    """
    comparison = _Comparison()
    for sample_id, behavior, recomputed in rows:
        comparison.add(sample_id, behavior, recomputed)
    return comparison.result()


class _Comparison:
    """What is gathered on the way."""

    def __init__(self) -> None:
        self.num_without = self.num_not_finite = 0
        # d, log p_sampler, p_sampler, p_train, and what only a mean is wanted of: |d|, exp|d|, k3, |p - p|.
        self.moments = Moments(8)
        self.histogram = LogHistogram()
        self.beyond = np.zeros(len(FACTORS), dtype=np.int64)
        self.largest = 0.0
        self.sequence_means = array("d")
        self.largest_sum, self.largest_sum_id = 0.0, ""
        self.worst_mean: list[tuple[float, int, WorstToken]] = []
        self.worst_token: list[tuple[float, int, WorstToken]] = []

    def add(self, sample_id: str, behavior: np.ndarray | None, recomputed: np.ndarray) -> None:
        if behavior is None:
            self.num_without += 1
            return
        if behavior.shape != recomputed.shape:
            raise RolloutError(
                f"sample {sample_id}: {behavior.size} log-probs of the sampler and {recomputed.size} of the training "
                "engine; the cache was made for other rollouts, precompute it again"
            )
        sampler, train = behavior.astype(np.float64), recomputed.astype(np.float64)
        finite = np.isfinite(sampler) & np.isfinite(train)
        self.num_not_finite += len(finite) - int(finite.sum())
        positions = np.flatnonzero(finite)
        if len(positions):
            self._add_finite(sample_id, positions, sampler[finite], train[finite])

    def _add_finite(self, sample_id: str, positions: np.ndarray, sampler: np.ndarray, train: np.ndarray) -> None:
        d = train - sampler
        size, cut = np.abs(d), np.clip(d, -MAX_EXPONENT, MAX_EXPONENT)
        p_sampler, p_train = np.exp(sampler), np.exp(train)
        k3 = np.expm1(cut) - cut
        means = [size, np.exp(np.abs(cut)), k3, np.abs(p_train - p_sampler)]
        self.moments.add(np.stack([d, sampler, p_sampler, p_train, *means]))
        self.histogram.add(size)
        self.beyond += [int((size > math.log(factor)).sum()) for factor in FACTORS]
        self.sequence_means.append(float(d.mean()))
        if not self.largest_sum_id or abs(d.sum()) > abs(self.largest_sum):
            self.largest_sum, self.largest_sum_id = float(d.sum()), sample_id
        at = int(size.argmax())
        self.largest = max(self.largest, float(size[at]))
        found = WorstToken(
            sample_id, len(d), float(size.mean()), int(positions[at]), float(sampler[at]), float(train[at])
        )
        # Of equal ones the first stays; heaps compare the number before they would compare the rows.
        order = -len(self.sequence_means)
        _keep(self.worst_mean, (found.abs_mean, order, found))
        _keep(self.worst_token, (float(size[at]), order, found))

    def result(self) -> Mismatch:
        m = self.moments
        if m.count == 0:
            raise RolloutError(
                f"no token can be compared: {self.num_without} rollouts have no behavior_log_probs, and "
                f"{self.num_not_finite} tokens of the others no finite ones; have the sampler record them"
            )
        percentiles = {f"p{percent:g}": self.histogram.percentile(percent) for percent in PERCENTS}
        percentiles = {name: min(value, self.largest) for name, value in percentiles.items()} | {"max": self.largest}
        ratios = np.exp(np.clip(np.frombuffer(self.sequence_means), -MAX_EXPONENT, MAX_EXPONENT))
        sequences = np.percentile(ratios, SEQUENCE_PERCENTS)
        slope, error, explained = _regression(m)
        return Mismatch(
            num_rollouts=len(self.sequence_means),
            num_tokens=m.count,
            num_without=self.num_without,
            num_not_finite=self.num_not_finite,
            mean=float(m.mean[0]),
            abs_mean=float(m.mean[4]),
            std=m.std(0),
            abs_percentiles=percentiles,
            kl_k3=float(m.mean[6]),
            mult_error=float(m.mean[5]),
            mult_error_percentiles={n: math.exp(min(value, MAX_EXPONENT)) for n, value in percentiles.items()},
            prob_difference=float(m.mean[7]),
            pearson=m.correlation(2, 3),
            shares={f"{f:g}": int(n) / m.count for f, n in zip(FACTORS, self.beyond, strict=True)},
            sequence_ratio={f"p{p:g}": float(v) for p, v in zip(SEQUENCE_PERCENTS, sequences, strict=True)},
            largest_sum=self.largest_sum,
            largest_sum_id=self.largest_sum_id,
            slope=slope,
            slope_error=error,
            explained=explained,
            worst_mean=[row for *_, row in sorted(self.worst_mean, reverse=True)],
            worst_token=[row for *_, row in sorted(self.worst_token, reverse=True)],
        )


def _keep(heap: list[tuple[float, int, WorstToken]], entry: tuple[float, int, WorstToken]) -> None:
    """Adds an entry to the `NUM_WORST` largest."""
    if len(heap) < NUM_WORST:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _regression(m: Moments) -> tuple[float | None, float | None, float | None]:
    """Slope of log p_train on log p_sampler, its standard error, and the share of the variance of d that it explains.

    d is regressed, and 1 added to the slope: nothing is lost where the two are almost equal.
    """
    spread, joint, differences = m.products[1, 1], m.products[0, 1], m.products[0, 0]
    if m.count < MIN_TOKENS or min(m.std(0), m.std(1)) < MIN_STD:
        return None, None, None
    residual = max(0.0, differences - joint**2 / spread)
    return (
        float(1 + joint / spread),
        float(np.sqrt(residual / (m.count - 2) / spread)),
        float(joint**2 / (spread * differences)),
    )
