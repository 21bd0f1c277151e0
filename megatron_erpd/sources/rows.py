"""The rows of a file, one after another, each with its place: the one door for prompts and rollouts alike.

| suffix | rows | place |
|---|---|---|
| `.jsonl`, `.ndjson` | an object a line | `file:line` |
| `.json` | an object a line, an array of objects, or an object with a list of them | `file:line`, or `file: row n` |
| `.csv`, `.tsv` | a line each, all values text (`TextRow`), names in the first line | `file:line` |
| `.parquet`, `.arrow` | | `file: row n` |

The first four also compressed: `.gz`, `.bz2`, `.xz`, `.zst`. Lines count from 1, rows from 0.

JSON is parsed line by line and not with the JSON reader of `datasets`, which infers one schema for all rows: it makes
timestamps of text, nulls of missing keys, and fails on what one row writes otherwise than another.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_erpd.data.schema import RowProblem
from megatron_erpd.errors import RolloutError, first_line
from megatron_erpd.sources.names import COMPRESSED, file_format

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | RowProblem]]

# What a file begins with, and what it should end in then.
_MAGIC = {
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
_UNREADABLE = {
    b"\xff\xfe\x00\x00": "is UTF-32; convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)",
    b"\x00\x00\xfe\xff": "is UTF-32; convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"version https://git-lfs": "is a pointer of Git LFS, not the data; run `git lfs pull`",
    b"PK\x03\x04": "is a zip archive; unpack it",
}
_BOM = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
# Rows become Python objects, long responses large ones: few at a time.
_BATCH_ROWS = 64
_CHUNK = 1 << 20  # characters of a JSON array


class TextRow(dict[str, Any]):
    """A row of a format that knows text alone. What should be a number, a list or an object is parsed where it is
    used (`parsed`)."""


def read_rows(path: Path, columns: Collection[str] | None = None) -> Rows:
    """Streams a file's rows; only one JSON object that holds all rows is read whole.

    Args:
        path: a file for which `file_format` knows a format.
        columns: the top-level fields that will be asked for (others of a Parquet or Arrow file aren't read); None
            for all of them.

    Yields:
        (place, row); the row is a `RowProblem` when it can't be read and the next ones can.

    Raises:
        RolloutError: the file can't be read, or not from here on.
    """
    kind = file_format(path)
    assert kind is not None, path
    at = "at its beginning"
    try:
        _check_beginning(path)
        rows = _parquet_rows(path, columns) if kind == "parquet" else _arrow_rows(path, columns)
        if kind not in ("parquet", "arrow"):
            rows = _csv_rows(path, kind) if kind in ("csv", "tsv") else _json_rows(path, kind, columns)
        for place, row in rows:
            at = f"after {place}"
            yield place, row
    except _READ_ERRORS as error:
        raise RolloutError(f"{path}: can't be read {at} ({first_line(error)}); is it complete?") from error


def parsed(value: Any, field: str) -> Any:
    """A value of a `TextRow` where a number, list or object is wanted: JSON, as Python writes it too; empty is None.

    Raises `RowProblem` for other text.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text in ("", "None", "True", "False"):
        return {"True": True, "False": False}.get(text)
    found = _Parser().parse(text.encode())
    if isinstance(found, RowProblem):
        raise RowProblem("malformed", field, f"{text[:40]!r} is neither a number nor JSON")
    return found


def _check_beginning(path: Path) -> None:
    with open(path, "rb") as file:
        beginning = file.read(32)
    suffix = path.suffix.lower()
    for magic, expected in _MAGIC.items():
        if beginning.startswith(magic) and suffix != expected:
            raise RolloutError(f"{path}: is a {expected} file by its content; rename it")
    for magic, problem in _UNREADABLE.items():
        if beginning.startswith(magic):
            raise RolloutError(f"{path}:1: {problem}")
    if not beginning and suffix in COMPRESSED:
        raise RolloutError(f"{path}: is empty, without even the header of a compressed file; is it complete?")


def _open(path: Path) -> BinaryIO:
    """A file's bytes, decompressed; the members of a concatenation one after another."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        # Arrow's: the usual Python binding silently ends after the first frame, and where a file was cut off.
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers.get(suffix, open)(path, "rb"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1, without a byte order mark. Only a line feed ends a line."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(_BOM) if number == 1 else line


class _Parser:
    """JSON to Python, refusing what Python's parser silently accepts."""

    def __init__(self) -> None:
        self.repeated: str | None = None
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            self.repeated = next(name for name in names if names.count(name) > 1)
        return found

    def parse(self, data: bytes) -> Any:
        """The value, or a `RowProblem`."""
        self.repeated = None
        try:
            value = self.decoder.decode(data.decode())
        except UnicodeDecodeError as error:
            detail = f"isn't UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}); convert the file to UTF-8"
            return RowProblem("unreadable", "line", detail)
        except RecursionError:
            return RowProblem("unreadable", "line", "is nested too deeply to be read")
        except ValueError as error:
            what = "isn't JSON" if isinstance(error, json.JSONDecodeError) else "holds a number that can't be read"
            return RowProblem(
                "unreadable", "line", f"{what} ({first_line(error)}); JSON lines hold one object per line"
            )
        return self.checked(value)

    def row(self, data: bytes) -> Row | RowProblem:
        value = self.parse(data)
        return value if isinstance(value, RowProblem) else as_row(value)

    def checked(self, value: Any) -> Any:
        if self.repeated is not None:
            detail = f"has the key {self.repeated!r} twice in one object; remove one"
            return RowProblem("unreadable", "line", detail)
        return value


def as_row(value: Any) -> Row | RowProblem:
    """A JSON value as a row, which is an object."""
    if isinstance(value, dict):
        return value
    return RowProblem("unreadable", "line", f"is a JSON {type(value).__name__}, expected an object")


def _json_rows(path: Path, kind: str, columns: Collection[str] | None) -> Rows:
    layout = "lines" if kind == "lines" else _json_layout(path)
    if layout == "array":
        return _array_rows(path)
    return _line_rows(path) if layout == "lines" else _document_rows(path, columns or ())


def _line_rows(path: Path) -> Rows:
    parser = _Parser()
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", parser.row(line)


def _json_layout(path: Path) -> str:
    """How a `.json` file holds its rows: `lines`, an `array`, or a `document` of one object."""
    parser = _Parser()
    first: bytes | None = None
    for _, line in _lines(path):
        line = line.strip()
        if not line:
            continue
        if first is None:
            if line.startswith(b"["):
                return "array"
            first = line
            if line.endswith((b"{", b"[", b",")):
                return "document"
        else:
            is_object = isinstance(parser.row(line), dict)
            return "lines" if is_object or isinstance(parser.row(first), dict) else "document"
    return "document" if first and isinstance(parser.parse(first), dict) else "lines"


def _array_rows(path: Path) -> Rows:
    """The elements of a JSON array, decoded one at a time."""
    parser, number = _Parser(), 0
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as reader:

        def refuse(detail: str) -> RolloutError:
            return RolloutError(f"{path}: row {number}: {detail}; what follows can't be read")

        def read(size: int) -> str:
            try:
                return reader.read(size)
            except UnicodeDecodeError as error:
                raise refuse(f"isn't UTF-8 ({error.reason}); convert the file to UTF-8") from error

        text, at, ended = read(_CHUNK).lstrip()[1:], 0, False
        separator, closed = "", False
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at == len(text) and not ended:
                text, at = read(_CHUNK), 0
                ended = not text
                continue
            if at == len(text):
                break
            if closed:
                raise refuse("there is more after the array's end")
            if text[at] == "]" and separator != ",":
                closed, at = True, at + 1
                continue
            if separator == "" and number:
                if text[at] != ",":
                    raise refuse("a comma is missing before it")
                separator, at = ",", at + 1
                continue
            parser.repeated = None
            try:
                value, end = parser.decoder.raw_decode(text, at)
            except RecursionError:
                raise refuse("is nested too deeply to be read") from None
            except json.JSONDecodeError as error:
                # Cut off at the chunk's end (a constant has at most 9 letters), or wrong?
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
                if ended or not is_cut:
                    raise refuse(f"isn't JSON ({error.msg})") from error
                end = len(text)
            except ValueError as error:
                raise refuse(f"holds a number that can't be read ({first_line(error)})") from error
            if end == len(text) and not ended:
                more = read(max(_CHUNK, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            row = parser.checked(value)
            yield f"{path}: row {number}", row if isinstance(row, RowProblem) else as_row(row)
            number, at, separator = number + 1, end, ""
        if not closed:
            raise refuse("the array's end is missing; is the file complete?")


def _document_rows(path: Path, columns: Collection[str]) -> Rows:
    """One object: a row when it has a field that is asked for; otherwise its one list of objects holds the rows."""
    with _open(path) as file:
        value = _Parser().row(file.read().removeprefix(_BOM))
    if isinstance(value, RowProblem) or not value.keys().isdisjoint(columns):
        yield f"{path}:1", value
        return
    lists = [key for key, items in value.items() if isinstance(items, list) and items and isinstance(items[0], dict)]
    if len(lists) != 1:
        yield f"{path}:1", value
        return
    for number, item in enumerate(value[lists[0]]):
        yield f"{path}: {lists[0]}[{number}]", as_row(item)


def _csv_rows(path: Path, kind: str) -> Rows:
    """Rows of text. Python's reader, as pandas' (that of `datasets`) takes a row with a cell too many for one with an
    index, and fills one with a cell too few."""
    csv.field_size_limit(sys.maxsize)
    lines = _CsvLines(_lines(path))
    reader = csv.reader(lines, delimiter="\t" if kind == "tsv" else ",", strict=True)
    names: list[str] | None = None
    while True:
        first = lines.number + 1
        place = f"{path}:{first}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise RolloutError(f"{place}: isn't CSV ({first_line(error)}); what follows can't be read") from error
        except _Undecodable as error:
            if names is None or error.is_open or lines.number != first:
                raise RolloutError(f"{path}:{lines.number}: {error}") from error
            yield place, RowProblem("unreadable", "line", str(error))
            continue
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = cells
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise RolloutError(f"{place}: the column {twice[0]!r} occurs twice; rename one")
        elif len(cells) != len(names):
            detail = f"has {len(cells)} cells, the first line {len(names)} names; quote cells that hold the separator"
            yield place, RowProblem("unreadable", "line", detail)
        else:
            yield place, TextRow(zip(names, cells, strict=True))


class _CsvLines:
    """Lines as text; one that is no UTF-8 is an error after which the next ones can be read."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        self.lines, self.number = lines, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise _Undecodable(line, error) from error


class _Undecodable(Exception):
    """A line of CSV that is no UTF-8; `is_open`: a quoted cell continues in the next one."""

    def __init__(self, line: bytes, error: UnicodeDecodeError) -> None:
        super().__init__(f"isn't UTF-8 (byte 0x{line[error.start]:02x}); convert the file to UTF-8")
        self.is_open = line.count(b'"') % 2 == 1


def _parquet_rows(path: Path, columns: Collection[str] | None) -> Rows:
    try:
        file = pq.ParquetFile(path, memory_map=True)
        wanted = _wanted(path, file.schema_arrow, columns)
        # An empty selection would lose the number of rows, and every row is then refused by name.
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted or None, use_threads=False)
        yield from _batch_rows(path, batches)
    except pa.ArrowException as error:
        raise RolloutError(f"{path}: can't be read as Parquet ({first_line(error)}); is it complete?") from error


def _arrow_rows(path: Path, columns: Collection[str] | None) -> Rows:
    """An Arrow stream, as `datasets` writes it, or an Arrow file."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader: Any = pa.ipc.open_stream(source)
                batches: Iterator[pa.RecordBatch] = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            wanted = _wanted(path, reader.schema, columns)
            yield from _batch_rows(path, (batch.select(wanted) if wanted else batch for batch in batches))
    except pa.ArrowException as error:
        raise RolloutError(f"{path}: can't be read as Arrow ({first_line(error)}); is it complete?") from error


def _wanted(path: Path, schema: pa.Schema, columns: Collection[str] | None) -> list[str]:
    wanted = [name for name in schema.names if columns is None or name in columns]
    twice = [name for name in wanted if wanted.count(name) > 1]
    if twice:
        raise RolloutError(f"{path}: the column {twice[0]!r} occurs twice; rename one")
    return wanted


def _batch_rows(path: Path, batches: Iterator[pa.RecordBatch]) -> Rows:
    number = 0
    for whole in batches:
        decoders = {field.name: decode for field in whole.schema if (decode := _json_decoder(field.type))}
        for start in range(0, whole.num_rows, _BATCH_ROWS):
            for row in _python_rows(whole.slice(start, _BATCH_ROWS)):
                if isinstance(row, dict):
                    for name, decode in decoders.items():
                        row[name] = decode(row[name])
                yield f"{path}: row {number}", row
                number += 1


def _python_rows(batch: pa.RecordBatch) -> Sequence[Row | RowProblem]:
    """Rows as Python objects, those that can't be (text that is no UTF-8, dates beyond the year 9999) as problems."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [RowProblem("unreadable", "row", f"holds a value that can't be read ({first_line(error)})")]
        return [row for i in range(batch.num_rows) for row in _python_rows(batch.slice(i, 1))]


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """How values that Arrow keeps as JSON text become what they were (`datasets` writes columns of mixed types so)."""
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        inner = {kind.field(i).name: d for i in range(kind.num_fields) if (d := _json_decoder(kind.field(i).type))}
        return (
            (lambda value: value and {k: inner[k](v) if k in inner else v for k, v in value.items()}) if inner else None
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        element = _json_decoder(kind.value_type)
        return (lambda value: value and [element(item) for item in value]) if element else None
    return None
