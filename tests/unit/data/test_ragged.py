import numpy as np
import pyarrow as pa

from megatron_erpd.data.ragged import Ragged, list_array, row_with_null_element

ROWS = [[1, 2], [], None, [3], [], [4, 5, 6]]


def chunked() -> pa.ChunkedArray:
    whole = pa.array(ROWS, type=pa.list_(pa.int32()))
    # A sliced chunk keeps the longer buffer: offsets don't begin at 0.
    return pa.chunked_array([whole.slice(0, 1), whole.slice(1, 0), whole.slice(1, 3), whole.slice(4)])


def test_rows_lengths_and_nulls_over_sliced_chunks() -> None:
    ragged = Ragged(chunked())
    assert len(ragged) == 6
    assert [ragged.row(i).tolist() for i in range(6)] == [[1, 2], [], [], [3], [], [4, 5, 6]]
    assert ragged.lengths.tolist() == [2, 0, 0, 1, 0, 3]
    assert ragged.valid.tolist() == [True, True, False, True, True, True]


def test_first_row_where_looks_only_at_owned_elements() -> None:
    ragged = Ragged(chunked())
    for value, row in ((1, 0), (2, 0), (3, 3), (4, 5), (6, 5), (7, None)):
        assert ragged.first_row_where(lambda v, value=value: v == value) == row
    # The last chunk's buffer also holds 1, 2 and 3, which belong to rows outside of it.
    tail = Ragged(pa.chunked_array([pa.array(ROWS, type=pa.list_(pa.int32())).slice(4)]))
    assert tail.first_row_where(lambda v: v <= 3) is None


def test_rows_are_views_not_copies() -> None:
    ragged = Ragged(pa.chunked_array([pa.array([[1.0, 2.0]], type=pa.list_(pa.float32()))]))
    assert not ragged.row(0).flags.writeable
    assert np.shares_memory(ragged.row(0), ragged.row(0))


def test_row_with_null_element() -> None:
    clean = pa.chunked_array([pa.array(ROWS, type=pa.list_(pa.int32()))])
    assert row_with_null_element(clean) is None
    dirty = pa.chunked_array([*clean.chunks, pa.array([[1], [2, None]], type=pa.list_(pa.int32()))])
    assert row_with_null_element(dirty) == 7


def test_list_array_is_what_pyarrow_makes() -> None:
    rows = [np.array([1.5, 2.0]), None, np.zeros(0), np.array([3.0])]
    made = list_array(rows, pa.float32())
    made.validate(full=True)
    assert made.equals(pa.array([None if r is None else r.tolist() for r in rows], type=pa.list_(pa.float32())))
    assert list_array([None, None], pa.int32()).to_pylist() == [None, None]
    half = list_array([np.array([0.1])], pa.float16())
    assert half.type == pa.list_(pa.float16())


def test_empty_column() -> None:
    ragged = Ragged(pa.chunked_array([], type=pa.list_(pa.int32())))
    assert len(ragged) == 0 and ragged.first_row_where(lambda v: v > 0) is None
