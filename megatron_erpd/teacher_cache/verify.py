"""Verifying a finished teacher cache: every file, row and number, a part at a time.

`cache.json`, the indices and the metadata of parts are compared with what is computed here from the rows. Memory is
bounded by the largest row and the number of rows of the largest part, whatever the cache's size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_erpd.data.schema import MAX_LOG_PROB
from megatron_erpd.errors import CacheError
from megatron_erpd.manifest import file_digest
from megatron_erpd.progress import OnProgress
from megatron_erpd.teacher_cache.format import (
    CACHE_FILE,
    INDEX_FILE,
    REMEDY,
    TOPK,
    CacheIndex,
    CacheMeta,
    TableIndex,
    parts_in,
    read_index,
)
from megatron_erpd.teacher_cache.index import Index
from megatron_erpd.teacher_cache.parts import Part, Statistic
from megatron_erpd.teacher_cache.reader import Table, TopKRow, unpack_row
from megatron_erpd.teacher_cache.writer import MASS_TOLERANCE

if TYPE_CHECKING:
    from megatron_erpd.data.rollouts import Rollouts

SHOWN = 20
"""Problems of a table that are reported; the others are only counted."""
AGAIN = "delete the cache's folder and precompute again"
_CHUNK = 4096
"""Samples that are looked up together."""
_SUM_TOLERANCE = 1e-9
"""Of sums of float64 numbers in another order."""
_MASS_TOLERANCE = MASS_TOLERANCE + 1e-5
"""What the writer lets through, which packing keeps, and fp32 roundings of the normaliser and the tail."""
_BFLOAT16_EXPONENT = 0x7F80


def verify_cache(folder: str | Path, rollouts: Rollouts | None = None, progress: OnProgress | None = None) -> list[str]:
    """Everything that is wrong with a finished cache, a sentence each: file, row or sample, and what to do.

    Looked at are: counts and statistics in `cache.json`; the bytes and SHA-256 of every part; that the index leads to
    every row, and no sample is there twice or lacks a row in one of the tables; the checksum of every row's payload,
    and that it can be what it says (log-probs, distinct ids of the vocabulary, a mass of 1, finite hidden states).

    Args:
        rollouts: what the cache must be of: exactly these, with these tokens. None: whatever it is of.

    Returns:
        Nothing for a cache that is whole; at most `SHOWN` problems of a table, and then how many more there are.
    """
    root = Path(folder)
    try:
        index = read_index(root)
    except CacheError as error:
        return [str(error)]
    problems = Problems(root)
    total, done = sum(part["bytes"] for table in index.tables.values() for part in table.parts), 0

    def add(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    checks = {name: _TableCheck(root, name, entry, index, problems) for name, entry in index.tables.items()}
    for check in checks.values():
        check.run(add)
    _check_statistics(index, checks.values(), root, problems)
    # Of a table that can't be read as a whole it would be said again and again that samples aren't there.
    tables = [Table(root, name, index.tables[name], index.meta) for name, check in checks.items() if check.is_sound]
    for other in tables[1:]:
        _compare(tables[0], other, problems)
        _compare(other, tables[0], problems)
    if rollouts is not None:
        _check_rollouts(root, index, tables, rollouts, problems)
    return problems.lines()


class Problems:
    """The first `SHOWN` problems of each table, and how many there are."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._texts: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, table: str, text: str) -> None:
        """Reports a problem of a table, or of the cache as a whole ("")."""
        self.count(table)
        if not self.is_full(table):
            self._texts.setdefault(table, []).append(text)

    def count(self, table: str) -> None:
        """Counts a problem without reporting it."""
        self._counts[table] += 1

    def is_full(self, table: str) -> bool:
        """Whether another problem of this table would only be counted."""
        return len(self._texts.get(table, [])) >= SHOWN

    def lines(self) -> list[str]:
        """All reported problems, table after table."""
        found = []
        for table, texts in self._texts.items():
            more = self._counts[table] - len(texts)
            found += texts + ([f"{self._root / table}: and {more} more problems; repair these first"] if more else [])
        return found


