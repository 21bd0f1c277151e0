"""Rollouts in batches of a bounded number of tokens, each once, over any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.batch import BatchSource, length_groups
from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.settings import Layout
from tests.integration.tiny import write_random_rollouts


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("budget", [1, 50, 64, 10_000])
def test_groups_fit_and_hold_every_row_once(budget: int, multiple: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 200)
    groups = length_groups(lengths, budget, multiple)
    assert sorted(np.concatenate(groups)) == list(range(200))
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        padded = -(-(lengths[group].max() - 1) // multiple) * multiple
        assert len(group) == 1 or len(group) * padded <= budget
        if following is not None:
            assert lengths[group].min() >= lengths[following].max()
            assert (len(group) + 1) * padded > budget, "the next row would have fitted"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_the_rows_and_have_equally_many_batches(size: int, tmp_path: Path) -> None:
    rollouts = read_rollouts(write_random_rollouts(tmp_path / "r.parquet"))
    source = BatchSource(rollouts, Layout())
    groups = length_groups(rollouts.lengths, 60, 1)
    batches = [list(source.once(groups, rank, size)) for rank in range(size)]
    assert len({len(own) for own in batches}) == 1
    real = [batch for own in batches for batch in own if batch.loss_mask.any()]
    assert sorted(i for batch in real for i in batch.row_indices.tolist()) == list(range(len(rollouts)))
    assert all(batch.tokens.numel() <= 60 for batch in real)
