"""How the last attempt at each stage of a run on this machine went, as `megatron-erpd status` shows it.

It is kept beside the stage's log. A run that is killed can't write how it ended: then the attempt is still said to be
running, and nobody holds the run's lock.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_erpd.files import write_json
from megatron_erpd.locks import RUN_LOCK, lock_holder, this_process

_GROWS_SECONDS = 300.0
"""A stage on another machine, whose lock may not be seen here, is at work when its log has grown in this time."""


@dataclass(frozen=True)
class Attempt:
    """One start of a stage.

    Attributes:
        runner: `process 17 on HOST`, as in the lock of the run that started it.
        process: of the stage, on the same host.
        log_start: where its part of the log begins, in bytes.
        started: seconds since the epoch.
        error: what it said when it failed.
    """

    state: Literal["running", "done", "failed", "stopped"]
    runner: str
    process: int
    log_start: int
    started: float
    seconds: float | None = None
    error: str = ""


def attempt_file(log: Path) -> Path:
    """Where the last attempt of the stage with this log is kept."""
    return log.with_suffix(".json")


def note_start(log: Path, process: int, log_start: int) -> Attempt:
    """Keeps that a stage was started now."""
    attempt = Attempt("running", this_process(), process, log_start, time.time())
    _keep(log, attempt)
    return attempt


def note_end(log: Path, attempt: Attempt, state: Literal["done", "failed", "stopped"], error: str = "") -> None:
    """Keeps how it ended."""
    _keep(log, replace(attempt, state=state, seconds=time.time() - attempt.started, error=error))


def last_attempt(log: Path) -> Attempt | None:
    """The last attempt at the stage with this log; `stopped` where its run or itself was killed. None: there was none.

    `log` lies in `logs/` in the run's folder.
    """
    try:
        attempt = Attempt(**json.loads(attempt_file(log).read_text()))
    except (OSError, ValueError, TypeError):  # of a log of an earlier version there is nothing
        return None
    return replace(attempt, state="stopped") if attempt.state == "running" and not _lives(log, attempt) else attempt


def _lives(log: Path, attempt: Attempt) -> bool:
    if attempt.runner.rpartition(" on ")[2] != socket.gethostname():
        return log.is_file() and time.time() - log.stat().st_mtime < _GROWS_SECONDS
    return lock_holder(log.parent.parent / RUN_LOCK) == attempt.runner and Path(f"/proc/{attempt.process}").is_dir()


def _keep(log: Path, attempt: Attempt) -> None:
    with suppress(OSError):  # a full disk ends the stage by itself, with its own message
        write_json(attempt_file(log), asdict(attempt))
