"""Items made ahead of need: the same ones, in order, on another thread, and no thread is left behind."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from megatron_erpd.data.batch import Prefetch, close_all, repeated


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


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

    assert list(Prefetch(items(), 3)) == list(range(20))
    assert threading.main_thread() not in makers
    assert not threads()


def test_it_runs_ahead_and_no_further() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with Prefetch(items(), 2) as ahead:
        assert next(ahead) == 0
        wait_for(lambda: len(made) == 3)  # one given, two ready
        time.sleep(0.05)
        assert len(made) == 3
    assert not threads()
    assert len(made) == 3


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 2 is damaged")

    ahead = Prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 2 is damaged"):
        next(ahead)
    assert not threads()


@pytest.mark.parametrize("end", ["close", "close_all", "error in the loop"])
def test_its_end_waits_for_the_item_in_the_making(end: str) -> None:
    making, made = threading.Event(), []

    def items() -> Iterator[int]:
        for i in itertools.count():
            if i == 2:
                making.set()
                time.sleep(0.2)
                made.append(i)
            yield i

    ahead = Prefetch(items())
    if end == "error in the loop":
        with pytest.raises(KeyboardInterrupt), ahead:
            for _ in ahead:
                making.wait(10)
                raise KeyboardInterrupt
    else:
        assert next(ahead) == 0 and making.wait(10)
        close_all() if end == "close_all" else ahead.close()
    assert made == [2] and not threads()
    assert list(ahead) == []


BUSY_IN_TORCH = """
import itertools, os, sys, torch
from megatron_erpd.data.batch import Prefetch
torch.set_num_threads(1)

def work(i):
    x = torch.randn(256, 256)
    for _ in range(20):
        x = torch.nn.functional.silu(x @ x).clamp(-1, 1)
    return i

ends = ["", "sys.exit(7)", "raise SystemExit(75)", "del ahead", "ahead.close()"]
for number in range(5):
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
ahead = Prefetch(map(work, itertools.count()))
assert [next(ahead) for _ in range(3)] == [0, 1, 2]
exec(ends[number])
"""


def test_programs_that_end_while_their_thread_is_in_torch() -> None:
    """None is aborted (-6); with a daemon thread each of those is that doesn't close it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUSY_IN_TORCH], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["0", "7", "75", "0", "0"]


def test_readers_at_their_own_pace_get_the_same_items_made_once() -> None:
    made: list[weakref.ref[Item]] = []

    def items() -> Iterator[Item]:
        for i in range(5):
            item = Item(i)
            made.append(weakref.ref(item))
            yield item
            del item

    first, second = repeated(items(), 2)
    assert [next(first).number for _ in range(3)] == [0, 1, 2] and len(made) == 3
    assert [next(second).number for _ in range(2)] == [0, 1]
    gc.collect()
    assert [ref() is None for ref in made] == [True, True, False]
    assert [item.number for item in second] == [2, 3, 4] and [item.number for item in first] == [3, 4]
    assert len(made) == 5


class Item:
    def __init__(self, number: int) -> None:
        self.number = number
