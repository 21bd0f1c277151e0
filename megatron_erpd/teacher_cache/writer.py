"""Writing a teacher cache: each writer (a data-parallel rank) its own parts, then one process closes the cache.

    done = prepare_cache(folder, meta, resume=True)         # one process, before the others start
    with CacheWriter(folder, meta, writer_rank, resume=True) as writer:     # every writer
        writer.write(sample_id, crc, log_probs={"base": ..., "teacher": ...})
    finalize(folder, rollouts.sample_ids)                   # one process, after all writers have closed

A part is renamed into place only when whole, so a killed run loses at most the part in progress, and what is there can
be counted on: `prepare_cache` names the rollouts that need no second scoring, whichever ranks scored them.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_erpd.data.ragged import list_array
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.format import (
    CACHE_FILE,
    TOPK,
    CacheIndex,
    CacheMeta,
    log_probs_column,
    open_part,
    part_meta,
    part_name,
    parts_in,
)

# A part is what a killed run can lose; larger parts make fewer files.
PART_BYTES = 256 * 2**20
# Total mass of a token's top-k and tail: fp32 sums over 150k entries are within 1e-5, so this catches wrong tensors.
MASS_TOLERANCE = 1e-3


def prepare_cache(folder: str | Path, meta: CacheMeta, *, resume: bool = False) -> frozenset[str]:
    """Makes the folder ready for writers; one process calls it, before any `CacheWriter` exists.

    Args:
        folder: the cache's folder, made if need be.
        meta: what is going to be written.
        resume: keep complete parts of an earlier, interrupted run.

    Returns:
        The sample ids that are already written and need no scoring.

    Raises:
        CacheError: the cache is complete; or it holds parts and `resume` is off; or parts written under another `meta`.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if (root / CACHE_FILE).exists():
        raise CacheError(f"{root}: is a complete cache already; delete the folder to compute it again")
    if not resume and parts_in(root):
        raise CacheError(f"{root}: holds parts of an earlier run; resume it, or delete the folder to start anew")
    for leftover in root.glob(".*.tmp"):
        leftover.unlink()
    return frozenset(name for path in parts_in(root) for name in _part(path, meta)["sample_id"].to_pylist())


