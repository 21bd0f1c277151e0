"""Progress lines: how commands say how far they are, and how those who watch a log find that again."""

from __future__ import annotations

import re
import sys
from typing import TextIO

_FORM = re.compile(r"(?!warning)[a-z].* [\d,.]+ of [\d,.]+( [A-Za-z]+)?(, .*)?")


def say_progress(what: str, done: str, total: str, more: str = "", *, file: TextIO | None = None) -> None:
    """Prints `WHAT DONE of TOTAL, MORE`, as `sampled 512 of 1024`; to standard output, or `file`.

    `what` begins with a small letter; `done` and `total` are numbers, the total maybe with its unit.
    """
    print(f"{what} {done} of {total}" + (f", {more}" if more else ""), file=file or sys.stdout, flush=True)


def is_progress(line: str) -> bool:
    """Whether a line of a log is one that `say_progress` wrote."""
    return _FORM.fullmatch(line.strip()) is not None
