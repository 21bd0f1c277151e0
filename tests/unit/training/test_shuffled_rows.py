"""The shuffled-signal control: the same values at other tokens, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_erpd.data.batch import BatchSource, TokenRow
from megatron_erpd.data.rollouts import Rollouts, read_rollouts
from megatron_erpd.objectives.signals import combine, parse_signal
from megatron_erpd.settings import Layout
from megatron_erpd.teacher_cache.rows import shuffled_rows
from tests.integration.tiny import write_random_rollouts

SIGNAL = parse_signal("0.5*teacher/base + base/unlearned")
POLICIES = ("base", "teacher", "unlearned")


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    return read_rollouts(write_random_rollouts(tmp_path / "r.parquet"))


def log_probs(rollouts: Rollouts) -> dict[str, TokenRow]:
    """Values that name their token: no two of a policy are equal."""
    starts = np.cumsum(rollouts.response_lengths) - rollouts.response_lengths

    def row(scale: float) -> TokenRow:
        return lambda i: -scale * (starts[i] + np.arange(rollouts.response_lengths[i], dtype=np.float32))

    return {name: row(scale) for name, scale in zip(POLICIES, (1.0, 2.0, 5.0), strict=True)}


def signals(rollouts: Rollouts, rows: dict[str, TokenRow], batch_size: int) -> dict[int, np.ndarray]:
    """The signal of every rollout's response, as batches of this size give it."""
    source = BatchSource(rollouts, Layout(), token_rows=rows)
    found = {}
    for start in range(0, len(rollouts), batch_size):
        batch = source.batch(np.arange(start, min(start + batch_size, len(rollouts)))[::-1])
        values = combine(SIGNAL, batch.token_rows)
        for b, i in enumerate(batch.row_indices.tolist()):
            found[i] = values[b][batch.loss_mask[b] > 0].numpy()
    return found


def flat(by_rollout: dict[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([by_rollout[i] for i in sorted(by_rollout)])


def test_the_signal_is_permuted_as_a_whole(rollouts: Rollouts) -> None:
    rows = log_probs(rollouts)
    before, after = (flat(signals(rollouts, r, 8)) for r in (rows, shuffled_rows(rows, rollouts, seed=3)))
    assert np.array_equal(np.sort(before), np.sort(after))
    # Nearly all tokens get another's value, most of them one of another rollout.
    assert (before == after).mean() < 0.1
    distance = np.abs(np.argsort(np.argsort(-before)) - np.argsort(np.argsort(-after)))
    assert np.median(distance) > 20


def test_it_follows_from_the_seed_and_not_from_the_batches(rollouts: Rollouts) -> None:
    rows = log_probs(rollouts)
    first = flat(signals(rollouts, shuffled_rows(rows, rollouts, seed=3), 8))
    assert np.array_equal(first, flat(signals(rollouts, shuffled_rows(rows, rollouts, seed=3), 3)))
    assert not np.array_equal(first, flat(signals(rollouts, shuffled_rows(rows, rollouts, seed=4), 8)))


def test_a_row_has_the_length_of_its_response(rollouts: Rollouts) -> None:
    shuffled = shuffled_rows(log_probs(rollouts), rollouts, seed=1)
    lengths = [len(shuffled["base"](i)) for i in range(len(rollouts))]
    assert torch.equal(torch.tensor(lengths), torch.from_numpy(rollouts.response_lengths))
