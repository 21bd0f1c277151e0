import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_erpd.data.rollouts import (
    Rollouts,
    read_rollouts,
    sample_id,
    validate_against_vocabulary,
    write_rollouts,
)
from megatron_erpd.data.schema import ROLLOUT_SCHEMA, VERSION_KEY
from megatron_erpd.errors import RolloutError

Rows = Callable[..., list[dict[str, Any]]]


def assert_same_row(rollouts: Rollouts, i: int, row: dict[str, Any]) -> None:
    np.testing.assert_array_equal(rollouts.prompt_tokens(i), row["prompt_token_ids"])
    np.testing.assert_array_equal(rollouts.response_tokens(i), row["response_token_ids"])
    assert rollouts.prompt_tokens(i).dtype == rollouts.response_tokens(i).dtype == np.int64
    log_probs = rollouts.behavior_log_probs(i)
    if row["behavior_log_probs"] is None:
        assert log_probs is None and not rollouts.has_behavior_log_probs[i]
    else:
        assert log_probs is not None and log_probs.dtype == np.float32
        np.testing.assert_array_equal(log_probs, row["behavior_log_probs"].astype(np.float32))
    assert rollouts.group_ids[i] == row["group_id"]
    if row["reward"] is None:
        assert np.isnan(rollouts.rewards[i]) and rollouts.reward_status[i] == "unverified"
    else:
        assert rollouts.rewards[i] == row["reward"] and rollouts.reward_status[i] == "scored"
    assert rollouts.finish_reason(i) == row["finish_reason"]
    assert (rollouts.prompt_text(i), rollouts.response_text(i)) == (row["prompt"], row["response"])
    assert rollouts.metadata(i) == row["metadata"]
    assert rollouts.lengths[i] == len(row["prompt_token_ids"]) + len(row["response_token_ids"])
    assert rollouts.sample_ids[i] == sample_id(row["prompt_token_ids"], row["response_token_ids"])


def test_round_trip_over_row_groups(tmp_path: Path, rows: Rows) -> None:
    written = rows(30)
    assert write_rollouts(tmp_path / "r.parquet", written, {"tokenizer_digest": "t", "n": 3}, row_group_rows=7) == 30
    assert pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 5
    rollouts = read_rollouts(tmp_path / "r.parquet")
    assert len(rollouts) == 30
    for i, row in enumerate(written):
        assert_same_row(rollouts, i, row)
    assert rollouts.file_metadata == {"tokenizer_digest": "t", "n": 3}
    assert rollouts.tokenizer_digest == "t"
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


def test_folder_of_parts_is_the_same_set(tmp_path: Path, rows: Rows) -> None:
    written = rows(30)
    write_rollouts(tmp_path / "whole.parquet", written)
    for part, start in enumerate((0, 11, 20)):
        end = (11, 20, 30)[part]
        write_rollouts(tmp_path / "parts" / f"part-{part}.parquet", written[start:end], row_group_rows=4)
    (tmp_path / "parts" / ".part-9.parquet.tmp").write_text("unfinished")
    whole, parts = read_rollouts(tmp_path / "whole.parquet"), read_rollouts(tmp_path / "parts")
    for i, row in enumerate(written):
        assert_same_row(parts, i, row)
    assert parts.digest() == whole.digest()
    assert parts.location(12).startswith(str(tmp_path / "parts" / "part-1.parquet") + ": row 1 ")


def test_select_shares_rows_and_nests(rollouts: Rollouts) -> None:
    chosen = rollouts.select([20, 3, 8, 5])
    assert chosen.sample_ids == [rollouts.sample_ids[i] for i in (20, 3, 8, 5)]
    np.testing.assert_array_equal(chosen.response_tokens(1), rollouts.response_tokens(3))
    again = chosen.select(np.array([True, False, False, True]))
    assert again.sample_ids == [rollouts.sample_ids[i] for i in (20, 5)]
    np.testing.assert_array_equal(again.lengths, rollouts.lengths[[20, 5]])
    assert again.location(1) == rollouts.location(5)
    assert len(again) == 2 and again.digest() != rollouts.digest()


def test_record_round_trip_keeps_digest(rollouts: Rollouts, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "again.parquet", (rollouts.record(i) for i in range(len(rollouts))))
    assert read_rollouts(tmp_path / "again.parquet").digest() == rollouts.digest()


