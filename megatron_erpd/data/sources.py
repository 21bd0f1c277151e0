"""Rows of the files that rollouts are imported from: JSON lines and Parquet, streamed, each with its place."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_erpd.data.schema import RowProblem
from megatron_erpd.errors import RolloutError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
# Rows become Python objects, long responses large ones: few at a time.
PARQUET_BATCH_ROWS = 64


def source_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files meant by a file, a folder (all its JSON-lines and Parquet files, in name order) or a list of these.

    Raises `RolloutError` for what doesn't exist or has another suffix.
    """
    if not isinstance(source, str | Path):
        return [path for item in source for path in source_files(item)]
    path = Path(source)
    suffixes = JSON_SUFFIXES + PARQUET_SUFFIXES
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in suffixes and not p.name.startswith("."))
        if not found:
            raise RolloutError(f"{path}: holds no file ending in {', '.join(suffixes)}")
        return found
    if not path.is_file():
        raise RolloutError(f"{path}: no such file or folder")
    if path.suffix not in suffixes:
        raise RolloutError(f"{path}: must end in {', '.join(suffixes)}; rename it or convert it")
    return [path]


def read_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | RowProblem]]:
    """Streams a file's rows.

    Args:
        path: a JSON-lines or Parquet file.
        columns: the top-level fields that will be asked for (others of a Parquet file aren't read).

    Yields:
        (place, row): 'file:line' counted from 1 for JSON lines, 'file: row n' counted from 0 for Parquet; the row is a
        `RowProblem` when the line can't be parsed.
    """
    return _json_rows(path) if path.suffix in JSON_SUFFIXES else _parquet_rows(path, columns)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | RowProblem]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> dict[str, Any] | RowProblem:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return RowProblem("unreadable", "line", f"isn't JSON ({error}); JSON lines hold one object per line")
    if not isinstance(row, dict):
        return RowProblem("unreadable", "line", f"is a JSON {type(row).__name__}, expected an object per line")
    return row


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | RowProblem]]:
    try:
        file = pq.ParquetFile(path, memory_map=True)
        wanted = [name for name in file.schema_arrow.names if name in columns]
        number = 0
        # An empty selection would lose the number of rows, and every row is then refused by name.
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=wanted or None, use_threads=False):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise RolloutError(f"{path}: can't be read as Parquet ({error}); is it complete?") from error
