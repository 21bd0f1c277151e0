"""Closing a teacher cache: all parts are looked at together, indexed, and listed in `cache.json`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.errors import CacheError
from megatron_erpd.manifest import file_digest
from megatron_erpd.teacher_cache.format import (
    CACHE_FILE,
    INDEX_FILE,
    CacheIndex,
    CacheMeta,
    TableIndex,
    parts_in,
)
from megatron_erpd.teacher_cache.index import write_index
from megatron_erpd.teacher_cache.parts import Part, Statistic, new_cache_file


def finalize(
    folder: str | Path,
    meta: CacheMeta,
    expected_ids: Sequence[str] | None = None,
    checksums: Mapping[str, str] | None = None,
    slices: Sequence[Path] = (),
) -> CacheIndex:
    """Checks all parts together and writes the indices and `cache.json`; one process calls it, after all writers.

    Args:
        folder: the cache's folder.
        meta: what was written.
        expected_ids: the sample ids that must be there, no more and no fewer; None takes those of the first table.
        checksums: SHA-256 of parts that are known, by their path in the folder; the others are read.
        slices: folders inside of it that hold the tables' parts, where independent jobs wrote a slice each.

    Raises:
        CacheError: a table without parts, a part of another cache, a sample that was written twice, is missing or isn't
            expected (names it).
    """
    root, known = Path(folder), checksums or {}
    tables: dict[str, TableIndex] = {}
    statistics: dict[str, Statistic] = {}
    expected = expected_ids
    for table in meta.tables:
        paths = [path for part_of in slices or [root] for path in parts_in(part_of / table)]
        if not paths:
            raise CacheError(f"{root / table}: holds no parts; run the precompute stage")
        parts = [Part(path, table, meta) for path in paths]
        ids = [part.sample_ids.to_pylist() for part in parts]
        _check_ids(root, table, paths, ids, expected)
        expected = [name for names in ids for name in names] if expected is None else expected
        (root / table).mkdir(exist_ok=True)
        write_index(root / table / INDEX_FILE, ids)
        records = [_record(part, root, known) for part in parts]
        tables[table] = TableIndex(
            records,
            num_rows=sum(len(part) for part in parts),
            num_tokens=sum(record["num_tokens"] for record in records),
            facts=_common_facts(parts),
        )
        for part in parts:
            for name, values in part.statistics().items():
                statistics.setdefault(name, Statistic()).merge(values)
    index = CacheIndex(meta, tables, {name: statistic.summary() for name, statistic in statistics.items()})
    write_cache_file(root, index)
    return index


def write_cache_file(root: Path, index: CacheIndex) -> None:
    """Publishes `cache.json`."""
    with new_cache_file(root / CACHE_FILE) as temporary:
        temporary.write_text(json.dumps(index.to_json(), indent=1) + "\n")


def _record(part: Part, root: Path, known: Mapping[str, str]) -> dict[str, Any]:
    name = str(part.path.relative_to(root))
    return {
        "name": name,
        "num_rows": len(part),
        "num_tokens": int(part.num_tokens.sum(dtype=np.int64)),
        "bytes": part.path.stat().st_size,
        "sha256": known.get(name) or file_digest(part.path),
    }


def _common_facts(parts: Sequence[Part]) -> dict[str, Any]:
    """What all parts say of their table."""
    first = parts[0]
    for part in parts:
        if part.facts != first.facts:
            raise CacheError(
                f"{part.path}: says {part.facts}, {first.path.name} says {first.facts}: they are of different "
                "policies; delete the cache's folder and precompute again"
            )
    return first.facts


def _check_ids(
    root: Path, table: str, paths: Sequence[Path], ids: Sequence[Sequence[str]], expected: Sequence[str] | None
) -> None:
    present: dict[str, str] = {}
    for path, names in zip(paths, ids, strict=True):
        for name in names:
            if name in present:
                where = f"sample {name} is in {present[name]} and in {path.name}"
                raise CacheError(f"{root / table}: {where}; delete the folder and precompute again")
            present[name] = path.name
    if expected is None:
        return
    wanted: Collection[str] = set(expected)
    missing = [name for name in expected if name not in present]
    if missing:
        detail = f"{len(missing)} of {len(wanted)} samples are missing, the first is {missing[0]}"
        raise CacheError(f"{root / table}: {detail}; run the precompute stage again, it resumes")
    extra = [name for name in present if name not in wanted]
    if extra:
        detail = f"{len(extra)} samples aren't among the rollouts, one is {min(extra)}"
        raise CacheError(f"{root / table}: {detail}; delete the folder and precompute again")
