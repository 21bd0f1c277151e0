"""Where a table has which rollout: a sorted file of 64-bit hashes that is searched where it lies.

`index.arrow` is an Arrow IPC file of one batch: `hash` uint64 ascending and unique, `part` uint32 (the position in
`cache.json`'s list of parts), `row` uint32 in it. `hash` is the little-endian BLAKE2b-64 of the sample id's UTF-8
bytes, salted with the 8 bytes of `salt` in the schema's metadata, which is 0 unless two ids had the same hash. Opening
reads nothing but the footer; a search touches a page per step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.format import REMEDY
from megatron_erpd.teacher_cache.parts import new_cache_file

_SALT_KEY = b"salt"
_FIELDS = [
    pa.field(n, t, nullable=False) for n, t in (("hash", pa.uint64()), ("part", pa.uint32()), ("row", pa.uint32()))
]
MAX_SALT = 16


def hashes(sample_ids: Iterable[str], salt: int = 0) -> np.ndarray:
    """uint64, one per id."""
    key = salt.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, salt=key).digest() for name in sample_ids)
    return np.frombuffer(digests, dtype="<u8")


def write_index(path: Path, sample_ids: Sequence[Sequence[str]]) -> None:
    """Writes the index of a table.

    Args:
        sample_ids: per part the ids of its rows; all different.
    """
    lengths = [len(ids) for ids in sample_ids]
    part = np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths)
    row = np.concatenate([np.arange(n, dtype=np.uint32) for n in lengths])
    for salt in range(MAX_SALT):
        keys = hashes((name for ids in sample_ids for name in ids), salt)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if not (keys[1:] == keys[:-1]).any():
            break
    else:
        raise CacheError(f"{path}: no salt tells {len(keys)} sample ids apart; two of them must be the same")
    schema = pa.schema(_FIELDS, {_SALT_KEY: str(salt).encode()})
    arrays = [pa.array(values) for values in (keys, part[order], row[order])]
    with (
        new_cache_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


class Index:
    """An index, memory-mapped. Raises `CacheError` when it is missing, damaged or of another number of rows."""

    def __init__(self, path: Path, num_rows: int) -> None:
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            if batch.schema.remove_metadata() != pa.schema(_FIELDS):
                raise ValueError("other columns")
            if batch.num_rows != num_rows or not num_rows:
                raise ValueError(f"{batch.num_rows} rows, cache.json says {num_rows}")
            batch.validate()  # that the buffers are as long as the columns
            self._salt = int((batch.schema.metadata or {})[_SALT_KEY])
            if not 0 <= self._salt < MAX_SALT:
                raise ValueError(f"salt {self._salt}")
            self._hashes, self._parts, self._rows = (batch.column(i).to_numpy() for i in range(3))
        except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError) as error:
            raise CacheError(f"{path}: is damaged ({error}); {REMEDY}") from error

    def find(self, sample_ids: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Part and row `[n]` of each id, int64; -1 where no row can be the id's. Whether one is, its part knows."""
        keys = hashes(sample_ids, self._salt)
        place = np.minimum(np.searchsorted(self._hashes, keys), len(self._hashes) - 1)
        found = self._hashes[place] == keys
        return tuple(np.where(found, column[place].astype(np.int64), -1) for column in (self._parts, self._rows))  # type: ignore[return-value]
