"""Writing a teacher cache: each writer (a data-parallel rank) its own parts, then one process closes the cache.

    with exclusive(folder):                                     # one process, as long as anybody writes
        done = prepare_cache(folder, meta)                      # before the writers start
        with CacheWriter(folder, meta, writer_rank) as writer:  # every writer
            writer.write_log_probs("base", sample_id, crc, log_probs)
        finalize(folder, meta, rollouts.sample_ids)             # after all writers have closed

Rows are packed, checked and written on a thread of their own; the arrays must not change afterwards. A part gets its
name when it is complete and on disk, so a killed run loses at most the part in progress of each table. `prepare_cache`
names the rollouts that each table has already, whichever rank wrote them.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_erpd.errors import CacheError
from megatron_erpd.files import remove_unfinished
from megatron_erpd.locks import Held, file_lock
from megatron_erpd.teacher_cache.format import (
    CACHE_FILE,
    LOG_PROB_TYPES,
    TOPK,
    CacheMeta,
    hidden_table,
    log_probs_table,
    part_name,
    parts_in,
)
from megatron_erpd.teacher_cache.packing import pack_ids, pack_log_probs
from megatron_erpd.teacher_cache.parts import Part, Statistic, payload_crc, write_part

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 256 * 2**20
"""Payload of a part: a killed run loses at most one per table and writer; larger parts make fewer files."""
QUEUE_BYTES = 512 * 2**20
"""Rows that wait to be written, at most (one row always may)."""
MASS_TOLERANCE = 1e-3
"""Of the total mass of a token's top-k and tail: fp32 sums over 150k entries are within 1e-5."""
LOCK_FILE = ".lock"


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Locks a cache's folder for one program; the operating system releases the lock however the program ends.

    Raises:
        CacheError: another program holds it (names host and process).
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path))
            stack.callback(path.unlink, missing_ok=True)
        except Held as holder:
            raise CacheError(
                f"{folder}: {holder} is writing this cache; wait for it or stop it, and run the same command again"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            # A file system without locks: parts still can't be written over each other.
        yield


def prepare_cache(folder: str | Path, meta: CacheMeta) -> dict[str, frozenset[str]]:
    """Makes the folder ready for writers; one process calls it, before any `CacheWriter` exists.

    Returns:
        Table -> the sample ids that it has already, from an interrupted run.

    Raises:
        CacheError: the cache is complete; or a part is damaged or was written under another meta (names the field).
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if (root / CACHE_FILE).exists():
        raise CacheError(f"{root}: is a complete cache already; delete the folder to compute it again")
    for made in (root, *(root / table for table in meta.tables)):
        remove_unfinished(made)
    return {
        table: frozenset(
            name for path in parts_in(root / table) for name in Part(path, table, meta).sample_ids.to_pylist()
        )
        for table in meta.tables
    }


class CacheWriter:
    """Writes one writer's parts of all tables. A context manager; on an error the parts in progress are dropped.

    Args:
        folder: as given to `prepare_cache`.
        meta: the same on every writer.
        writer_rank: which writer this is; each has its own files, numbered on from those that are there.
        part_bytes: payload after which a part is closed and published.

    Attributes:
        checksums: `TABLE/part-...` -> SHA-256 of the parts that were published.
    """

    def __init__(
        self, folder: str | Path, meta: CacheMeta, writer_rank: int = 0, *, part_bytes: int = PART_BYTES
    ) -> None:
        self.meta = meta
        self.checksums: dict[str, str] = {}
        self._root = Path(folder)
        self._rank = writer_rank
        self._part_bytes = part_bytes
        self._tables: dict[str, _Rows] = {}
        self._layers: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-cache")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._waiting_bytes = 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write_log_probs(self, policy: str, sample_id: str, crc: int, log_probs: np.ndarray) -> None:
        """Adds a rollout's log-probs under a policy.

        Args:
            policy: one of the meta's.
            sample_id: the rollout's name.
            crc: `Rollouts.token_crc` of the tokens that were scored.
            log_probs: float `[R]`, nats, finite.

        Raises:
            CacheError: of this or an earlier row: not finite, of another shape, or it could not be written.
        """
        self._submit(log_probs_table(policy), sample_id, crc, lambda: _log_probs_row(log_probs), log_probs.nbytes)

    def write_topk(
        self,
        sample_id: str,
        crc: int,
        /,
        *,
        indices: np.ndarray,
        log_probs: np.ndarray,
        tail_log_prob: np.ndarray,
        eta: np.ndarray,
        target_kl: np.ndarray,
    ) -> None:
        """Adds a rollout's target q.

        Args:
            indices, log_probs: `[R, K]`, distinct vocabulary ids and their log q.
            tail_log_prob: `[R]`, log of the remaining mass, -inf where there is none.
            eta, target_kl: `[R]`; only their statistics are kept.

        Raises:
            CacheError: as `write_log_probs`; ids beyond the vocabulary or twice in a token, or a mass that isn't 1.
        """

        def row() -> dict[str, np.ndarray]:
            found = _topk_row(self.meta, indices, log_probs, tail_log_prob)
            described = {"eta": eta, "target_kl": target_kl}
            for name, values in described.items():
                _check(name, values, tail_log_prob.shape)
            for name, values in described.items():
                self._rows(TOPK).statistics.setdefault(name, Statistic()).add(values)
            return found

        self._submit(TOPK, sample_id, crc, row, indices.nbytes + log_probs.nbytes)

    def write_hidden(self, policy: str, sample_id: str, crc: int, hidden: Tensor, output_layer: str) -> None:
        """Adds a rollout's final hidden states, rounded to the meta's type.

        Args:
            hidden: `[R, h]`, on the CPU, the states from which the response tokens are predicted.
            output_layer: the digest of the layer that they go into.
        """
        self._layers[hidden_table(policy)] = output_layer
        size = hidden.numel() * hidden.element_size()
        self._submit(hidden_table(policy), sample_id, crc, lambda: _hidden_row(self.meta, hidden), size)

    def flush(self) -> None:
        """Publishes the parts in progress; when it returns, every row that was given is on disk."""
        self._settle(0)
        for table in self._tables:
            self._thread.submit(self._publish, table).result()

    def close(self) -> None:
        """`flush`, and the thread ends. The cache is complete only after `finalize`."""
        try:
            self.flush()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def abort(self) -> None:
        """Ends the thread; the parts in progress are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, table: str, sample_id: str, crc: int, row: Callable[[], dict[str, np.ndarray]], size: int
    ) -> None:
        if table not in self.meta.tables:
            raise CacheError(f"sample {sample_id}: this cache has no table {table!r}, only {list(self.meta.tables)}")
        self._settle(QUEUE_BYTES - size)
        self._waiting.append((self._thread.submit(self._add, table, sample_id, crc, row), size))
        self._waiting_bytes += size

    def _settle(self, limit: int) -> None:
        """Waits until what waits to be written is small enough; an error of the thread comes out here."""
        while self._waiting and (self._waiting_bytes > limit or self._waiting[0][0].done()):
            future, size = self._waiting.popleft()
            self._waiting_bytes -= size
            future.result()

    def _add(self, table: str, sample_id: str, crc: int, row: Callable[[], dict[str, np.ndarray]]) -> None:
        try:
            payload = row()
        except ValueError as error:
            raise CacheError(f"sample {sample_id}: {error}") from None
        rows = self._rows(table)
        rows.add(sample_id, crc, payload)
        if rows.size >= self._part_bytes:
            self._publish(table)

    def _rows(self, table: str) -> _Rows:
        if table not in self._tables:
            own = [p for p in parts_in(self._root / table) if p.name.startswith(part_name(self._rank, 0)[:11])]
            first = int(own[-1].stem.rsplit("-", 1)[1]) + 1 if own else 0
            self._tables[table] = _Rows(next(iter(self.meta.columns(table))), first)
        return self._tables[table]

    def _publish(self, table: str) -> None:
        rows = self._rows(table)
        if not rows.payload:
            return
        facts: dict[str, Any] = {}
        if rows.statistics:
            facts["statistics"] = {name: asdict(s) for name, s in rows.statistics.items()}
        if table in self._layers:
            facts["output_layer"] = self._layers[table]
        name = part_name(self._rank, rows.next_part)
        path = self._root / table / name
        self.checksums[f"{table}/{name}"] = write_part(path, self.meta.schema(table, facts), rows.keys, rows.payload)
        self._tables[table] = _Rows(rows.first_column, rows.next_part + 1)


