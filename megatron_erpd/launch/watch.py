"""Detects a hanging stage by its files, and reads its log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_MOST_BYTES = 4 * 2**20


class Watch:
    """Whether any of some files and folders has changed within a time."""

    def __init__(self, paths: Sequence[Path], seconds: float) -> None:
        """`seconds`: that they may stand still."""
        self.paths, self.seconds = paths, seconds
        self._state = self._look()
        self._changed = self._looked = time.monotonic()

    def hangs(self) -> bool:
        """To be called often; looks at the files at a tenth of the time, and at most twice a minute."""
        now = time.monotonic()
        if now - self._looked < min(self.seconds / 10, 30.0):
            return False
        self._looked, state = now, self._look()
        if state != self._state:
            self._state, self._changed = state, now
        return now - self._changed > self.seconds

    def _look(self) -> tuple[int, int, int]:
        """Number, bytes and latest change of all files."""
        files, size, latest = 0, 0, 0
        for path in self.paths:
            for folder, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
                for name in names:
                    with suppress(OSError):
                        found = os.stat(os.path.join(folder, name))
                        files, size, latest = files + 1, size + found.st_size, max(latest, found.st_mtime_ns)
        return files, size, latest


def read_from(log: Path, start: int) -> str:
    """What a log got since it had `start` bytes: its beginning and its end, when it is long."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(start)
        text = file.read(_MOST_BYTES)
        if end - start > 2 * _MOST_BYTES:
            file.seek(end - _MOST_BYTES)
        text += file.read()
    return text.decode(errors="replace").replace("\r", "\n")