@pytest.mark.parametrize("change", ["token", "log_prob", "reward", "group", "none"])
def test_digest_sees_what_training_reads(tmp_path: Path, rows: Rows, change: str) -> None:
    written = rows(9)
    write_rollouts(tmp_path / "a.parquet", written)
    ids = read_rollouts(tmp_path / "a.parquet").sample_ids
    for row, name in zip(written, ids, strict=True):
        row["sample_id"] = name
    if change == "token":
        written[4]["response_token_ids"][0] += 1
    elif change == "log_prob":
        written[4]["behavior_log_probs"] = None
    elif change == "reward":
        written[4]["reward"] = 0.25
    elif change == "group":
        written[4]["group_id"] = 99
    else:
        written[4]["prompt"] = "text and metadata aren't training data"
    write_rollouts(tmp_path / "b.parquet", written)
    same = read_rollouts(tmp_path / "a.parquet").digest() == read_rollouts(tmp_path / "b.parquet").digest()
    assert same == (change == "none")


def test_sample_id_is_content_and_pinned() -> None:
    assert sample_id([1, 2], [3]) == sample_id(np.array([1, 2], np.int32), np.array([3]))
    names = {sample_id([1, 2], [3]), sample_id([1], [2, 3]), sample_id([1, 2], [3], k=1), sample_id([1, 2], [4])}
    assert len(names) == 4
    # Caches on disk are keyed by it: this value must never change.
    assert sample_id([1, 2], [3]) == "ebe9630ba7b62c0972013fc695c46ae3"


def test_repeated_draws_get_names_of_their_own(tmp_path: Path) -> None:
    row = {"prompt_token_ids": [1], "response_token_ids": [2, 3], "group_id": 0, "reward": 1.0}
    write_rollouts(tmp_path / "r.parquet", [row, row, row])
    expected = [sample_id([1], [2, 3], k) for k in range(3)]
    assert read_rollouts(tmp_path / "r.parquet").sample_ids == expected


def test_token_crc_is_zlib_over_int32(rollouts: Rollouts) -> None:
    for i in range(5):
        tokens = np.concatenate([rollouts.prompt_tokens(i), rollouts.response_tokens(i)])
        assert rollouts.token_crc(i) == zlib.crc32(tokens.astype("<i4").tobytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_token_ids": []}, "response_token_ids: empty"),
        ({"prompt_token_ids": []}, "prompt_token_ids: empty"),
        ({"response_token_ids": [1.5]}, "response_token_ids: 1.5 at position 0"),
        ({"response_token_ids": [True]}, "response_token_ids: True at position 0"),
        ({"response_token_ids": np.array([1.0])}, "response_token_ids: expected a flat integer array"),
        ({"response_token_ids": [3, -1]}, "token id -1 at position 1"),
        ({"response_token_ids": [2**31]}, "token id 2147483648"),
        ({"response_token_ids": [2**70]}, "doesn't fit 64 bits"),
        ({"response_token_ids": [50]}, "token id 50 is beyond the vocabulary of 50"),
        ({"response_token_ids": "12"}, "expected a list of token ids, got str"),
        ({"behavior_log_probs": [-0.1]}, "behavior_log_probs: 1 values for 2"),
        ({"behavior_log_probs": [-0.1, np.nan]}, "behavior_log_probs: nan at position 1"),
        ({"behavior_log_probs": [-0.1, -np.inf]}, "behavior_log_probs: -inf at position 1"),
        ({"behavior_log_probs": [0.9, 0.8]}, "behavior_log_probs: 0.89"),
        ({"behavior_log_probs": ["a", "b"]}, "behavior_log_probs: expected a list of numbers"),
        ({"reward": float("nan")}, "reward: nan"),
        ({"reward": 1e60}, "reward: 1e.60"),
        ({"reward": {"score": 1}}, "reward: expected a number, got dict"),
        ({"reward": None, "reward_status": "scored"}, "reward is None but reward_status is 'scored'"),
        ({"reward_status": "wrong"}, "reward_status: 'wrong'"),
        ({"group_id": "a"}, "group_id: 'a'"),
        ({"group_id": None}, "group_id: is missing"),
        ({"rewrad": 1}, "rewrad: isn't a column"),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"prompt_token_ids": [1], "response_token_ids": [2, 3], "group_id": 0, "reward": 1.0}
    path = tmp_path / "r.parquet"
    with pytest.raises(RolloutError, match=message) as error:
        write_rollouts(path, [good, good | change], vocab_size=50)
    assert str(error.value).startswith(f"{path}: row 1 (counted from 0): ")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_file_before(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "r.parquet"
    write_rollouts(path, rows(3))
    before = path.read_bytes()

    def broken() -> Any:
        yield from rows(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(path, broken())
    with pytest.raises(RolloutError, match="no rollouts to write"):
        write_rollouts(path, [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


def raw_file(path: Path, change: dict[str, Any]) -> Path:
    """Two rows written behind the writer's back; `change` is to the second."""
    good = {
        "sample_id": "a",
        "group_id": 0,
        "prompt_token_ids": [1],
        "response_token_ids": [2, 3],
        "behavior_log_probs": [-0.5, -0.25],
        "reward": 1.0,
        "reward_status": "scored",
        "finish_reason": None,
        "prompt": None,
        "response": None,
        "metadata": None,
    }
    schema = pa.schema([field.with_nullable(True) for field in ROLLOUT_SCHEMA], {VERSION_KEY: b"1"})
    pq.write_table(pa.Table.from_pylist([good, good | {"sample_id": "b"} | change], schema=schema), path)
    return path


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"sample_id": "a"}, "sample_id", "already the name of"),
        ({"sample_id": None}, "sample_id", "is null"),
        ({"sample_id": ""}, "sample_id", "is empty"),
        ({"group_id": None}, "group_id", "is null"),
        ({"prompt_token_ids": []}, "prompt_token_ids", "is empty"),
        ({"response_token_ids": None}, "response_token_ids", "is null"),
        ({"response_token_ids": [4, None]}, "response_token_ids", "null element"),
        ({"response_token_ids": [4, -2]}, "response_token_ids", "negative"),
        ({"behavior_log_probs": [-1.0]}, "behavior_log_probs", "1 values for 2"),
        ({"behavior_log_probs": [-1.0, float("nan")]}, "behavior_log_probs", "log probability|log-prob|natural-log"),
        ({"reward": None}, "reward", "disagree"),
        ({"reward_status": "unverified"}, "reward", "disagree"),
        ({"reward_status": "maybe"}, "reward_status", "'maybe'"),
        ({"reward": float("inf")}, "reward", "finite"),
    ],
)
def test_reader_names_file_row_and_field(tmp_path: Path, change: dict[str, Any], field: str, message: str) -> None:
    path = raw_file(tmp_path / "r.parquet", change)
    with pytest.raises(RolloutError, match=message) as error:
        read_rollouts(path)
    assert str(error.value).startswith(f"{path}: row 1 (counted from 0): {field}: ")


