"""Reading a teacher cache: rows by sample id, memory-mapped (one copy in the page cache serves all ranks of a node).

Opening reads `cache.json` and maps the indices; a part is opened when one of its rows is first read. Every row that is
read is checked: its sample id, and the checksum of its payload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.format import (
    INDEX_FILE,
    REMEDY,
    TOPK,
    CacheMeta,
    TableIndex,
    hidden_table,
    log_probs_table,
    parts_in,
    read_index,
)
from megatron_erpd.teacher_cache.index import Index
from megatron_erpd.teacher_cache.packing import unpack_ids, unpack_log_probs
from megatron_erpd.teacher_cache.parts import Part

if TYPE_CHECKING:  # reading log-probs alone needs no torch
    from torch import Tensor

    from megatron_erpd.data.rollouts import Rollouts


class TopKRow(NamedTuple):
    """The target q of one rollout's R response tokens.

    indices: int32 `[R, K]` vocabulary ids; log_probs: float32 `[R, K]`; tail_log_prob: float32 `[R]`, -inf for an empty
    tail.
    """

    indices: np.ndarray
    log_probs: np.ndarray
    tail_log_prob: np.ndarray


def unpack_row(packed: Mapping[str, np.ndarray], vocab_size: int) -> TopKRow:
    """A target from its columns as they are stored."""
    import torch

    row = {name: np.array(values) for name, values in packed.items()}
    low = torch.from_numpy(row["topk_ids_low"].view(np.int16))
    high = torch.from_numpy(row["topk_ids_high"]) if "topk_ids_high" in row else None
    scores, normalizer = (torch.from_numpy(row[name]) for name in ("topk_scores", "log_normalizer"))
    ids = unpack_ids(low, high, vocab_size).int()
    return TopKRow(ids.numpy(), unpack_log_probs(scores, normalizer).numpy(), row["tail_log_prob"])


class CacheReader:
    """A complete cache.

    Args:
        folder: what `finalize` closed.

    Attributes:
        meta: what the cache was made from.
        statistics: for 'topk', token mean, min and max of `eta` and `target_kl`.
        num_rows, num_tokens: rollouts and their response tokens.

    Raises:
        CacheError: no cache there, an unfinished or damaged one, or one of another format version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.meta: CacheMeta = index.meta
        self.statistics = index.statistics
        self.num_rows, self.num_tokens = index.num_rows, index.num_tokens
        self._tables = {name: Table(self.folder, name, entry, self.meta) for name, entry in index.tables.items()}

    def sample_ids(self) -> list[str]:
        """Names of all rows, in no order; opens every part of a table."""
        return next(iter(self._tables.values())).sample_ids()

    def table(self, name: str) -> Table:
        """One of the cache's tables. Raises `CacheError` naming what it holds instead."""
        if name not in self._tables:
            what = "holds no target; precompute with --kind topk" if name == TOPK else f"has no table {name!r}"
            if name.startswith("hidden."):
                what = f"holds no hidden states of {name.partition('.')[2]!r}; precompute with --keep-hidden"
            raise CacheError(f"{self.folder}: {what} (its tables are {', '.join(self._tables)})")
        return self._tables[name]

    def check(self, rollouts: Rollouts, tables: Sequence[str] | None = None) -> None:
        """Checks that every rollout has a row that was made for exactly its tokens.

        Rows of other rollouts may be there too (after `Rollouts.select`, say).

        Args:
            tables: those that will be read; default: all.

        Raises:
            CacheError: a rollout has no row, or its row was made for other tokens (names it, and what to do); a part
                is missing or damaged.
        """
        ours, theirs = self.meta.tokenizer_digest, rollouts.tokenizer_digest
        if ours and theirs and ours != theirs:
            self._refuse(f"tokenizer_digest is {ours}, the rollouts' is {theirs}: made with another tokenizer")
        names, lengths = rollouts.sample_ids, rollouts.response_lengths
        crcs = np.array([rollouts.token_crc(i) for i in range(len(rollouts))], dtype=np.uint32)
        for table in tables or self._tables:
            found = self.table(table).keys(names)
            bad = (found.part < 0) | (found.num_tokens != lengths) | (found.crc != crcs)
            if not bad.any():
                continue
            i = int(bad.argmax())
            sample = f"sample {names[i]} ({rollouts.location(i)})"
            if found.part[i] < 0:
                self._refuse(f"{table} has no row for {sample}")
            if found.num_tokens[i] != lengths[i]:
                detail = f"{found.num_tokens[i]} response tokens, the rollout has {lengths[i]}"
                self._refuse(f"{table} holds {sample} with {detail}")
            self._refuse(f"{table} holds {sample} for other token ids (checksums differ)")

    def require_policies(self, fingerprints: Mapping[str, str]) -> None:
        """Raises `CacheError` unless the cache was made from these policies.

        Args:
            fingerprints: policy name -> digest of the checkpoint that is meant; others in the cache aren't looked at.
        """
        for policy, digest in fingerprints.items():
            self.require_policy(policy)
            found = self.meta.fingerprints[policy]
            if found != digest:
                raise CacheError(
                    f"{self.folder}: made from another teacher: policy {policy!r} has fingerprint {found}, "
                    f"expected {digest}; precompute the cache again"
                )

    def require_policy(self, policy: str) -> None:
        """Raises `CacheError` unless the policy was scored."""
        if policy not in self.meta.policies:
            detail = f"has no policy {policy!r}, only {', '.join(self.meta.policies)}"
            raise CacheError(f"{self.folder}: {detail}; precompute a cache that includes it")

    def token_row(self, policy: str, sample_id: str) -> np.ndarray:
        """float32 `[R]`, nats: the policy's log-probs of the rollout's response tokens (a read-only view)."""
        self.require_policy(policy)
        return self.table(log_probs_table(policy)).row(sample_id)["log_probs"]

    def packed_topk_row(self, sample_id: str) -> dict[str, np.ndarray]:
        """The rollout's target as it is stored, column -> `[R]` or `[R, width]` (read-only views; see `packing`)."""
        return self.table(TOPK).row(sample_id)

    def topk_row(self, sample_id: str) -> TopKRow:
        """The rollout's target: indices `[R, K]`, log_probs `[R, K]`, tail `[R]`."""
        return unpack_row(self.packed_topk_row(sample_id), self.meta.vocab_size)

    def hidden_row(self, policy: str, sample_id: str) -> Tensor:
        """`[R, h]` in the stored type: the states from which the rollout's response tokens are predicted."""
        self.require_policy(policy)
        return _hidden(self.table(hidden_table(policy)).row(sample_id), self.meta)

    def _refuse(self, what: str) -> NoReturn:
        raise CacheError(f"{self.folder}: {what}; precompute the cache again with these rollouts")


