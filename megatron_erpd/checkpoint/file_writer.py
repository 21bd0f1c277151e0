"""Writing a large file in one go: hashed on the way, under its name only when it is whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import publish, temporary_name

PIECE_BYTES = 2**21
"""What is read, compared or copied at a time: small enough to stay in a processor's cache from one to the other."""
_STAGE_BYTES = 2**22
"""What is hashed and written at a time."""
_STAGES = 4
"""So many are in memory: how far hash and disk may fall behind."""
_ALIGNMENT = 4096
_DIRECT: int = getattr(os, "O_DIRECT", 0)

Fill = Callable[[torch.Tensor, int], None]
"""`fill(rows, start)` puts a tensor's rows `[start, start + n)` into `rows` `[n, ...]`."""


class FileWriter:
    """A file that is written from its first byte to its last and then published by rename. Use as a context.

    Two threads hash and write what the caller has put together. Where the file system can do it, the bytes go to the
    disk without a stay in the system's memory (`O_DIRECT`): in a file of many GB they would only push out others, count
    as the job's own memory, and cost the processor another copy.

    Raises:
        CheckpointError: the file can't be written (a full disk, say); names it. What was written of it is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self.size = 0
        self._temporary = temporary_name(path)
        self._digest = hashlib.sha256()
        self._hasher, self._writer = (ThreadPoolExecutor(1) for _ in range(2))
        self._sent: deque[tuple[np.ndarray, Future[None], Future[None]]] = deque()
        self._stage, self._used = _new_stage(), 0
        self._piece = np.empty(0, dtype=np.uint8)
        try:
            self._descriptor = _create(self._temporary)
        except OSError as error:
            raise self._failed(error) from None

    def append_tensor(self, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> None:
        """Appends a tensor's bytes. `fill` is asked for some rows at a time, in order."""
        row_bytes = prod(shape[1:]) * dtype.itemsize
        step = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            if self._piece.size < count * row_bytes:
                self._piece = np.empty(count * row_bytes, dtype=np.uint8)
            piece = self._piece[: count * row_bytes]
            fill(torch.from_numpy(piece).view(dtype).view(count, *shape[1:]), start)
            self.write(piece)

    def write(self, data: Any) -> int:
        """Appends bytes, of any object with a buffer, which may change afterwards; returns how many: all of them."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            part = view[done : done + _STAGE_BYTES - self._used]
            self._stage[self._used : self._used + len(part)] = np.frombuffer(part, dtype=np.uint8)
            self._used += len(part)
            done += len(part)
            if self._used == _STAGE_BYTES:
                self._send()
        self.size += done
        return done

    def _send(self) -> None:
        """Hands what is staged to the threads that hash and write, and takes a buffer that is free again."""
        staged = memoryview(self._stage)[: self._used]
        hashing = self._hasher.submit(self._digest.update, staged)
        self._sent.append((self._stage, hashing, self._writer.submit(self._write, staged)))
        self._stage, self._used = self._wait() if len(self._sent) == _STAGES else _new_stage(), 0

    def _wait(self) -> np.ndarray:
        """The memory that was sent first, when it was hashed and written."""
        stage, hashing, writing = self._sent.popleft()
        hashing.result()
        try:
            writing.result()
        except OSError as error:
            raise self._failed(error) from None
        return stage

    def _write(self, staged: memoryview) -> None:
        if len(staged) % _ALIGNMENT:  # the end of the file
            _leave_direct(self._descriptor)
        done = 0
        while done < len(staged):
            try:
                done += os.write(self._descriptor, staged[done:])
            except OSError as error:  # a file system may take the flag and refuse the writing
                if error.errno != errno.EINVAL or not _leave_direct(self._descriptor):
                    raise

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        try:
            try:
                if kind is None:
                    if self._used:
                        self._send()
                    while self._sent:
                        self._wait()
            finally:
                self._hasher.shutdown()
                self._writer.shutdown()
                os.close(self._descriptor)
            self.sha256 = self._digest.hexdigest()
            if kind is None:
                publish(self._temporary, self.path)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._temporary.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: can't be written ({error.strerror or error}); make room and run it again")


def _new_stage() -> np.ndarray:
    """Memory that begins with a page, as direct writing wants it."""
    return np.frombuffer(mmap.mmap(-1, _STAGE_BYTES), dtype=np.uint8)


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _leave_direct(descriptor: int) -> bool:
    """Has the rest written in the ordinary way; returns whether it was not already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


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
