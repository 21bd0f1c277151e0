"""Keeps a second job out of a stage's folder.

A lock is a file with the job's number and how often it was restarted. It is made by a hard link, of which one alone
succeeds on every file system (flock may not reach other nodes), and outlives the job: a job that SLURM puts back into
the queue finds its own lock again, and a lock whose job the queue has forgotten is taken over.

To take over a lock is itself locked, by a lock whose name says whose is taken over. So nobody moves a lock that another
took over in the meantime, and a job that is killed while it takes over is followed in the same way.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError
from megatron_erpd.slurm.queue import state_of

_ENDED = ("", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
_POLL_SECONDS = 0.5
_ENDING_SECONDS = 60.0
"""How long a job that is ending may keep a lock from the one that comes after it."""


class JobLock:
    """The lock of one job, in one of its starts."""

    def __init__(self, path: Path, job_id: str, restart: int) -> None:
        self.path = path
        self.mine: dict[str, Any] = {"job": job_id, "restart": restart}
        self.mine |= {"host": socket.gethostname(), "process": os.getpid()}

    def acquire(self, wait: float = _ENDING_SECONDS) -> None:
        """Takes the lock.

        Args:
            wait: seconds that an ending job may keep it; one that is queued or runs keeps it as long as it does.

        Raises:
            StageError: another job has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path.with_name(f".{self.path.name}.{self.mine['job']}-{self.mine['restart']}-{os.getpid()}")
        own.write_text(json.dumps(self.mine))
        deadline = time.monotonic() + wait
        try:
            while not self._try(own):
                holder = self.holder()
                if holder is None:
                    continue
                state = state_of(str(holder["job"])) if holder["job"] != self.mine["job"] else ""
                if state in _ENDED:
                    if self._take_over(holder, own):
                        return
                elif state != "COMPLETING" or time.monotonic() > deadline:
                    raise StageError(
                        f"{self.path}: job {holder['job']} ({state.lower()}, on {holder['host']}) has this stage; wait "
                        f"for it, or `scancel {holder['job']}`"
                    )
                else:
                    time.sleep(_POLL_SECONDS)
        finally:
            own.unlink(missing_ok=True)

    def held(self) -> bool:
        """Whether it is still this job's, in this start: a node that SLURM gave up may have gone on."""
        return self.holder() == self.mine

    def release(self) -> None:
        if self.held():
            self.path.unlink(missing_ok=True)

    def holder(self) -> dict[str, Any] | None:
        """Whose it is; None where it is nobody's.

        Raises:
            StageError: the file is not a lock.
        """
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise StageError(f"{self.path}: is no lock of a job; delete it when no job runs this stage") from None

    def _try(self, own: Path) -> bool:
        try:
            os.link(own, self.path)
        except FileExistsError:
            return False
        return True

    def _take_over(self, holder: dict[str, Any], own: Path) -> bool:
        """Replaces the lock of a job that is gone by this job's; returns False where another job was quicker.

        Raises:
            StageError: another job is about to take it over.
        """
        gone = f"{holder['job']}-{holder['restart']}-{holder['host']}-{holder['process']}"
        right = JobLock(self.path.with_name(f"{self.path.name}.after-{gone}"), self.mine["job"], self.mine["restart"])
        right.acquire()
        try:
            if self.holder() != holder:
                return False
            os.replace(own, self.path)  # as no other job may, and the one that is gone does not come back
            return True
        finally:
            right.release()
