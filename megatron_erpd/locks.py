"""Locks: one program at a time in a folder.

Two kinds, as neither can do the other's work:

`file_lock` is the operating system's lock of an open file (flock). It ends with the last process that has the file
open, so a crash leaves none behind, it can be shared, and child processes can hold it on. But other nodes may not see
it (NFS and Lustre have mount options for that), and it does not outlive a process.

`NodeLock` is a file that exists: every node sees it, and a job that SLURM puts back into the queue finds it again. What
is left behind is taken over, when the one who holds it is known to be gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_erpd.errors import StageError
from megatron_erpd.files import new_file, write_text

RUN_LOCK = ".lock"
"""`file_lock` in a run's folder, held by `megatron-erpd run` and its stages, and shared by jobs and submissions."""
_POLL_SECONDS = 0.1


class Held(Exception):
    """A lock has another holder; the text says which."""


def this_process() -> str:
    """What a lock says of its holder."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: float = 0.2) -> Iterator[IO[str]]:
    """Holds the lock of a file, which is made if need be; yields the open file.

    Args:
        shared: beside others that share it; otherwise alone, and the file says who holds it.
        wait: seconds to wait for it. `lock_holder` may have it for a moment.

    Raises:
        Held: somebody else has it.
        OSError: the file system has no such locks.
    """
    deadline = time.monotonic() + wait
    while True:
        with path.open("a+") as file:
            while not _flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise Held(_holder(file))
                time.sleep(_POLL_SECONDS)
            if not _is_at(file, path):
                continue  # it was removed between opening and locking it
            if not shared:
                file.truncate(0)
                file.write(this_process())
                file.flush()
            yield file
            return


def lock_holder(path: Path) -> str | None:
    """Who holds the lock of a file, as far as this machine sees it; None: nobody."""
    with suppress(FileNotFoundError), path.open() as file:
        if not _flock(file, fcntl.LOCK_SH):
            return _holder(file)
    return None


def _flock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        error.filename = file.name
        raise
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class NodeLock:
    """A lock that all nodes see: a file that exists and says whose it is.

    To take over a lock is itself locked, by a lock whose name says whose is taken over. So nobody replaces a lock that
    another took over in the meantime, and one who is killed while taking over is followed in the same way.

    Args:
        path: of the file.
        mine: what tells this holder from all others, a JSON object; `host` and `process` are added.
        is_gone: whether a holder is gone for good, asked with its record and the seconds that were waited for it; it is
            asked again a little later where that is False. Raises `StageError` to give up.
    """

    def __init__(self, path: Path, mine: dict[str, Any], is_gone: Callable[[dict[str, Any], float], bool]) -> None:
        self.path = path
        self.mine = mine | {"host": socket.gethostname(), "process": os.getpid()}
        self._is_gone = is_gone

    def acquire(self) -> None:
        """Takes the lock. Raises `StageError` where `is_gone` does, or where the file is not a lock."""
        begin = time.monotonic()
        while not self._make():
            holder = self.holder()
            if holder is None:
                continue
            if self._is_gone(holder, time.monotonic() - begin):
                if self._take_over(holder):
                    return
            else:
                time.sleep(_POLL_SECONDS)

    def held(self) -> bool:
        """Whether it is still this holder's: a node that SLURM gave up may have gone on."""
        return self.holder() == self.mine

    def release(self) -> None:
        """Ends the lock where it is this holder's."""
        if self.held():
            self.path.unlink(missing_ok=True)

    def holder(self) -> dict[str, Any] | None:
        """The record of the holder; None where there is none. Raises `StageError` where the file is not a lock."""
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise StageError(f"{self.path}: is not a lock; delete it when nothing works on this folder") from None

    def _make(self) -> bool:
        try:
            with new_file(self.path, replace=False) as temporary:
                temporary.write_text(json.dumps(self.mine))
        except FileExistsError:
            return False
        return True

    def _take_over(self, holder: dict[str, Any]) -> bool:
        """Replaces the lock of a holder that is gone; returns False where another was quicker.

        Raises:
            StageError: another is about to take it over.
        """
        gone = "-".join(map(str, holder.values()))
        right = NodeLock(self.path.with_name(f"{self.path.name}.after-{gone}"), self.mine, self._is_gone)
        right.acquire()
        try:
            if self.holder() != holder:
                return False
            write_text(self.path, json.dumps(self.mine))  # no one else may, and who is gone stays gone
            return True
        finally:
            right.release()
