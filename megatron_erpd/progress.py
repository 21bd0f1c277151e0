"""How far a stage is: progress lines in its log, and the JSON lines of `metrics.jsonl`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_erpd.files import json_line, write_text

OnProgress = Callable[[int, int], None]
"""Called with what is finished and the total, during the work."""

_FORM = re.compile(r"(?!warning)[a-z].* [\d,.]+ of [\d,.]+( [A-Za-z]+)?(, .*)?")


def say_progress(what: str, done: str, total: str, more: str = "", *, file: TextIO | None = None) -> None:
    """Prints `WHAT DONE of TOTAL, MORE`, as `sampled 512 of 1024`; to standard output, or `file`.

    `what` begins with a small letter; `done` and `total` are numbers, the total maybe with its unit.
    """
    print(f"{what} {done} of {total}" + (f", {more}" if more else ""), file=file or sys.stdout, flush=True)


def is_progress(line: str) -> bool:
    """Whether a line of a log is one that `say_progress` wrote."""
    return _FORM.fullmatch(line.strip()) is not None


class StepLines:
    """Adds lines to the `metrics.jsonl` of a stage that doesn't train.

    A resumed stage continues the count. Beside its figures each line has `seconds`, since this
    attempt began.

    Args:
        path: the file; its folder is there when the first line is added.
        prefix: before the figures' names, as `sample`.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._started = time.monotonic()
        self._iteration: int | None = None

    def add(self, figures: Mapping[str, Any]) -> None:
        """A line with those of the figures that are numbers."""
        if self._iteration is None:
            rows = read_json_lines(self._path) if self._path.is_file() else []
            self._iteration = max((int(row["iteration"]) for row in rows), default=0)
            keep_before(self._path, self._iteration + 1)  # without a line that a kill cut short
        self._iteration += 1
        row: dict[str, Any] = {"iteration": self._iteration, "seconds": round(time.monotonic() - self._started, 3)}
        row |= {f"{self._prefix}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
        with self._path.open("a") as file:
            file.write(json_line(row))


def keep_before(path: Path, iteration: int) -> None:
    """Drops the lines of a JSON-lines file from `iteration` on (and a last line cut short by a kill)."""
    if not path.is_file():
        return
    kept = [row for row in read_json_lines(path) if row["iteration"] < iteration]
    write_text(path, "".join(map(json_line, kept)))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