class _Rows:
    """The rows of a part in the making."""

    def __init__(self, first_column: str, next_part: int) -> None:
        self.first_column = first_column
        self.next_part = next_part
        self.keys: dict[str, list[Any]] = {name: [] for name in ("sample_id", "crc", "num_tokens", "payload_crc")}
        self.payload: list[dict[str, np.ndarray]] = []
        self.statistics: dict[str, Statistic] = {}
        self.size = 0

    def add(self, sample_id: str, crc: int, payload: dict[str, np.ndarray]) -> None:
        num_tokens = len(payload[self.first_column])
        for values, name in zip((sample_id, crc, num_tokens, payload_crc(payload)), self.keys, strict=True):
            self.keys[name].append(values)
        self.payload.append({name: values.reshape(-1) for name, values in payload.items()})
        self.size += sum(values.nbytes for values in payload.values())


def _log_probs_row(log_probs: np.ndarray) -> dict[str, np.ndarray]:
    if log_probs.ndim != 1:
        raise ValueError(f"log_probs must be flat, got shape {log_probs.shape}")
    _check("log_probs", log_probs, log_probs.shape)
    # A copy: the caller's row may be a view that keeps a whole batch alive, or a buffer that is filled again.
    return {"log_probs": np.array(log_probs, dtype=np.float32)}


