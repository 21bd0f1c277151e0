"""What is worth a warning in a set of rollouts, by counts that are known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.rollout_warnings import rollout_warnings
from megatron_erpd.data.rollouts import read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout

MIXED = [0.0, 1.0]


def warnings(tmp_path: Path, groups: list[list[float | None]], cut: int = 0) -> list[str]:
    rewards = [(group, reward) for group, members in enumerate(groups) for reward in members]
    rows = [
        Rollout(
            prompt_token_ids=np.array([1, 2 + group]),
            response_token_ids=np.array([3, 4 + i]),
            group_id=group,
            reward=reward,
            finish_reason="length" if i < cut else "stop",
        )
        for i, (group, reward) in enumerate(rewards)
    ]
    write_rollouts(tmp_path / "rollouts.parquet", rows)
    return rollout_warnings(read_rollouts(tmp_path / "rollouts.parquet"))


@pytest.mark.parametrize(
    ("groups", "cut", "expected"),
    [
        ([MIXED] * 6, 0, []),
        ([[1.0, 1.0]] * 18 + [MIXED] * 6, 0, ["18 of 24 groups teach nothing"]),
        ([[1.0, 1.0], [0.0, 0.0]] * 3, 0, ["all 6 groups teach nothing"]),
        ([[1.0, 1.0]] * 2 + [MIXED] * 3, 0, []),
        ([[0.0, 0.0]] * 4, 0, ["all 8 rewards are 0"]),
        ([[0.5, 0.5, None]] * 4, 0, ["all 8 rewards are 0.5"]),
        ([[1.0], [0.0], [1.0]], 0, ["all 3 groups teach nothing.*one scored rollout each"]),
        ([[None, None]] * 3, 0, ["all 6 rollouts are unverified"]),
        # A group with one scored rollout has nothing to compare it with.
        ([[None, 1.0], [None, 0.0]], 0, ["2 of 4 rollouts are unverified", "all 2 groups teach nothing"]),
        ([MIXED] * 6, 12, ["all 12 responses were cut off"]),
        ([MIXED] * 6, 6, ["6 of 12 responses were cut off"]),
        ([MIXED] * 6, 5, []),
    ],
)
def test_warnings(tmp_path, groups, cut, expected):
    found = warnings(tmp_path, groups, cut)
    assert len(found) == len(expected), found
    for text, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, text), text