class UnfinishedHidden:
    """Hidden states of a cache that is still being written, by sample id.

    Args:
        folder, meta: of the cache. Parts that are published later aren't seen.
    """

    def __init__(self, folder: Path, meta: CacheMeta) -> None:
        self._meta = meta
        self._rows: dict[tuple[str, str], tuple[Part, int]] = {}
        for policy in meta.policies:
            for path in parts_in(folder / hidden_table(policy)):
                part = Part(path, hidden_table(policy), meta)
                self._rows |= {(policy, name): (part, i) for i, name in enumerate(part.sample_ids.to_pylist())}

    def hidden_row(self, policy: str, sample_id: str) -> Tensor:
        """As `CacheReader.hidden_row`."""
        part, row = self._rows[policy, sample_id]
        return _hidden(part.row(row), self._meta)


def _hidden(row: Mapping[str, np.ndarray], meta: CacheMeta) -> Tensor:
    import torch

    values = np.array(row["hidden"])
    if meta.hidden_dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


class Keys(NamedTuple):
    """Where rows are and what they were made for: int64 `[n]` each; part and row -1 and the others 0 where there is
    none."""

    part: np.ndarray
    row: np.ndarray
    crc: np.ndarray
    num_tokens: np.ndarray


class Table:
    """One table of a cache: rows by sample id."""

    def __init__(self, root: Path, name: str, entry: TableIndex, meta: CacheMeta) -> None:
        self.name = name
        self.folder = root / name
        self.facts = entry.facts
        self._root, self._meta = root, meta
        self._entries = entry.parts
        self._parts: list[Part | None] = [None] * len(entry.parts)
        self._index = Index(self.folder / INDEX_FILE, entry.num_rows)

    def row(self, sample_id: str) -> dict[str, np.ndarray]:
        """A rollout's payload, column -> `[R]` or `[R, width]` (read-only views of the mapped file).

        Raises:
            CacheError: there is no such row, or it is damaged.
        """
        part, row = self._index.find([sample_id])
        found = self.part(int(part[0])) if part[0] >= 0 else None
        if found is None or row[0] >= len(found) or found.sample_ids[int(row[0])].as_py() != sample_id:
            raise CacheError(f"{self.folder}: has no row for sample {sample_id}; precompute the cache again")
        return found.row(int(row[0]))

    def keys(self, sample_ids: Sequence[str]) -> Keys:
        """Finds many rows; opens the parts that they are in."""
        part, row = self._index.find(sample_ids)
        crc, num_tokens = np.zeros(len(part), np.int64), np.zeros(len(part), np.int64)
        names = np.array(sample_ids, dtype=object)
        for number in np.unique(part[part >= 0]):
            found, here = self.part(int(number)), np.flatnonzero(part == number)
            rows = row[here]
            inside = rows < len(found)
            stored = found.sample_ids.take(pa.array(np.where(inside, rows, 0))).to_numpy(zero_copy_only=False)
            good = inside & (stored == names[here])
            part[here[~good]] = row[here[~good]] = -1
            crc[here[good]] = found.crc[rows[good]]
            num_tokens[here[good]] = found.num_tokens[rows[good]]
        return Keys(part, row, crc, num_tokens)

    def part(self, number: int) -> Part:
        """A part of the table, opened when it is first asked for.

        Raises:
            CacheError: it is missing, damaged, or isn't the part that `cache.json` was written for.
        """
        if number >= len(self._parts):
            raise CacheError(f"{self.folder / INDEX_FILE}: is damaged (there is no part {number}); {REMEDY}")
        part = self._parts[number]
        if part is None:
            entry = self._entries[number]
            part = self._parts[number] = Part(self._root / entry["name"], self.name, self._meta, entry)
        return part

    def sample_ids(self) -> list[str]:
        """Names of all rows, part after part."""
        return [name for number in range(self.num_parts) for name in self.part(number).sample_ids.to_pylist()]

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    @property
    def lengths(self) -> list[int]:
        """Rows of each part."""
        return [entry["num_rows"] for entry in self._entries]

    def close_part(self, number: int) -> None:
        """Closes a part; `part` opens it again."""
        self._parts[number] = None

    def close_parts(self) -> None:
        """Closes all parts."""
        self._parts = [None] * len(self._entries)