class CacheWriter:
    """Writes one writer's parts of a cache. A context manager; on an error the part in progress is dropped.

    Args:
        folder: as given to `prepare_cache`.
        meta: the same on every writer.
        writer_rank: which writer this is; each has its own files.
        resume: number new parts after this writer's earlier ones instead of refusing them.
        part_bytes: payload after which a part is closed and published.
    """

    def __init__(
        self,
        folder: str | Path,
        meta: CacheMeta,
        writer_rank: int = 0,
        *,
        resume: bool = False,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.meta = meta
        self._root = Path(folder)
        self._root.mkdir(parents=True, exist_ok=True)
        self._rank = writer_rank
        own = [path for path in parts_in(self._root) if path.name.startswith(part_name(writer_rank, 0)[:11])]
        if own and not resume:
            raise CacheError(f"{own[0]}: is of an earlier run; pass resume=True, or delete the cache's folder")
        self._next_part = int(own[-1].stem.rsplit("-", 1)[1]) + 1 if own else 0
        self._part_bytes = part_bytes
        self._rows: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def write(
        self,
        sample_id: str,
        crc: int,
        *,
        log_probs: Mapping[str, np.ndarray] | None = None,
        topk_indices: np.ndarray | None = None,
        topk_log_probs: np.ndarray | None = None,
        tail_log_prob: np.ndarray | None = None,
        eta: np.ndarray | None = None,
        target_kl: np.ndarray | None = None,
    ) -> None:
        """Adds one rollout; the arrays are copied, in the stored type.

        Args:
            sample_id: the rollout's name.
            crc: `Rollouts.token_crc` of the tokens that were scored.
            log_probs: policy -> `[R]`, nats, finite.
            topk_indices, topk_log_probs: kind 'topk' besides: `[R, K]`, distinct vocabulary ids and their log q.
            tail_log_prob: `[R]`, log of the remaining mass, -inf where there is none.
            eta, target_kl: `[R]`.

        Raises:
            CacheError: arrays missing, of other shapes, not finite, ids beyond the vocabulary, or a top-k and tail
                whose mass isn't 1 (names sample, field and token).
        """
        given: dict[str, Any] = {log_probs_column(policy): row for policy, row in (log_probs or {}).items()}
        target = {"topk_indices": topk_indices, "topk_log_probs": topk_log_probs, "tail_log_prob": tail_log_prob}
        target |= {"eta": eta, "target_kl": target_kl}
        given |= {name: values for name, values in target.items() if values is not None}
        expected = self.meta.payload()
        missing = [name for name in expected if given.get(name) is None]
        unknown = sorted(given.keys() - expected.keys())
        if missing or unknown:
            detail = f"missing {missing}" if missing else f"unknown {unknown}"
            raise CacheError(f"sample {sample_id}: {detail}; a {self.meta.kind!r} cache takes {sorted(expected)}")
        row = {name: np.asarray(values) for name, values in given.items()}
        num_tokens = _check_token(sample_id, {name: row[name] for name in map(log_probs_column, self.meta.policies)})
        if self.meta.kind == TOPK:
            self._check_topk(sample_id, num_tokens, {name: row[name] for name in target})
        if num_tokens == 0:
            raise CacheError(f"sample {sample_id}: no response tokens; a rollout has at least one")
        # A copy: the caller's rows may be views that keep a whole batch alive, or buffers it fills again.
        flat = {name: np.array(row[name], dtype=expected[name].to_pandas_dtype()).reshape(-1) for name in expected}
        self._rows.append({"sample_id": sample_id, "crc": crc, "num_tokens": num_tokens} | flat)
        self._pending_bytes += sum(values.nbytes for values in flat.values())
        if self._pending_bytes >= self._part_bytes:
            self._publish()

    def close(self) -> None:
        """Publishes the part in progress. The cache is complete only after `finalize`."""
        if self._rows:
            self._publish()

    def _check_topk(self, sample_id: str, num_tokens: int, row: dict[str, np.ndarray]) -> None:
        shape = (num_tokens, self.meta.k)
        for name, values in row.items():
            expected = shape if name.startswith("topk") else shape[:1]
            if values.shape != expected:
                raise CacheError(f"sample {sample_id}: {name} has shape {values.shape}, expected {expected}")
        indices = row["topk_indices"]
        vocab_size = self.meta.vocab_size
        if indices.dtype.kind not in "iu" or ((indices < 0) | (indices >= vocab_size)).any():
            raise CacheError(f"sample {sample_id}: topk_indices must be integer ids in [0, {vocab_size})")
        _check_finite(sample_id, "eta", row["eta"])
        _check_finite(sample_id, "target_kl", row["target_kl"])
        tail = row["tail_log_prob"].astype(np.float64)
        mass = np.exp(row["topk_log_probs"].astype(np.float64)).sum(-1) + np.exp(tail)
        bad = np.flatnonzero(~(np.abs(mass - 1) <= MASS_TOLERANCE))
        if bad.size:
            detail = f"top-k and tail have mass {mass[bad[0]]:.6f} at token {bad[0]}, expected 1"
            raise CacheError(f"sample {sample_id}: {detail}; the log-probs aren't those of a normalised target")

    def _publish(self) -> None:
        target = self._root / part_name(self._rank, self._next_part)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        schema, payload = self.meta.schema(), self.meta.payload()
        arrays = [
            list_array([row[field.name] for row in self._rows], payload[field.name])
            if field.name in payload
            else pa.array([row[field.name] for row in self._rows], type=field.type)
            for field in schema
        ]
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            _sync_and_rename(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        self._next_part += 1
        self._rows, self._pending_bytes = [], 0


def finalize(folder: str | Path, expected_ids: Collection[str] | None = None) -> CacheIndex:
    """Checks all parts together and writes `cache.json`; one process calls it, after all writers have closed.

    Args:
        folder: the cache's folder.
        expected_ids: the sample ids that must be there, no more and no fewer; None takes what is there.

    Raises:
        CacheError: no parts, a part of another cache, a sample written twice, missing or not expected (names it).
    """
    root = Path(folder)
    paths = parts_in(root)
    if not paths:
        raise CacheError(f"{root}: holds no parts; nothing was written")
    meta = part_meta(open_part(paths[0]), paths[0])
    seen: dict[str, str] = {}
    parts, num_tokens = [], 0
    statistics = {name: _Statistic() for name in (("eta", "target_kl") if meta.kind == TOPK else ())}
    for path in paths:
        table = _part(path, meta)
        for name in table["sample_id"].to_pylist():
            if name in seen:
                detail = f"sample {name} is in {seen[name]} and in {path.name}"
                raise CacheError(f"{root}: {detail}; delete the folder and precompute again")
            seen[name] = path.name
        num_tokens += pc.sum(table["num_tokens"]).as_py()
        for column, statistic in statistics.items():
            statistic.add(pc.list_flatten(table[column]).to_numpy())
        parts.append({"name": path.name, "num_rows": table.num_rows, "bytes": path.stat().st_size})
    _check_expected(root, seen.keys(), expected_ids)
    summary = {name: statistic.summary() for name, statistic in statistics.items()}
    index = CacheIndex(meta, parts, num_rows=len(seen), num_tokens=num_tokens, statistics=summary)
    temporary = root / f".{CACHE_FILE}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(index.to_json(), indent=1) + "\n")
    _sync_and_rename(temporary, root / CACHE_FILE)
    return index


class _Statistic:
    """Mean, minimum and maximum of a column, part by part, in float64."""

    def __init__(self) -> None:
        self._sum, self._count, self._min, self._max = 0.0, 0, np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        self._sum += float(values.sum(dtype=np.float64))
        self._count += values.size
        self._min = min(self._min, float(values.min()))
        self._max = max(self._max, float(values.max()))

    def summary(self) -> dict[str, float]:
        return {"mean": self._sum / self._count, "min": self._min, "max": self._max}


def _part(path: Path, meta: CacheMeta) -> pa.Table:
    table = open_part(path)
    if part_meta(table, path) != meta:
        detail = "was written with other settings, policies or rollouts than the rest"
        raise CacheError(f"{path}: {detail}; delete the folder and precompute again")
    return table


def _check_expected(root: Path, present: Collection[str], expected: Collection[str] | None) -> None:
    if expected is None:
        return
    wanted = set(expected)
    missing = [name for name in expected if name not in present]
    if missing:
        detail = f"{len(missing)} of {len(wanted)} samples are missing, the first is {missing[0]}"
        raise CacheError(f"{root}: {detail}; run the precompute stage again, it resumes")
    extra = [name for name in present if name not in wanted]
    if extra:
        detail = f"{len(extra)} samples aren't among the rollouts, the first is {extra[0]}"
        raise CacheError(f"{root}: {detail}; delete the folder and precompute again")


def _check_token(sample_id: str, row: dict[str, np.ndarray]) -> int:
    shapes = {values.shape for values in row.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        detail = {name: values.shape for name, values in row.items()}
        raise CacheError(f"sample {sample_id}: log-probs must be flat and equally long, got {detail}")
    for name, values in row.items():
        _check_finite(sample_id, name, values)
    return next(iter(shapes))[0]


def _check_finite(sample_id: str, name: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        detail = f"{name} is {values[bad[0]]} at response token {bad[0]}"
        raise CacheError(f"sample {sample_id}: {detail}; has the policy diverged, or is it the wrong checkpoint?")


def _sync_and_rename(temporary: Path, target: Path) -> None:
    """A name that exists is a file that is whole, a power cut included."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