def _topk_row(
    meta: CacheMeta, indices: np.ndarray, log_probs: np.ndarray, tail_log_prob: np.ndarray
) -> dict[str, np.ndarray]:
    shape = (len(tail_log_prob), meta.k)
    for name, values, expected in (
        ("indices", indices, shape),
        ("log_probs", log_probs, shape),
        ("tail_log_prob", tail_log_prob, shape[:1]),
    ):
        if values.shape != expected or not len(values):
            raise ValueError(f"{name} has shape {values.shape}, expected {expected} and at least one token")
    if indices.dtype.kind not in "iu" or ((indices < 0) | (indices >= meta.vocab_size)).any():
        raise ValueError(f"indices must be integer ids in [0, {meta.vocab_size})")
    ordered = np.sort(indices, axis=-1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=-1))
    if twice.size:
        raise ValueError(f"indices name a vocabulary entry twice at token {twice[0]}")
    tail = tail_log_prob.astype(np.float64)
    mass = np.exp(log_probs.astype(np.float64)).sum(-1) + np.exp(tail)
    bad = np.flatnonzero(~(np.abs(mass - 1) <= MASS_TOLERANCE))
    if bad.size:
        raise ValueError(
            f"top-k and tail have mass {mass[bad[0]]:.6f} at token {bad[0]}, expected 1; the log-probs aren't those "
            "of a normalised target"
        )
    low, high = pack_ids(indices.astype(np.int64), meta.vocab_size)
    scores = pack_log_probs(log_probs, LOG_PROB_TYPES[meta.topk_dtype].to_pandas_dtype())
    return {
        "topk_scores": scores.scores,
        "topk_ids_low": low,
        **({} if high is None else {"topk_ids_high": high}),
        "log_normalizer": scores.log_normalizer,
        "tail_log_prob": tail.astype(np.float32),
    }


def _hidden_row(meta: CacheMeta, hidden: Tensor) -> dict[str, np.ndarray]:
    if hidden.dim() != 2 or hidden.shape[1] != meta.hidden_size or not len(hidden):
        raise ValueError(f"hidden states have shape {tuple(hidden.shape)}, expected [R, {meta.hidden_size}]")
    import torch

    assert meta.hidden_dtype is not None
    rounded = hidden.detach().to(getattr(torch, meta.hidden_dtype))
    bad = (~rounded.isfinite()).any(dim=-1).nonzero()
    if len(bad):
        raise ValueError(
            f"hidden states aren't finite at response token {int(bad[0])} in {meta.hidden_dtype}; has the policy "
            "diverged, or is it the wrong checkpoint?"
        )
    bits = rounded.view(torch.int16).numpy().view(np.uint16) if rounded.dtype == torch.bfloat16 else rounded.numpy()
    return {"hidden": np.array(bits)}


def _check(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape or not len(values):
        raise ValueError(f"{name} has shape {values.shape}, expected {shape} and at least one token")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"{name} is {values[bad[0]]} at response token {bad[0]}; has the policy diverged, or is it the wrong "
            "checkpoint?"
        )