def test_reader_takes_a_good_raw_file(tmp_path: Path) -> None:
    assert len(read_rollouts(raw_file(tmp_path / "r.parquet", {"behavior_log_probs": None}))) == 2


@pytest.mark.parametrize(("text", "message"), [("{", "isn't JSON"), ("[1]", "is a list")])
def test_bad_metadata_is_named_when_read(tmp_path: Path, text: str, message: str) -> None:
    rollouts = read_rollouts(raw_file(tmp_path / "r.parquet", {"metadata": text}))
    assert rollouts.metadata(0) == {}
    with pytest.raises(RolloutError, match=message):
        rollouts.metadata(1)


def test_reader_refuses_files_that_are_not_rollouts(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(RolloutError, match="no such file"):
        read_rollouts(tmp_path / "nothing")
    with pytest.raises(RolloutError, match=re.escape("holds no *.parquet")):
        read_rollouts(tmp_path)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(RolloutError, match="import-rollouts"):
        read_rollouts(foreign)
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({VERSION_KEY: b"99"}), foreign)
    with pytest.raises(RolloutError, match="schema version 99"):
        read_rollouts(foreign)
    pq.write_table(pa.table({"sample_id": [1]}).replace_schema_metadata({VERSION_KEY: b"1"}), foreign)
    with pytest.raises(RolloutError, match="'sample_id' is int64, expected string"):
        read_rollouts(foreign)
    path = tmp_path / "cut.parquet"
    write_rollouts(path, rows(20))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RolloutError, match="cut.parquet: isn't a readable"):
        read_rollouts(path)


def test_parts_of_two_tokenizers_are_refused(tmp_path: Path, rows: Rows) -> None:
    write_rollouts(tmp_path / "a.parquet", rows(4), {"tokenizer_digest": "x"})
    write_rollouts(tmp_path / "b.parquet", rows(4, seed=1), {"tokenizer_digest": "y"})
    with pytest.raises(RolloutError, match="tokenizer_digest differs"):
        read_rollouts(tmp_path)


def test_validate_against_vocabulary(rollouts: Rollouts) -> None:
    largest = max(int(max(rollouts.prompt_tokens(i).max(), rollouts.response_tokens(i).max())) for i in range(30))
    validate_against_vocabulary(rollouts, largest + 1)
    with pytest.raises(RolloutError, match=f"token id {largest} is beyond the model's vocabulary of {largest}"):
        validate_against_vocabulary(rollouts, largest)


def test_metadata_that_json_does_not_know_is_kept_as_text(tmp_path: Path) -> None:
    row = {"prompt_token_ids": [1], "response_token_ids": [2], "group_id": 0, "reward": 1, "metadata": {"p": Path("x")}}
    write_rollouts(tmp_path / "r.parquet", [row])
    assert json.dumps(read_rollouts(tmp_path / "r.parquet").metadata(0)) == '{"p": "x"}'
