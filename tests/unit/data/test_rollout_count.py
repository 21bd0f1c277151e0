"""Counting rollouts by the footers of their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_erpd.data.rollouts import RolloutCount, count_rollouts, read_rollouts, rollout_lengths, write_rollouts
from megatron_erpd.errors import RolloutError


def test_a_folder_of_parts(tmp_path: Path, rows: Callable[..., list[dict[str, Any]]]) -> None:
    write_rollouts(tmp_path / "a.parquet", rows(30), row_group_rows=7)
    write_rollouts(tmp_path / "b.parquet", rows(5, seed=1))
    (tmp_path / ".c.parquet").write_text("unfinished")
    both = read_rollouts(tmp_path)
    expected = RolloutCount(35, int(both.prompt_lengths.sum()), int(both.response_lengths.sum()))
    assert count_rollouts(tmp_path) == expected
    prompts, responses = rollout_lengths(tmp_path)
    assert prompts.tolist() == both.prompt_lengths.tolist() and responses.tolist() == both.response_lengths.tolist()


def test_other_columns(tmp_path: Path) -> None:
    table = pa.table({"p": [[1, 2], [3]], "r": pa.array([[4], [5, 6, 7]], pa.large_list(pa.int64())), "rr": [1, 2]})
    pq.write_table(table, tmp_path / "f.parquet")
    assert count_rollouts(tmp_path / "f.parquet", prompt="p", response="r") == RolloutCount(2, 3, 4)
    lengths = rollout_lengths(tmp_path / "f.parquet", prompt="p", response="r")
    assert [column.tolist() for column in lengths] == [[2, 1], [1, 3]]
    assert count_rollouts(tmp_path / "f.parquet") is None


def test_nothing_to_count(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text("{}")
    assert count_rollouts(tmp_path) is None
    assert count_rollouts(tmp_path / "f.jsonl") is None
    (tmp_path / "g.parquet").write_text("{}")
    with pytest.raises(RolloutError, match="g.parquet: isn't a readable Parquet file"):
        count_rollouts(tmp_path)
