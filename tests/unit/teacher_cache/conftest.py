"""Rollouts for small caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from tests.unit.teacher_cache.caches import VOCAB


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    """Twelve, of one to eight response tokens."""
    rng = np.random.default_rng(0)
    rows = [
        Rollout(
            prompt_token_ids=rng.integers(0, VOCAB, rng.integers(1, 5)),
            response_token_ids=rng.integers(0, VOCAB, rng.integers(1, 9)),
            group_id=i // 4,
            reward=float(i % 2),
        )
        for i in range(12)
    ]
    write_rollouts(tmp_path / "rollouts.parquet", rows, {"tokenizer_digest": "tok"})
    return read_rollouts(tmp_path / "rollouts.parquet")
