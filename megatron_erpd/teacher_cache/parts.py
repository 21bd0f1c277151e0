"""One file of a table: written whole or not at all, opened memory-mapped, every row with a checksum of its payload."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_erpd.data.ragged import list_array
from megatron_erpd.errors import CacheError, full_disk
from megatron_erpd.files import new_file
from megatron_erpd.teacher_cache.format import KEYS, PART_KEY, REMEDY, CacheMeta, check_version

UNFINISHED_REMEDY = "delete this file and run the same command again: it writes these rows anew"
MAX_ELEMENTS = 2**31 - 1
"""Of a column of a part: Arrow's offsets are int32."""


def payload_crc(columns: Mapping[str, np.ndarray]) -> int:
    """CRC-32 (zlib's) of a row's payload: its columns' bytes one after the other, in the schema's order."""
    crc = 0
    for values in columns.values():
        crc = zlib.crc32(np.ascontiguousarray(values).view(np.uint8), crc)
    return crc


def write_part(
    path: Path, schema: pa.Schema, keys: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Writes one part and gives it its name when it is on disk.

    Args:
        path: must not exist: two writers never write over each other's rows.
        keys: the columns of `KEYS`.
        rows: the payload of each row, flat arrays of the schema's types.

    Returns:
        The file's SHA-256.

    Raises:
        CacheError: the file exists already, or can't be written (a full disk); no part of it is left.
    """
    payload = list(schema)[len(KEYS) :]
    if any(sum(len(row[item.name]) for row in rows) > MAX_ELEMENTS for item in payload):
        longest = keys["sample_id"][int(np.argmax(keys["num_tokens"]))]
        raise CacheError(
            f"{path}: sample {longest} and {len(rows) - 1} others have more than {MAX_ELEMENTS} elements in a column, "
            "which a part can't hold; leave out the longest rollouts"
        )
    arrays = [pa.array(keys[item.name], type=item.type) for item in KEYS]
    arrays += [list_array([row[item.name] for row in rows], item.type.value_type) for item in payload]
    with new_cache_file(path, replace=False) as temporary, open(temporary, "wb") as file:
        sink = _Hashing(file)
        with pa.ipc.new_file(pa.PythonFile(sink, "w"), schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.digest.hexdigest()


@contextmanager
def new_cache_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """`new_file` with the cache's words.

    Raises:
        CacheError: what went wrong with the file system meanwhile, and what to do.
    """
    try:
        with new_file(path, replace=replace) as temporary:
            yield temporary
    except FileExistsError:
        raise CacheError(f"{path}: was written by somebody else meanwhile; let one process write this cache") from None
    except OSError as error:
        what = "repair the file system" if full_disk(error) is None else "free space there"
        raise CacheError(
            f"{path}: can't be written ({error}); {what} and run the same command again, it goes on after the last "
            "complete part"
        ) from error


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is written."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self.file.write(data))

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """The file is closed by whoever opened it."""


@dataclass
class Statistic:
    """Mean, minimum and maximum of what was added, in float64."""

    total: float = 0.0
    count: int = 0
    min: float = np.inf
    max: float = -np.inf

    def add(self, values: np.ndarray) -> None:
        """Adds the values of an array that isn't empty."""
        self.merge(
            Statistic(float(values.sum(dtype=np.float64)), values.size, float(values.min()), float(values.max()))
        )

    def merge(self, other: Statistic) -> None:
        """Adds what another one has seen."""
        self.total += other.total
        self.count += other.count
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def summary(self) -> dict[str, float]:
        return {"mean": self.total / self.count, "min": self.min, "max": self.max}

    @classmethod
    def from_json(cls, values: Mapping[str, float]) -> Statistic:
        """The inverse of `asdict`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        if int(values["count"]) < 1:
            raise ValueError(f"count {values['count']}")
        return cls(float(values["total"]), int(values["count"]), float(values["min"]), float(values["max"]))


class Part:
    """A part, memory-mapped. Opening checks the keys and the shape of all rows; `row` checks the payload it gives.

    Args:
        path: the file.
        table, meta: what it must be a part of.
        expected: its entry in `cache.json`, where there is one.

    Attributes:
        sample_ids: Arrow strings; crc, num_tokens, payload_crc: `[N]`; facts: of the whole table.

    Raises:
        CacheError: the file is missing, truncated or damaged, or of another table or cache (names the field).
    """

    def __init__(self, path: Path, table: str, meta: CacheMeta, expected: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._remedy = UNFINISHED_REMEDY if expected is None else REMEDY
        if not path.is_file():
            raise CacheError(f"{path}: is listed in cache.json but missing; {self._remedy}")
        size = path.stat().st_size
        if expected is not None and size != expected["bytes"]:
            raise self._damaged(f"{size} bytes, cache.json says {expected['bytes']}")
        self._columns = meta.columns(table)
        batch = self._read()
        self.facts = self._check_schema(batch.schema, table, meta)
        self._statistics = self.facts.pop("statistics", {})
        try:
            batch.validate()  # that the buffers are as long as the columns: nothing else looks, reading least of all
            batch.column(0).validate(full=True)
            keys = [batch.column(i) for i in range(len(KEYS))]
            if any(key.null_count for key in keys) or not len(keys[0]):
                raise ValueError("a row without keys, or no row")
            self.sample_ids: pa.StringArray = keys[0]
            self.crc, self.num_tokens, self.payload_crc = (key.to_numpy() for key in keys[1:])
            self._payload = {name: self._flat(batch, name) for name in self._columns}
        except (pa.ArrowException, ValueError, MemoryError) as error:
            raise self._damaged(str(error)) from error
        self._offsets = np.concatenate([[0], np.cumsum(self.num_tokens, dtype=np.int64)])
        if expected is not None and len(self) != expected["num_rows"]:
            raise self._damaged(f"{len(self)} rows, cache.json says {expected['num_rows']}")

    def __len__(self) -> int:
        return len(self.crc)

    def statistics(self) -> dict[str, Statistic]:
        """Sums over the part's response tokens, by name. Raises `CacheError` where they are damaged."""
        try:
            return {name: Statistic.from_json(values) for name, values in self._statistics.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"statistics: {error!r}") from error

    def row(self, i: int) -> dict[str, np.ndarray]:
        """A row's payload, column -> `[R]` or `[R, width]`: read-only views of the mapped file, checked.

        Raises:
            CacheError: the payload isn't what was written (names the sample).
        """
        start, end = self._offsets[i], self._offsets[i + 1]
        found = {}
        for name, column in self._columns.items():
            values = self._payload[name][start * column.size : end * column.size]
            found[name] = values if column.width is None else values.reshape(-1, column.width)
        if payload_crc(found) != self.payload_crc[i]:
            raise self._damaged(f"the payload of sample {self.sample_ids[i]} (row {i}) isn't what was written")
        return found

    def _read(self) -> pa.RecordBatch:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            if reader.num_record_batches != 1:
                raise self._damaged(f"{reader.num_record_batches} record batches, expected 1")
            return reader.get_batch(0)
        except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
            raise self._damaged(str(error)) from error

    def _check_schema(self, schema: pa.Schema, table: str, meta: CacheMeta) -> dict[str, Any]:
        text = (schema.metadata or {}).get(PART_KEY)
        if text is None:
            raise CacheError(f"{self.path}: isn't a part of a teacher cache; remove it from the folder")
        try:
            about = json.loads(text)
            version, own_table, own, facts = (about[name] for name in ("format_version", "table", "meta", "facts"))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._damaged(repr(error)) from error
        if not isinstance(own, dict) or not isinstance(facts, dict):
            raise self._damaged("meta and facts aren't mappings")
        check_version(version, self.path)
        if own_table != table:
            raise CacheError(f"{self.path}: is a part of table {own_table!r}, not of {table!r}; remove it")
        differing = differences(own, meta.of_table(table))
        if differing:
            raise CacheError(
                f"{self.path}: was written with other settings or policies than the rest: {'; '.join(differing)}; "
                "delete the cache's folder and precompute again"
            )
        if not schema.equals(meta.schema(table)):
            raise self._damaged("its columns aren't those of the table")
        return facts

    def _flat(self, batch: pa.RecordBatch, name: str) -> np.ndarray:
        """The column's elements, row after row; its offsets must be those that follow from `num_tokens`."""
        column, size = batch.column(name), self._columns[name].size
        if column.null_count or int(self.num_tokens.min()) < 1:
            raise ValueError(f"{name}: a row without response tokens")
        offsets, values = column.offsets.to_numpy(), column.values
        expected = np.cumsum(self.num_tokens, dtype=np.int64) * size
        if offsets[0] != 0 or not np.array_equal(offsets[1:], expected) or offsets[-1] > len(values):
            raise ValueError(f"{name}: its rows aren't as long as num_tokens says")
        return values.to_numpy(zero_copy_only=True)

    def _damaged(self, why: str) -> CacheError:
        return CacheError(f"{self.path}: is damaged ({why}); {self._remedy}")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """`field: found, expected` of every field of two metas that differs."""
    names = sorted({*found, *expected})
    return [
        f"{name} is {found.get(name)!r}, expected {expected.get(name)!r}"
        for name in names
        if found.get(name) != expected.get(name)
    ]
