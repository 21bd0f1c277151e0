"""Sampler against training engine: figures against numpy over everything at once, and planted faults."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.commands import cli
from megatron_erpd.data.rollouts import read_rollouts, write_rollouts
from megatron_erpd.errors import RolloutError, StageError
from megatron_erpd.evaluation.mismatch import NUM_WORST, Mismatch, measure_mismatch
from megatron_erpd.evaluation.mismatch_verdicts import (
    MISMATCH,
    MismatchVerdict,
    describe_mismatch,
    mismatch_report,
    read_mismatch,
    verdicts,
    worst_level,
)
from megatron_erpd.evaluation.streaming import LogHistogram, Moments
from megatron_erpd.teacher_cache.reader import CacheReader
from tests.tolerances import FLOAT64, HISTOGRAM
from tests.unit.report import synthetic_run

Rows = list[tuple[str, np.ndarray | None, np.ndarray]]


def random_rows(noise: float, num_rollouts: int = 60, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for i in range(num_rollouts):
        sampler = -rng.exponential(1.5, rng.integers(1, 90)).astype(np.float32)
        train = np.minimum(sampler + rng.normal(0, noise, sampler.size), 0.0).astype(np.float32)
        rows.append((f"s{i}", sampler, train))
    return rows


def policies(temperature: float, noise: float = 0.0, tokens: int = 4000) -> Rows:
    """Tokens drawn by softmax policies over 50 entries: the sampler at a temperature, training at 1."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(tokens, 50)) * rng.gamma(2.0, 2.0, size=(tokens, 1))
    train = log_softmax(logits + noise * rng.normal(size=logits.shape))
    sampler = log_softmax(logits / temperature)
    drawn = (sampler + rng.gumbel(size=sampler.shape)).argmax(-1)
    a, b = (x[np.arange(tokens), drawn] for x in (sampler, train))
    return [(f"s{i}", a[i : i + 40], b[i : i + 40]) for i in range(0, tokens, 40)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def verdict(found: Mismatch, name: str) -> MismatchVerdict:
    return next(v for v in verdicts(found) if v.name == name)


@pytest.mark.parametrize("noise", [0.003, 0.7])
def test_figures_are_those_of_numpy(noise: float) -> None:
    rows = random_rows(noise)
    found = measure_mismatch(iter([*rows[:20], ("none", None, rows[0][2]), *rows[20:]]))
    x, y = (np.concatenate([row[k] for row in rows]).astype(np.float64) for k in (1, 2))  # type: ignore[misc]
    d, p, q = y - x, np.exp(x), np.exp(y)
    assert (found.num_rollouts, found.num_tokens, found.num_without, found.num_not_finite) == (60, len(d), 1, 0)
    line = np.polynomial.Polynomial.fit(x, y, 1).convert().coef
    residual = y - line[0] - line[1] * x
    expected = {
        "mean": d.mean(),
        "abs_mean": np.abs(d).mean(),
        "std": d.std(),
        "kl_k3": (np.exp(d) - 1 - d).mean(),
        "mult_error": np.exp(np.abs(d)).mean(),
        "prob_difference": np.abs(p - q).mean(),
        "pearson": np.corrcoef(p, q)[0, 1],
        "slope": line[1],
        "slope_error": np.sqrt((residual**2).sum() / (len(d) - 2) / ((x - x.mean()) ** 2).sum()),
        "explained": np.corrcoef(d, x)[0, 1] ** 2,
        "largest_sum": max((float((b - a).sum(dtype=np.float64)) for _, a, b in as_float64(rows)), key=abs),
    }
    for name, value in expected.items():
        FLOAT64.assert_close(getattr(found, name), value, name)
    assert found.shares == {f"{f:g}": float((np.abs(d) > math.log(f)).mean()) for f in (1.05, 1.2, 2, 10)}
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("p99.9", 99.9)):
        exact = np.percentile(np.abs(d), percent, method="inverted_cdf")
        HISTOGRAM.assert_close(found.abs_percentiles[name], float(exact), name)
        HISTOGRAM.assert_close(math.log(found.mult_error_percentiles[name]), float(exact), name)
    assert found.abs_percentiles["max"] == np.abs(d).max()
    ratios = np.exp([float(np.mean(b - a)) for _, a, b in as_float64(rows)])
    FLOAT64.assert_close(list(found.sequence_ratio.values()), list(np.percentile(ratios, [0, 1, 50, 99, 100])))


