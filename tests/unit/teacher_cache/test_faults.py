"""A cache that isn't what was written, or isn't for what is trained: the right rows are read, or an error names it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.errors import CacheError, StageError
from megatron_erpd.manifest import verify_manifest, write_manifest
from megatron_erpd.teacher_cache import CacheReader, prepare_cache
from megatron_erpd.teacher_cache.verify import verify_cache
from tests.unit.teacher_cache.caches import (
    HIDDEN_META,
    PRINTS,
    TOKEN_META,
    assert_same,
    contents,
    fill,
    make,
    rewrite,
    update_record,
    with_row,
)

FLIPS_PER_FILE = 18
PART = "part-00000-00000.arrow"
TARGET = f"topk/{PART}"


def read_all(folder: Path, rollouts: Rollouts) -> dict[str, dict[str, np.ndarray]]:
    """As a training does it: rows are checked against the rollouts, then each is read."""
    cache = CacheReader(folder)
    cache.check(rollouts)
    return contents(cache, rollouts.sample_ids)


# Damage


def test_any_bit(tmp_path: Path, rollouts: Rollouts) -> None:
    """A flipped bit in any file: verification refuses it, and reading gives the right rows or an error."""
    folder = tmp_path / "cache"
    make(folder, rollouts, HIDDEN_META, writers=2)
    write_manifest(folder, "precompute", {}, {})
    expected, rng = read_all(folder, rollouts), np.random.default_rng(0)
    refused = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        data = path.read_bytes()
        for place in rng.integers(0, len(data), FLIPS_PER_FILE):
            changed = bytearray(data)
            changed[place] ^= 1 << rng.integers(8)
            path.write_bytes(bytes(changed))
            with pytest.raises(StageError, match=f"{path}: differs from what manifest.json recorded"):
                verify_manifest(folder)
            found = verify_cache(folder, rollouts)
            assert found or path.name in ("index.arrow", "cache.json"), f"{path}: byte {place}"
            try:
                rows = read_all(folder, rollouts)
            except CacheError as error:
                refused += 1
                assert str(folder) in str(error)
                assert found, f"{path}: byte {place}: {error}"
            else:
                assert_same(rows, expected)
        path.write_bytes(data)
    assert_same(read_all(folder, rollouts), expected)
    assert verify_cache(folder, rollouts) == [] and refused > 50


@pytest.mark.parametrize("size", [0, 8, 500, -9, -1])
def test_a_truncated_part(tmp_path: Path, rollouts: Rollouts, size: int) -> None:
    make(tmp_path, rollouts, HIDDEN_META)
    path = tmp_path / TARGET
    path.write_bytes(path.read_bytes()[:size])
    message = rf"{TARGET}: is damaged \(\d+ bytes, cache.json says \d+\); put back a copy"
    with pytest.raises(CacheError, match=message):
        read_all(tmp_path, rollouts)
    assert any(TARGET in text for text in verify_cache(tmp_path))
    (tmp_path / "cache.json").unlink()  # unfinished now: nothing says how long it should be
    with pytest.raises(CacheError, match=f"{TARGET}: is damaged .*; delete this file and run the same command again"):
        prepare_cache(tmp_path, HIDDEN_META)


def test_a_missing_part(tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path, rollouts, HIDDEN_META)
    (tmp_path / TARGET).unlink()
    with pytest.raises(CacheError, match=f"{TARGET}: is listed in cache.json but missing; put back a copy"):
        read_all(tmp_path, rollouts)
    assert CacheReader(tmp_path).token_row("base", rollouts.sample_ids[0]) is not None, "other tables are whole"


REORDERED: dict[str, tuple[Callable[[pa.RecordBatch], pa.RecordBatch], str]] = {
    "twice": (lambda b: pa.concat_batches([b, b.slice(3, 1)]), "13 rows, cache.json says 12"),
    "missing": (lambda b: b.slice(0, 11), "11 rows, cache.json says 12"),
    "another": (lambda b: with_row(b, 2, sample_id="stranger"), "topk has no row for sample"),
    "instead": (lambda b: pa.concat_batches([b.slice(0, 11), b.slice(0, 1)]), "topk has no row for sample"),
    "reordered": (lambda b: b.take(pa.array([1, 0, *range(2, 12)])), "topk has no row for sample"),
}


@pytest.mark.parametrize("kind", REORDERED)
def test_rows_that_are_not_as_they_were_written(kind: str, tmp_path: Path, rollouts: Rollouts) -> None:
    """Even where sizes and checksums in `cache.json` were made to fit."""
    make(tmp_path, rollouts, HIDDEN_META)
    change, message = REORDERED[kind]
    rewrite(tmp_path / TARGET, change)
    update_record(tmp_path, TARGET)
    with pytest.raises(CacheError, match=message):
        read_all(tmp_path, rollouts)
    assert any("topk" in text for text in verify_cache(tmp_path))


def test_payloads_that_changed_places(tmp_path: Path, rollouts: Rollouts) -> None:
    """Two rows of one length whose log-probs are exchanged: each checksum belongs to its row."""
    lengths = rollouts.response_lengths.tolist()
    i, j = next((i, j) for i in range(12) for j in range(i) if lengths[i] == lengths[j])
    make(tmp_path, rollouts, TOKEN_META)

    def exchange(batch: pa.RecordBatch) -> pa.RecordBatch:
        values, crcs = (batch.column(name).to_pylist() for name in ("log_probs", "payload_crc"))
        batch = with_row(batch, i, log_probs=values[j], payload_crc=crcs[i])
        return with_row(batch, j, log_probs=values[i], payload_crc=crcs[j])

    rewrite(tmp_path / "log_probs.base" / PART, exchange)
    update_record(tmp_path, f"log_probs.base/{PART}")
    with pytest.raises(
        CacheError, match=rf"the payload of sample {rollouts.sample_ids[min(i, j)]} \(row {min(i, j)}\)"
    ):
        read_all(tmp_path, rollouts)


def test_a_buffer_shorter_than_its_column(tmp_path: Path, rollouts: Rollouts) -> None:
    """Arrow would read on behind it: other memory, or none."""
    make(tmp_path, rollouts, TOKEN_META)
    path = tmp_path / "log_probs.base" / PART
    length = struct.pack("<q", 4 * int(rollouts.response_lengths.sum()))
    data = path.read_bytes()
    assert data.count(length) == 1
    path.write_bytes(data.replace(length, struct.pack("<q", 8)))
    with pytest.raises(CacheError, match=f"{PART}: is damaged .*too small"):
        read_all(tmp_path, rollouts)


@pytest.mark.parametrize("kind", ["no row", "a row without a name", "a row without a checksum"])
def test_keys_that_are_not_there(kind: str, tmp_path: Path, rollouts: Rollouts) -> None:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        if kind == "no row":
            return batch.slice(0, 0)
        place = 0 if kind == "a row without a name" else 1
        values = batch.column(place).to_pylist()
        column = pa.array([None, *values[1:]], type=batch.schema.field(place).type)
        columns = [column if i == place else batch.column(i) for i in range(batch.num_columns)]
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema)

    fill(tmp_path, rollouts, TOKEN_META)
    rewrite(tmp_path / "log_probs.base" / PART, change)
    with pytest.raises(CacheError, match=f"{PART}: is damaged .*; delete this file and run the same command again"):
        prepare_cache(tmp_path, TOKEN_META)


# Something else than the cache was made for


def test_edited_rollouts(tmp_path: Path, rollouts: Rollouts) -> None:
    """One token of one response, under the same name."""
    make(tmp_path / "cache", rollouts, HIDDEN_META)
    rows = [rollouts.record(i) for i in range(len(rollouts))]
    rows[7].response_token_ids = (rows[7].response_token_ids + 1) % 40
    write_rollouts(tmp_path / "edited.parquet", rows, {"tokenizer_digest": "tok"})
    edited = read_rollouts(tmp_path / "edited.parquet")
    assert edited.sample_ids == rollouts.sample_ids
    with pytest.raises(CacheError, match=f"holds sample {edited.sample_ids[7]} .*row 7.* for other token ids"):
        read_all(tmp_path / "cache", edited)
    problems = verify_cache(tmp_path / "cache", edited)
    assert len(problems) == len(HIDDEN_META.tables) and all(edited.sample_ids[7] in text for text in problems)


def test_another_teacher(tmp_path: Path, rollouts: Rollouts) -> None:
    cache = make(tmp_path, rollouts, HIDDEN_META)
    with pytest.raises(
        CacheError, match="made from another teacher: policy 'teacher' has fingerprint tttttttt, expected"
    ):
        cache.require_policies(PRINTS | {"teacher": "new"})
    # Parts of a cache of another teacher under this one's description.
    other = replace(HIDDEN_META, fingerprints=PRINTS | {"teacher": "new"})
    make(tmp_path / "other", rollouts, other)
    shutil.copy(tmp_path / "other" / TARGET, tmp_path / TARGET)
    update_record(tmp_path, TARGET)
    with pytest.raises(CacheError, match=f"{TARGET}: was written with other settings or policies.*fingerprints is"):
        read_all(tmp_path, rollouts)


def test_another_tokenizer(tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path, rollouts, replace(HIDDEN_META, tokenizer_digest="other"))
    with pytest.raises(
        CacheError, match="tokenizer_digest is other, the rollouts' is tok: made with another tokenizer"
    ):
        read_all(tmp_path, rollouts)


def test_a_version_from_the_future(tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path, rollouts, HIDDEN_META)
    key = b"megatron_erpd.cache.part"

    def newer(batch: pa.RecordBatch) -> pa.RecordBatch:
        about = json.loads(batch.schema.metadata[key]) | {"format_version": 4}
        return batch.replace_schema_metadata({key: json.dumps(about).encode()})

    rewrite(tmp_path / TARGET, newer)
    update_record(tmp_path, TARGET)
    with pytest.raises(CacheError, match=f"{TARGET}: format_version 4, this program reads 3; read it with the program"):
        read_all(tmp_path, rollouts)
    path = tmp_path / "cache.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 4'))
    with pytest.raises(
        CacheError, match="cache.json: format_version 4, this program reads 3; read it with the program"
    ):
        read_all(tmp_path, rollouts)
    assert "format_version 4" in verify_cache(tmp_path)[0]
