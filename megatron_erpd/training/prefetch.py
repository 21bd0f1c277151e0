"""Making items ahead of need, on a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

DEPTH = 2
"""Items that lie ready: one for the step that comes, one for a hitch."""
_POLL_SECONDS = 0.2


def prefetch[T](items: Iterator[T], depth: int = DEPTH) -> Generator[T]:
    """The same items in the same order, made up to `depth` ahead. An error of theirs comes out where its item would.

    Closing the iterator ends the thread; a program that ends doesn't wait for it.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_End())
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the item
            put(_End(error))

    threading.Thread(target=work, name="prefetch", daemon=True).start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None
