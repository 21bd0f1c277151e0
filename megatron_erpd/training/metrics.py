"""A training's metrics as JSON lines on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_erpd.files import json_line
from megatron_erpd.progress import keep_before

SAVE_TIME = "save-checkpoint-time"
"""Seconds that a training has waited for the save after a step, in that step's line."""
_LOGGED = ("learning-rate", "grad-norm", "iteration-time", "world-size")


class JsonLinesWriter:
    """Stands before Megatron's TensorBoard writer and keeps each step's scalars as one JSON line.

    Megatron writes scalars on the last rank only; this object exists there and passes everything on. Lines of
    iterations that a resumed run does again are dropped when it does them again. A step's line is in the file with each
    of its scalars: when its checkpoint is saved, it is there, and a kill afterwards leaves no gap. A scalar that is NaN
    or infinite is null there.

    Args:
        path: of the lines.
        inner: Megatron's writer.
        save_seconds: what all saves of this process have taken so far.
    """

    def __init__(self, path: Path, inner: Any, save_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self._path = path
        self._inner = inner
        self._save_seconds = save_seconds
        self._saved = 0.0
        self._row: dict[str, float] = {}
        self._file: BinaryIO | None = None
        self._start = 0
        self._is_new = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add_scalar(self, name: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        self._inner.add_scalar(name, value, step, *args, **kwargs)
        if "/" not in name and name not in _LOGGED or " vs " in name:
            return
        if self._row and self._row["iteration"] != step:
            self.end_step()
        self._row.setdefault("iteration", int(step))
        self._row[name] = float(value)
        self._write()

    def _write(self) -> None:
        """Writes the step's line over what was written of it."""
        if self._file is None:
            if self._is_new:
                self._is_new = False
                keep_before(self._path, int(self._row["iteration"]))
                self._path.touch()
            self._file = self._path.open("r+b")
            self._start = self._file.seek(0, os.SEEK_END)
        self._file.seek(self._start)
        self._file.write(json_line(self._row).encode())
        self._file.truncate()

    def flush(self) -> None:
        """Leaves nothing unwritten."""
        self._inner.flush()
        if self._file is not None:
            self._file.flush()

    def end_step(self) -> None:
        """Ends the step's line, with the time of the save after it."""
        seconds = self._save_seconds()
        if self._row and seconds > self._saved:
            self._row[SAVE_TIME] = round(seconds - self._saved, 3)
            self._write()
        self._saved = seconds
        self._row = {}
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Ends the step's line, and TensorBoard's thread."""
        try:
            self.end_step()
        finally:
            self._inner.close()
