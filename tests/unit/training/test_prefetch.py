"""Items made ahead of need: the same ones, in order, on another thread, and no thread is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from megatron_erpd.training.prefetch import prefetch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.005)
    assert condition()  # type: ignore[operator]


def test_the_same_items_in_order_from_another_thread() -> None:
    makers: list[threading.Thread] = []

    def items() -> Iterator[int]:
        for i in range(20):
            makers.append(threading.current_thread())
            yield i

    assert list(prefetch(items(), 3)) == list(range(20))
    assert threading.main_thread() not in makers
    wait_for(lambda: not threads())


def test_it_runs_ahead_and_no_further() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with closing(prefetch(items(), 2)) as ahead:
        assert next(ahead) == 0
        # One given, two ready, one that waits for its place.
        wait_for(lambda: len(made) == 4)
        time.sleep(0.05)
        assert len(made) == 4
    wait_for(lambda: not threads())
    assert len(made) == 4


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 2 is damaged")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 2 is damaged"):
        next(ahead)
    wait_for(lambda: not threads())
