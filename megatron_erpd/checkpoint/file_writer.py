"""Writing a large file in one go: hashed on the way, in a thread of its own, under its name only when it is whole."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_erpd.errors import CheckpointError

_FEW_BYTES = 2**16
_SYNC_BYTES = 2**26


class FileWriter:
    """A file that is written from its first byte to its last and then published by rename.

    `submit` hands a piece of work to the writer's thread and waits for the one before: while a tensor is written and
    hashed, the next one is read. Two of them are in memory.

    Raises:
        CheckpointError: the file can't be written (a full disk, say); names it. What was written of it is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self.size = 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._digest = hashlib.sha256()
        self._thread, self._hasher, self._syncer = (ThreadPoolExecutor(1) for _ in range(3))
        self._syncing: Future[None] | None = None
        self._synced = 0
        self._pending: Future[None] | None = None
        self._file: io.RawIOBase | None = None
        try:
            self._file = self._temporary.open("wb", buffering=0)
        except OSError as error:
            self._close()
            raise self._failed(error) from None

    def submit(self, work: Callable[[FileWriter], None]) -> None:
        """Has the thread do `work`, which calls `write`."""
        self._wait()
        self._pending = self._thread.submit(work, self)

    def write(self, data: Any) -> int:
        """Appends bytes (of any object with a buffer) and returns how many: all of them."""
        assert self._file is not None
        view = memoryview(data).cast("B")
        # While the system copies the bytes; handing a few of them to a thread costs more than it saves.
        hashing = self._hasher.submit(self._digest.update, view) if len(view) > _FEW_BYTES else None
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:]) or 0
        finally:
            if hashing is None:
                self._digest.update(view)
            else:
                hashing.result()
        self.size += len(view)
        self._sync()
        return len(view)

    def _sync(self) -> None:
        """Has what was written go to disk on the way, so that little is left to wait for at the end."""
        assert self._file is not None
        if self.size - self._synced < _SYNC_BYTES or (self._syncing is not None and not self._syncing.done()):
            return
        if self._syncing is not None:
            self._syncing.result()  # the system tells an error once
        self._synced = self.size
        self._syncing = self._syncer.submit(os.fdatasync, self._file.fileno())

    def flush(self) -> None:
        """Does nothing: there is no buffer. `torch.save` asks for it."""

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        is_whole = False
        try:
            if kind is None:
                self._wait()
                if self._syncing is not None:
                    self._syncing.result()
                assert self._file is not None
                os.fsync(self._file.fileno())
                is_whole = True
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._close()
            if not is_whole:
                self._temporary.unlink(missing_ok=True)
        if is_whole:
            self.sha256 = self._digest.hexdigest()
            os.replace(self._temporary, self.path)

    def _close(self) -> None:
        self._thread.shutdown()
        self._hasher.shutdown()
        self._syncer.shutdown()
        if self._file is not None:
            self._file.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, RuntimeError) as error:
            # torch.save hides what went wrong in its file behind an error of its own.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise self._failed(cause) from None

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: can't be written ({error.strerror or error}); make room and run it again")


def sync_folder(folder: Path) -> None:
    """Puts the folder's names on disk, so that a renamed file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int) -> None:
    """Refuses a folder whose disk has no room for so many bytes.

    Raises:
        CheckpointError: names what is needed and what is free.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise CheckpointError(
            f"{folder}: {needed / 1e9:.2f} GB are to be written and {free / 1e9:.2f} GB are free; make room or give "
            "another --output"
        )
