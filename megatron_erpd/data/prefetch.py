"""Making items ahead of need, on a thread of their own."""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

DEPTH = 2
"""Items that lie ready: one for the step that comes, one for a hitch."""
_END = object()


class Prefetch[T](Iterator[T]):
    """The same items in the same order, made up to `depth` ahead. An error of theirs comes out where its item would.

    Use as a context, or call `close`. The thread has also ended after the last item and after `close_all`; each waits
    for the item that is being made. A program that ends without any of these waits for it too: a thread that Python
    leaves behind in a torch operation would abort the process.
    """

    def __init__(self, items: Iterator[T], depth: int = DEPTH) -> None:
        self._items = items
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Any]] = deque()
        self._depth = depth
        _open.add(self)

    def __next__(self) -> T:
        if self._thread is None:
            raise StopIteration
        while len(self._ahead) <= self._depth:
            self._ahead.append(self._thread.submit(next, self._items, _END))
        try:
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        return item

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, and returns when it has ended."""
        # At most once: what holds it may be taken down after the modules that this needs.
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=True)
            _open.discard(self)


_open: set[Prefetch[Any]] = set()


@atexit.register
def close_all() -> None:
    """Ends all threads, whoever holds what they make; a stage's process calls it when the stage ends."""
    for items in list(_open):
        items.close()
