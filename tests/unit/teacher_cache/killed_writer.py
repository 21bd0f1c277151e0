"""Processes that write a cache until they are killed: `killed_writer.py ROLLOUTS FOLDER`, a cache in FOLDER/STAGE each.

The signal is a real SIGKILL. A process sends it to itself, so that it comes at the moment that is meant.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_erpd import files
from megatron_erpd.data.rollouts import Rollouts, read_rollouts
from megatron_erpd.teacher_cache import CacheWriter, parts, prepare_cache
from megatron_erpd.teacher_cache.writer import exclusive
from tests.unit.teacher_cache.caches import HIDDEN_META, write_row

finalize = importlib.import_module("megatron_erpd.teacher_cache.finalize")
PART_BYTES = 60
"""A few rows to a part."""
STAGES: dict[str, tuple[Any, str, int, bool]] = {
    # What is replaced, which call of it is the last, and whether it still does its work.
    "half-a-part": (parts._Hashing, "write", 150, False),
    "part-without-its-name": (files, "publish", 3, False),
    "after-a-part": (files, "publish", 3, True),
    "before-the-indices": (finalize, "write_index", 1, False),
    "between-the-indices": (finalize, "write_index", 3, True),
    "before-the-description": (finalize, "write_cache_file", 1, False),
    "description-without-its-name": (os, "replace", len(HIDDEN_META.tables) + 1, False),
}


def deadly(function: Callable[..., Any], last: int, works: bool) -> Callable[..., Any]:
    calls = []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) < last:
            return function(*arguments, **options)
        if works:
            function(*arguments, **options)
        elif function.__name__ == "write":  # half of what was to be written
            file = arguments[0].file
            file.write(bytes(arguments[1])[: max(1, len(bytes(arguments[1])) // 2)])
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def write(rollouts: Rollouts, folder: Path, stage: str) -> None:
    target, name, last, works = STAGES[stage]
    setattr(target, name, deadly(getattr(target, name), last, works))
    with exclusive(folder):
        prepare_cache(folder, HIDDEN_META)
        with CacheWriter(folder, HIDDEN_META, part_bytes=PART_BYTES) as writer:
            for i in range(len(rollouts)):
                write_row(writer, rollouts, i)
        finalize.finalize(folder, HIDDEN_META, rollouts.sample_ids)


def main(rollouts: Path, folder: Path) -> None:
    """Prints what ended each process: minus the signal's number."""
    rows, ended = read_rollouts(rollouts), {}
    for stage in STAGES:
        child = os.fork()  # this process has no other threads
        if child == 0:
            write(rows, folder / stage, stage)
            os._exit(0)
        ended[stage] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
