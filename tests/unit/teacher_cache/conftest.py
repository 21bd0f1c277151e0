"""Rollouts for small caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts
from tests.unit.teacher_cache.caches import write_random_rollouts


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    """Twelve small ones."""
    write_random_rollouts(tmp_path / "rollouts.parquet")
    return read_rollouts(tmp_path / "rollouts.parquet")