class _TableCheck:
    """The checks of one table that need no other.

    Attributes:
        is_read: after `run`, whether all of its parts could be opened.
        is_sound: whether besides its index leads to all of their rows.
        statistics: of all parts that could be opened.
    """

    def __init__(self, root: Path, name: str, entry: TableIndex, index: CacheIndex, problems: Problems) -> None:
        self.root, self.name, self.entry, self.meta = root, name, entry, index.meta
        self.whole = index
        self.problems = problems
        self.is_read = self.is_sound = True
        self.statistics: dict[str, Statistic] = {}
        self._path = root / name / INDEX_FILE
        self._index: Index | None = None

    def run(self, add: Callable[[int], None]) -> None:
        try:
            self._index = Index(self._path, self.entry.num_rows)
        except CacheError as error:
            self.is_sound = False
            self._report(str(error))
        for number, record in enumerate(self.entry.parts):
            self._check_part(number, record)
            add(record["bytes"])
        self._check_counts()
        self._check_listed()

    def _report(self, text: str) -> None:
        self.problems.add(self.name, text)

    def _check_part(self, number: int, record: Mapping[str, Any]) -> None:
        path = self.root / record["name"]
        try:
            part = Part(path, self.name, self.meta, record)
            digest = file_digest(path)
        except (CacheError, OSError) as error:
            self.is_read = self.is_sound = False
            self._report(str(error) if isinstance(error, CacheError) else f"{path}: can't be read ({error}); {REMEDY}")
            return
        if digest != record["sha256"]:
            self._report(
                f"{path}: its SHA-256 is {digest}, {CACHE_FILE} says {record['sha256']}: it is damaged; {REMEDY}"
            )
        tokens = int(part.num_tokens.sum(dtype=np.int64))
        if tokens != record["num_tokens"]:
            self._report(f"{path}: has {tokens} response tokens, {CACHE_FILE} says {record['num_tokens']}; {AGAIN}")
        self._check_facts(part)
        names = part.sample_ids.to_pylist()
        if self._index is not None:
            self._check_index(self._index, number, part, names)
        for row, name in enumerate(names):
            try:
                problem = row_problem(self.name, part.row(row), self.meta)
            except CacheError as error:
                self._report(str(error))
                continue
            if problem is not None:
                self._report(f"{path}: sample {name} (row {row}): {problem}; {AGAIN}")

    def _check_facts(self, part: Part) -> None:
        own = part.facts
        if own != self.entry.facts:
            self._report(f"{part.path}: says {own} of its table, {CACHE_FILE} says {self.entry.facts}; {AGAIN}")
        if self.name.startswith("hidden.") and not isinstance(own.get("output_layer"), str):
            self._report(f"{part.path}: doesn't say which output layer its hidden states belong to; {AGAIN}")
        try:
            for name, values in part.statistics().items():
                self.statistics.setdefault(name, Statistic()).merge(values)
        except CacheError as error:
            self._report(str(error))

    def _check_index(self, index: Index, number: int, part: Part, names: Sequence[str]) -> None:
        """Every row is where the index says. With as many entries as rows, no entry can then point elsewhere."""
        parts, rows = index.find(names)
        wrong = np.flatnonzero((parts != number) | (rows != np.arange(len(names))))
        for row in wrong.tolist():
            self.is_sound = False
            if self.problems.is_full(self.name):
                self.problems.count(self.name)
                continue
            here = f"{part.path} (row {row})"
            other = self._row_of(int(parts[row]), int(rows[row]))
            if other == names[row]:
                there = f"{self.root / self.entry.parts[int(parts[row])]['name']} (row {rows[row]})"
                self._report(f"{here}: sample {names[row]} is there and in {there}; {AGAIN}")
            else:
                self._report(f"{self._path}: doesn't lead to sample {names[row]} in {here}: it is damaged; {REMEDY}")

    def _row_of(self, number: int, row: int) -> str | None:
        """The sample that is there; None for no place."""
        if not 0 <= number < len(self.entry.parts):
            return None
        record = self.entry.parts[number]
        try:
            part = Part(self.root / record["name"], self.name, self.meta, record)
        except CacheError:
            return None
        return part.sample_ids[row].as_py() if row < len(part) else None

    def _check_counts(self) -> None:
        """Counts that `cache.json` has in more than one place. Every part has been compared with its entry."""
        for what in ("num_rows", "num_tokens"):
            said, summed = getattr(self.entry, what), sum(part[what] for part in self.entry.parts)
            if said != summed:
                self._report(
                    f"{self.root / CACHE_FILE}: {what} of {self.name} is {said}, its parts have {summed}; {AGAIN}"
                )
            if said != getattr(self.whole, what):
                first = next(iter(self.whole.tables))
                there = getattr(self.whole, what)
                self._report(f"{self.root / CACHE_FILE}: {what} of {self.name} is {said}, of {first} {there}; {AGAIN}")

    def _check_listed(self) -> None:
        listed = {self.root / part["name"] for part in self.entry.parts}
        for folder in sorted({path.parent for path in listed} | {self.root / self.name}):
            for path in parts_in(folder):
                if path not in listed:
                    self._report(f"{path}: isn't listed in {CACHE_FILE} and is never read; delete it")