def as_float64(rows: Rows) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name, a, b in rows:
        assert a is not None
        yield name, a.astype(np.float64), b.astype(np.float64)


def test_the_worst_are_named_in_order() -> None:
    rows = random_rows(0.1)
    found = measure_mismatch(rows)
    means = sorted(((np.abs(b - a).mean(), name) for name, a, b in as_float64(rows)), reverse=True)
    largest = sorted(((np.abs(b - a).max(), name) for name, a, b in as_float64(rows)), reverse=True)
    assert [w.sample_id for w in found.worst_mean] == [name for _, name in means[:NUM_WORST]]
    assert [w.sample_id for w in found.worst_token] == [name for _, name in largest[:NUM_WORST]]
    _, a, b = rows[int(found.worst_token[0].sample_id[1:])]
    worst = found.worst_token[0]
    assert a is not None and worst.num_tokens == len(a)
    assert (worst.sampler, worst.train) == (a[worst.position], b[worst.position])
    assert abs(worst.difference) == found.abs_percentiles["max"]


def test_rounding_is_fine() -> None:
    found = measure_mismatch(policies(1.0, noise=0.005))
    assert worst_level(found) == "ok" and all(v.advice == "" for v in verdicts(found))
    assert "what to do" not in describe_mismatch(found)


@pytest.mark.parametrize(("temperature", "side"), [(0.7, "below"), (0.9, "below"), (1.1, "above"), (1.3, "above")])
def test_a_planted_temperature(temperature: float, side: str) -> None:
    found = measure_mismatch(policies(temperature))
    assert found.slope is not None and min(1, temperature) < found.slope < max(1, temperature)
    said = verdict(found, "slope")
    assert said.level == "bad" and f"a temperature {side} 1" in said.advice
    assert "what to do: so looks a sampler at a temperature" in describe_mismatch(found)


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_another_policy_is_not_taken_for_a_temperature(noise: float) -> None:
    found = measure_mismatch(policies(1.0, noise=noise))
    assert worst_level(found) == "bad" and verdict(found, "mean exp|d|").level == "bad"
    assert verdict(found, "slope").level == "ok"


def test_a_small_temperature_is_no_matter() -> None:
    found = measure_mismatch(policies(1.005))
    assert found.explained is not None and found.explained > 0.3
    assert verdict(found, "slope").level == "ok" == worst_level(found)


def test_a_planted_token() -> None:
    rows = policies(1.0, noise=0.005)
    name, sampler, train = rows[7]
    assert sampler is not None
    sampler[13], train[13] = -0.5, -12.5
    rows[7] = (name, sampler, train)
    found = measure_mismatch(rows)
    worst = found.worst_token[0]
    assert (worst.sample_id, worst.position, worst.difference) == (name, 13, -12.0)
    assert verdict(found, "largest |d|").level == "bad" and verdict(found, "slope").level == "ok"
    assert f"{name}: token 13 of 40" in describe_mismatch(found)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    rows = random_rows(0.01)
    clean = measure_mismatch(rows)
    name, sampler, train = rows[3]
    assert sampler is not None
    rows[3] = (name, np.append([np.nan, -1.0], sampler), np.append([-1.0, -np.inf], train))
    found = measure_mismatch(rows)
    assert found.num_not_finite == 2 and found.abs_mean == pytest.approx(clean.abs_mean)
    assert verdict(found, "not finite").level == "bad" == worst_level(found)
    far = measure_mismatch([("a", np.array([-1.0]), np.array([-1e5]))])
    assert math.isfinite(far.mult_error) and math.isfinite(far.kl_k3) and far.mean == -99999
    near = measure_mismatch([("a", np.array([-1e5]), np.array([-1.0]))])
    assert json.dumps([mismatch_report(far), mismatch_report(near)], allow_nan=False)


