"""Reading a teacher cache: rows by sample id, memory-mapped (one copy in the page cache serves all ranks of a node)."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from megatron_erpd.data.ragged import Ragged
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.format import (
    TOPK,
    CacheMeta,
    log_probs_column,
    open_part,
    part_meta,
    read_index,
)


class TopKRow(NamedTuple):
    """The target q of one rollout's R response tokens.

    indices: int32 `[R, K]` vocabulary ids; log_probs: float32 or float16 `[R, K]`, as stored;
    tail_log_prob: float32 `[R]`, -inf for an empty tail. All read-only views of the mapped file.
    """

    indices: np.ndarray
    log_probs: np.ndarray
    tail_log_prob: np.ndarray


class CacheReader:
    """A complete cache.

    Args:
        folder: what `finalize` closed.

    Attributes:
        meta: what the cache was made from.
        statistics: for 'topk', token mean, min and max of `eta` and `target_kl`.

    Raises:
        CacheError: no cache there, an unfinished or damaged one, or a part that isn't the one `finalize` saw.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.meta: CacheMeta = index.meta
        self.statistics = index.statistics
        tables = [self._open(part["name"], part["num_rows"]) for part in index.parts]
        table = pa.concat_tables(tables)
        self._crcs: np.ndarray = table["crc"].to_numpy()
        self._num_tokens: np.ndarray = table["num_tokens"].to_numpy()
        self._rows: dict[str, int] = {name: row for row, name in enumerate(table["sample_id"].to_pylist())}
        self._columns = {name: Ragged(table[name]) for name in self.meta.payload()}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._rows

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that were scored."""
        return self.meta.policies

    def check(self, rollouts: Rollouts) -> None:
        """Proves, rollout by rollout, that the cache was made for exactly these tokens.

        Rows for other rollouts may be there too (after `Rollouts.select`, say).

        Raises:
            CacheError: a rollout has no row, or its row was made for other tokens (names it, and what to do).
        """
        ours, theirs = self.meta.tokenizer_digest, rollouts.tokenizer_digest
        if ours and theirs and ours != theirs:
            self._refuse("was made with another tokenizer than the rollouts")
        lengths = rollouts.response_lengths
        for i, name in enumerate(rollouts.sample_ids):
            row = self._rows.get(name)
            if row is None:
                self._refuse(f"has no row for sample {name} ({rollouts.location(i)})")
            if self._num_tokens[row] != lengths[i]:
                detail = f"{self._num_tokens[row]} response tokens, the rollout has {lengths[i]}"
                self._refuse(f"holds sample {name} ({rollouts.location(i)}) with {detail}")
            if self._crcs[row] != rollouts.token_crc(i):
                self._refuse(f"holds sample {name} ({rollouts.location(i)}) for other token ids (checksums differ)")

    def require_policies(self, fingerprints: Mapping[str, str]) -> None:
        """Raises `CacheError` unless the cache was made from these policies.

        Args:
            fingerprints: policy name -> digest of the checkpoint that is meant; others in the cache aren't looked at.
        """
        for policy, digest in fingerprints.items():
            found = self.meta.fingerprints.get(policy)
            if found is None:
                detail = f"has no policy {policy!r}, only {', '.join(self.policies)}"
                raise CacheError(f"{self.folder}: {detail}; precompute a cache that includes it")
            if found != digest:
                raise CacheError(
                    f"{self.folder}: made from another teacher: policy {policy!r} has fingerprint {found}, "
                    f"expected {digest}; precompute the cache again"
                )

    def token_row(self, policy: str, sample_id: str) -> np.ndarray:
        """float32 `[R]`, nats: the policy's log-probs of the rollout's response tokens (a read-only view)."""
        if policy not in self.policies:
            raise CacheError(f"{self.folder}: has no policy {policy!r}, only {', '.join(self.policies)}")
        return self._row(log_probs_column(policy), sample_id)

    def topk_row(self, sample_id: str) -> TopKRow:
        """The rollout's target: indices `[R, K]`, log_probs `[R, K]`, tail `[R]` (read-only views)."""
        self._require_topk()
        shape = (-1, self.meta.k or 0)
        return TopKRow(
            self._row("topk_indices", sample_id).reshape(shape),
            self._row("topk_log_probs", sample_id).reshape(shape),
            self._row("tail_log_prob", sample_id),
        )

    def eta_row(self, sample_id: str) -> np.ndarray:
        """float32 `[R]`: the projection's eta per response token (a read-only view)."""
        self._require_topk()
        return self._row("eta", sample_id)

    def target_kl_row(self, sample_id: str) -> np.ndarray:
        """float32 `[R]`, nats: KL(q || pi_0) per response token over the full vocabulary (a read-only view)."""
        self._require_topk()
        return self._row("target_kl", sample_id)

    def _row(self, column: str, sample_id: str) -> np.ndarray:
        row = self._rows.get(sample_id)
        if row is None:
            self._refuse(f"has no row for sample {sample_id}")
        return self._columns[column].row(row)

    def _require_topk(self) -> None:
        if self.meta.kind != TOPK:
            raise CacheError(
                f"{self.folder}: is a {self.meta.kind!r} cache and holds no target; precompute with --kind topk"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise CacheError(f"{self.folder}: {what}; precompute the cache again with these rollouts")

    def _open(self, name: str, num_rows: int) -> pa.Table:
        path = self.folder / name
        if not path.is_file():
            raise CacheError(f"{path}: is listed in cache.json but missing; delete the folder and precompute again")
        table = open_part(path)
        if part_meta(table, path) != self.meta or table.num_rows != num_rows:
            raise CacheError(f"{path}: isn't the part that cache.json was written for; precompute again")
        return table