def _check_statistics(index: CacheIndex, checks: Iterable[_TableCheck], root: Path, problems: Problems) -> None:
    """Those in `cache.json` are those of the parts; not checked where a part can't be read."""
    found: dict[str, dict[str, float]] = {}
    for check in checks:
        if not check.is_read:
            return
        found |= {name: statistic.summary() for name, statistic in check.statistics.items()}
    for name in sorted({*found, *index.statistics}):
        said, summed = index.statistics.get(name, {}), found.get(name, {})
        for figure in ("mean", "min", "max"):
            a, b = said.get(figure, math.nan), summed.get(figure, math.nan)
            if not math.isclose(a, b, rel_tol=_SUM_TOLERANCE, abs_tol=_SUM_TOLERANCE):
                problems.add("", f"{root / CACHE_FILE}: {figure} of {name} is {a}, its parts say {b}; {AGAIN}")


def _compare(ours: Table, theirs: Table, problems: Problems) -> None:
    """Every sample of a table has a row in another one, for the same tokens."""
    for number in range(ours.num_parts):
        part = ours.part(number)
        for start in range(0, len(part), _CHUNK):
            rows = slice(start, start + _CHUNK)
            names = part.sample_ids[rows].to_pylist()
            found = theirs.keys(names)
            for i in np.flatnonzero(found.part < 0).tolist():
                problems.add(
                    theirs.name, f"{theirs.folder}: has no row for sample {names[i]}, {part.path} has; {AGAIN}"
                )
            differs = (found.crc != part.crc[rows]) | (found.num_tokens != part.num_tokens[rows])
            for i in np.flatnonzero(differs & (found.part >= 0)).tolist():
                text = f"the row of sample {names[i]} is for other tokens than that in {part.path}; {AGAIN}"
                problems.add(theirs.name, f"{theirs.folder}: {text}")
            theirs.close_parts()
        ours.close_part(number)


def _check_rollouts(
    root: Path, index: CacheIndex, tables: Iterable[Table], rollouts: Rollouts, problems: Problems
) -> None:
    """A row for each, with its tokens, and no row for anything else."""
    ours, theirs = index.meta.tokenizer_digest, rollouts.tokenizer_digest
    if ours and theirs and ours != theirs:
        problems.add("", f"{root / CACHE_FILE}: tokenizer_digest is {ours}, the rollouts' is {theirs}; {AGAIN}")
    names, lengths = rollouts.sample_ids, rollouts.response_lengths
    crcs = np.array([rollouts.token_crc(i) for i in range(len(rollouts))], dtype=np.uint32)
    for table in tables:
        num_found = 0
        for start in range(0, len(names), _CHUNK):
            rows = slice(start, start + _CHUNK)
            found = table.keys(names[rows])
            table.close_parts()
            num_found += int((found.part >= 0).sum())
            bad = (found.part < 0) | (found.num_tokens != lengths[rows]) | (found.crc != crcs[rows])
            for i in np.flatnonzero(bad).tolist():
                sample = f"sample {names[start + i]} ({rollouts.location(start + i)})"
                what = "has no row for" if found.part[i] < 0 else "holds other tokens than the rollouts for"
                problems.add(table.name, f"{table.folder}: {what} {sample}; precompute again with these rollouts")
        if num_found < sum(table.lengths):
            _report_unknown(table, frozenset(names), problems)


def _report_unknown(table: Table, known: frozenset[str], problems: Problems) -> None:
    for number in range(table.num_parts):
        part = table.part(number)
        for row, name in enumerate(part.sample_ids.to_pylist()):
            if name not in known:
                text = f"{part.path}: sample {name} (row {row}) isn't among the rollouts; {AGAIN}"
                problems.add(table.name, text)
        table.close_part(number)


def row_problem(table: str, row: Mapping[str, np.ndarray], meta: CacheMeta) -> str | None:
    """Why a row's payload can't be what its table holds, if so."""
    if table == TOPK:
        return _target_problem(unpack_row(row, meta.vocab_size), meta.vocab_size)
    if table.startswith("hidden."):
        bits, is_bits = row["hidden"], meta.hidden_dtype == "bfloat16"
        finite = (bits & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT if is_bits else np.isfinite(bits)
        return _first(~finite.all(-1), "hidden states that aren't finite")
    values = row["log_probs"]
    return _first(~np.isfinite(values) | (values > MAX_LOG_PROB), "a log-prob that isn't finite or above 0")


def _target_problem(row: TopKRow, vocab_size: int) -> str | None:
    ordered = np.sort(row.indices, axis=-1)
    mass = np.exp(row.log_probs.astype(np.float64)).sum(-1) + np.exp(row.tail_log_prob.astype(np.float64))
    return (
        _first((row.indices >= vocab_size).any(-1), f"an id beyond the vocabulary of {vocab_size}")
        or _first((ordered[:, 1:] == ordered[:, :-1]).any(-1), "an id twice")
        or _first(~(np.abs(mass - 1) <= _MASS_TOLERANCE), "entries and a tail that don't add up to 1")
    )


def _first(bad: np.ndarray, what: str) -> str | None:
    return f"{what} at response token {int(bad.argmax())}" if bad.any() else None