def test_few_or_equal_tokens_have_no_slope() -> None:
    shift = measure_mismatch([("a", -np.arange(1.0, 900) / 7, -np.arange(1.0, 900) / 7 - 0.1)])
    few = measure_mismatch([("a", -np.arange(1.0, 50), -np.arange(1.0, 50) - 0.1)])
    same = measure_mismatch([("a", np.full(200, -1.0), np.full(200, -1.0))])
    for found in (few, same, shift):
        assert found.slope is None and "slope" not in [v.name for v in verdicts(found)]
    assert same.pearson is None and same.abs_percentiles == dict.fromkeys(("p50", "p90", "p99", "p99.9", "max"), 0.0)


def test_nothing_to_compare() -> None:
    with pytest.raises(RolloutError, match="2 rollouts have no behavior_log_probs"):
        measure_mismatch([("a", None, np.zeros(3)), ("b", None, np.zeros(1))])
    with pytest.raises(RolloutError, match="sample a: 2 log-probs of the sampler and 3"):
        measure_mismatch([("a", np.zeros(2), np.zeros(3))])


def test_the_report_on_disk(tmp_path: Path) -> None:
    found = measure_mismatch(random_rows(0.3))
    (tmp_path / MISMATCH).write_text(json.dumps(mismatch_report(found)))
    assert read_mismatch(tmp_path) == found
    (tmp_path / MISMATCH).write_text('{"mean": 1}')
    with pytest.raises(StageError, match="isn't a mismatch report"):
        read_mismatch(tmp_path)


def test_moments_keep_the_digits_of_a_small_spread() -> None:
    values = 1e6 + np.random.default_rng(0).normal(size=(2, 1000))
    moments = Moments(2)
    for part in np.array_split(values, [0, 1, 100, 990], axis=1):
        moments.add(part)
    assert moments.count == 1000
    FLOAT64.assert_close([moments.std(0)], [float(values[0].std())])
    FLOAT64.assert_close([moments.correlation(0, 1) or 0.0], [float(np.corrcoef(values)[0, 1])])


def test_the_ends_of_the_histogram() -> None:
    histogram = LogHistogram()
    histogram.add(np.array([0.0, 1e-12, 1e-8, 1.0, 1e9]))
    HISTOGRAM.assert_close([histogram.percentile(p) for p in (40, 60, 80)], [0.0, 1e-8, 1.0])
    assert histogram.percentile(100) == pytest.approx(1e4, rel=2e-3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt_token_ids": [1], "response_token_ids": [2, 3, 4, 5], "group_id": i, "reward": float(i % 2)}
        | ({"behavior_log_probs": -rng.random(4) - 3.5} if i else {})
        for i in range(12)
    ]
    write_rollouts(tmp_path / "r/r.parquet", rows)
    synthetic_run.cache(tmp_path / "cache", tmp_path / "r", random.Random(0))
    argv = ["mismatch", "--rollouts", str(tmp_path / "r"), "--log-probs", str(tmp_path / "cache")]
    cli.main([*argv, "--policy", "teacher", "--json", str(tmp_path / "m.json")])
    out = capsys.readouterr().out
    assert "sampler against training engine: bad (44 tokens of 11 rollouts; 1 rollouts without" in out
    rollouts, cache = read_rollouts(tmp_path / "r"), CacheReader(tmp_path / "cache")
    kept = [(i, name) for i, name in enumerate(rollouts.sample_ids) if rollouts.has_behavior_log_probs[i]]
    differences = [cache.token_row("teacher", n).astype(float) - rollouts.behavior_log_probs(i) for i, n in kept]
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["mean"] == pytest.approx(np.mean(differences)) and figures["verdicts"][0]["level"] == "bad"


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_run.rollouts(tmp_path / "r", random.Random(0))
    with pytest.raises(SystemExit) as caught:
        cli.main(["mismatch", "--rollouts", str(tmp_path / "r"), "--log-probs", str(tmp_path / "cache")])
    assert caught.value.code == 2 and "no rollout has behavior_log_probs" in capsys.readouterr().err
