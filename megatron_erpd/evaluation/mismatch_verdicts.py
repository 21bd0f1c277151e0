"""What the figures of a mismatch mean, what to do about them, and the report that holds both.

Where people have published a limit it is taken:

- mean exp(|d|): NeMo-RL looks for a fault of the framework above 1.05 (docs/guides/dtensor-tp-accuracy.md), and for one
  in the update of the weights where it rises past 1 to 2% (docs/guides/grpo.md).
- KL: NeMo-RL takes values below 1e-3 for acceptable (docs/guides/grpo.md), and its tests fail above 1e-2.
- mean |p_train - p_sampler|: within 0.01 where training is healthy, a fault above (verl's guide for migrating to NPUs).
- Pearson correlation of probabilities: 0.9993 to 0.9995 in healthy runs that users of verl report.
- ratios beyond 2: where the weights of `--importance-correction` are truncated by default, and in verl's examples
  (docs/algo/rollout_corr.md).
- ratios beyond 1e4: there verl's examples reject the whole sequence (`rollout_token_veto_threshold: 1e-4`).

The rest (half of a limit, shares, the slope) is this project's choice.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_erpd.errors import StageError
from megatron_erpd.evaluation.mismatch import Mismatch, WorstToken

MISMATCH = "sampler_mismatch.json"
"""The report's file in the artifact of the base policy's log-probs."""

Level = Literal["ok", "look", "bad"]
LEVELS: tuple[Level, ...] = ("ok", "look", "bad")

EXPLAINED_BY_TEMPERATURE = 0.1
"""Share of the variance of d that a straight line must account for. On softmax policies with random logits another
temperature gave 0.36 to 0.43 (T from 0.7 to 1.3), noise on the logits of either side at most 0.016."""
SLOPE_ERRORS = 5.0
"""And by so many standard errors the slope must differ from 1."""

_TRUST = (
    "check that the rollouts come from this checkpoint, that both engines have its precision, and that the sampler "
    "recorded the log-probs it sampled with; what remains is corrected by --importance-correction token"
)
_TOKEN = (
    "look at the worst tokens below: a filled-in 0, an end token or chat marker that the sampler didn't score, a "
    "response that was encoded again; drop such rollouts, or bound them with --importance-correction"
)


@dataclass(frozen=True)
class MismatchVerdict:
    """A figure, held against its limits.

    Attributes:
        level: ok, look (worse than in healthy runs) or bad.
        limits: the two values at which it becomes look and bad, as text.
        meaning: of the figure; advice: what to do, where it is not ok.
    """

    name: str
    value: float
    level: Level
    limits: str
    meaning: str
    advice: str = ""


def verdicts(found: Mismatch) -> list[MismatchVerdict]:
    """All that can be judged."""
    listed = [
        _judged("mean exp|d|", found.mult_error, (1.02, 1.05), "typical factor between the two probabilities", _TRUST),
        _judged("KL(sampler || train), k3", found.kl_k3, (1e-3, 1e-2), "nats per token", _TRUST),
        _judged("mean |p - p|", found.prob_difference, (0.005, 0.01), "typical difference of probabilities", _TRUST),
    ]
    if found.pearson is not None:
        listed.append(
            _judged("correlation of p", found.pearson, (0.999, 0.99), "1 where both rank tokens alike", _TRUST)
        )
    meaning = "share of tokens whose weight would be truncated"
    listed.append(_judged("ratio beyond 2", found.shares["2"], (1e-3, 1e-2), meaning, _TRUST))
    limits = (math.log(10), math.log(1e4))
    listed.append(_judged("largest |d|", found.abs_percentiles["max"], limits, "nats, of the worst token", _TOKEN))
    if found.num_not_finite:
        meaning = "tokens with an infinite log-prob or NaN"
        listed.append(MismatchVerdict("not finite", found.num_not_finite, "bad", "0", meaning, _TOKEN))
    temperature = _temperature(found)
    return [*listed, temperature] if temperature else listed


def worst_level(found: Mismatch) -> Level:
    """The worst of all verdicts."""
    return max((verdict.level for verdict in verdicts(found)), key=LEVELS.index)


def _judged(name: str, value: float, limits: tuple[float, float], meaning: str, advice: str) -> MismatchVerdict:
    """Above the first limit is `look`, above the second `bad`; below, where the second is the smaller one."""
    sign, mark = (1, ">") if limits[0] < limits[1] else (-1, "<")
    look, bad = (sign * value > sign * limit for limit in limits)
    level: Level = "bad" if bad else "look" if look else "ok"
    shown = f"{mark} {limits[0]:.4g}, {mark} {limits[1]:.4g}"
    return MismatchVerdict(name, value, level, shown, meaning, advice if level != "ok" else "")


def _temperature(found: Mismatch) -> MismatchVerdict | None:
    """Whether d follows log p_sampler in a line, as another temperature makes it and rounding doesn't.

    A sampler at temperature T has log p_train = T log p_sampler + (T - 1) H, with an entropy H that depends on the
    context and is large where log p_sampler is low: over all tokens the slope lies between 1 and T.
    """
    if found.slope is None or found.slope_error is None or found.explained is None:
        return None
    limits = f"explains > {EXPLAINED_BY_TEMPERATURE:g} of the variance"
    meaning = (
        f"of log p_train on log p_sampler ± {found.slope_error:.2g}; explains {found.explained:.2f} of d's variance"
    )
    is_line = found.explained > EXPLAINED_BY_TEMPERATURE
    if not is_line or abs(found.slope - 1) < SLOPE_ERRORS * found.slope_error:
        return MismatchVerdict("slope", found.slope, "ok", limits, meaning)
    side = "below" if found.slope < 1 else "above"
    advice = (
        f"so looks a sampler at a temperature {side} 1 (further from it than {found.slope:.3g}), or one whose policy "
        "is sharper or flatter throughout: sample at temperature 1, or correct by --importance-correction token"
    )
    # Where the other figures are fine the line is there, and too small to matter.
    level: Level = "bad" if found.mult_error > 1.05 else "look" if found.mult_error > 1.02 else "ok"
    return MismatchVerdict("slope", found.slope, level, limits, meaning, advice if level != "ok" else "")


def mismatch_report(found: Mismatch) -> dict[str, Any]:
    """All figures and the verdicts on them, as JSON values; `read_mismatch` gives the figures back."""
    return asdict(found) | {"verdicts": [asdict(verdict) for verdict in verdicts(found)]}


def read_mismatch(artifact: Path) -> Mismatch:
    """The figures of the report in an artifact.

    Raises:
        StageError: there is none, or the file is damaged.
    """
    path = artifact / MISMATCH
    try:
        figures = json.loads(path.read_text())
        figures.pop("verdicts", None)
        for name in ("worst_mean", "worst_token"):
            figures[name] = [WorstToken(**row) for row in figures[name]]
        return Mismatch(**figures)
    except (OSError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise StageError(f"{path}: isn't a mismatch report ({error}); run the precompute stage again") from None


def describe_mismatch(found: Mismatch) -> str:
    """The finding for a terminal: verdicts, advice, spread, worst tokens."""
    without = f"; {found.num_without} rollouts without log-probs of the sampler left out" if found.num_without else ""
    lines = [
        f"sampler against training engine: {worst_level(found)} ({found.num_tokens:,} tokens of "
        f"{found.num_rollouts:,} rollouts{without})"
    ]
    judged = verdicts(found)
    width = max(len(verdict.name) for verdict in judged)
    for verdict in judged:
        value = f"{verdict.value:.6g}"
        lines.append(
            f"  {verdict.level:<4}  {verdict.name:<{width}}  {value:<11}  {verdict.meaning} ({verdict.limits})"
        )
    lines += [f"  what to do: {advice}" for advice in dict.fromkeys(v.advice for v in judged if v.advice)]
    spread = ", ".join(f"{name} {value:.3g}" for name, value in found.abs_percentiles.items())
    shares = ", ".join(f"{factor} {share:.3g}" for factor, share in found.shares.items())
    ratios = ", ".join(f"{name} {value:.5g}" for name, value in found.sequence_ratio.items())
    lines += [
        "  d = log p_train - log p_sampler: "
        f"mean {found.mean:+.3g}, mean |d| {found.abs_mean:.3g}, std {found.std:.3g}",
        f"  |d|: {spread}",
        f"  share of tokens with a ratio beyond: {shares}",
        f"  geometric mean ratio of a rollout: {ratios}; largest |sum d| {abs(found.largest_sum):.3g} "
        f"({found.largest_sum_id})",
    ]
    if worst_level(found) != "ok":
        lines += ["  worst tokens:", *(f"    {_line(row)}" for row in found.worst_token)]
        lines += ["  worst rollouts by mean |d|:", *(f"    {_line(row)}" for row in found.worst_mean)]
    return "\n".join(lines)


def _line(row: WorstToken) -> str:
    return (
        f"{row.sample_id}: token {row.position} of {row.num_tokens}, sampler {row.sampler:.4g}, train {row.train:.4g} "
        f"(mean |d| {row.abs_mean:.3g})"
    )
