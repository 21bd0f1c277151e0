"""Rows of different lengths as Arrow holds them: numpy views into its buffers, no copies, no 2^31-element limit."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa


class Ragged:
    """A column of lists, addressable by row.

    Args:
        column: a (chunked) Arrow list column whose elements are numbers without nulls
            (`row_with_null_element` finds an offender).

    Attributes:
        lengths: int64 `[N]`, 0 for a null row.
        valid: bool `[N]`, False for a null row.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values: list[np.ndarray] = []
        starts, lengths, valid, chunk_of = [], [], [], []
        for chunk in column.chunks:
            offsets = chunk.offsets.to_numpy().astype(np.int64)
            present = chunk.is_valid().to_numpy(zero_copy_only=False)
            starts.append(offsets[:-1])
            lengths.append(np.where(present, np.diff(offsets), 0))
            valid.append(present)
            chunk_of.append(np.full(len(chunk), len(self._values), dtype=np.int32))
            self._values.append(chunk.values.to_numpy(zero_copy_only=True))
        self._starts = np.concatenate(starts) if starts else np.zeros(0, np.int64)
        self._chunk_of = np.concatenate(chunk_of) if chunk_of else np.zeros(0, np.int32)
        self.lengths: np.ndarray = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        self.valid: np.ndarray = np.concatenate(valid) if valid else np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> np.ndarray:
        """Row `index` as a read-only view `[length]` in the stored dtype (length 0 for a null row)."""
        start = self._starts[index]
        return self._values[self._chunk_of[index]][start : start + self.lengths[index]]

    def first_row_where(self, predicate: Callable[[np.ndarray], np.ndarray]) -> int | None:
        """The first row holding an element for which the vectorised `predicate` is true, or None."""
        for chunk, values in enumerate(self._values):
            rows = np.flatnonzero(self._chunk_of == chunk)
            hits = np.flatnonzero(predicate(values)) if rows.size else rows
            if not hits.size:
                continue
            # A chunk may be a slice of a longer buffer, and a null row may own elements: neither counts.
            starts, ends = self._starts[rows], self._starts[rows] + self.lengths[rows]
            owner = np.searchsorted(starts, hits, side="right") - 1
            # Empty rows share their start with the row after them; side='right' already picked the last of those.
            inside = (owner >= 0) & (hits < ends[np.maximum(owner, 0)])
            if inside.any():
                return int(rows[owner[np.argmax(inside)]])
        return None


def row_with_null_element(column: pa.ChunkedArray) -> int | None:
    """The first row whose list holds a null element, or None."""
    before = 0
    for chunk in column.chunks:
        if chunk.values.null_count:
            for row in range(len(chunk)):
                if chunk[row].is_valid and chunk[row].values.null_count:
                    return before + row
        before += len(chunk)
    return None


def list_array(rows: Sequence[np.ndarray | None], element: pa.DataType) -> pa.ListArray:
    """Arrays of numbers (None for null) as one Arrow list array of `element`s, without going through Python lists."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([0 if row is None else len(row) for row in rows], out=offsets[1:])
    dtype = element.to_pandas_dtype()
    present = [np.asarray(row, dtype=dtype) for row in rows if row is not None]
    values = pa.array(np.concatenate(present) if present else np.zeros(0, dtype), type=element)
    mask = pa.array([row is None for row in rows]) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)
