"""What a job of SLURM runs around its stage: `python -m megatron_erpd.slurm.job RUN JOB -- COMMAND`.

The command's exit code does not decide (`outcome.judge`). A stage is done when its artifact is complete; otherwise its
job goes back into the queue, as often as `slurm.requeues` says, unless the stage has named a mistake of the user's,
which would be there again. Then the jobs that wait for it are cancelled by SLURM.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_erpd.errors import StageError
from megatron_erpd.launch.failure import describe_code
from megatron_erpd.launch.interim_report import InterimReport
from megatron_erpd.launch.outcome import judge
from megatron_erpd.launch.program import run_command
from megatron_erpd.launch.watch import Watch, read_from
from megatron_erpd.locks import NodeLock
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings.slurm import slurm_patience
from megatron_erpd.slurm.jobs import JobRecord, slurm_folder
from megatron_erpd.slurm.queue import slurm, state_of, steps_of
from megatron_erpd.slurm.submit import record_file, shared_with_jobs

_POLL_SECONDS = 0.1
_TRY_SECONDS = 1.0
"""From one attempt to tell the stage's processes of a signal to the next, where they were not there yet."""
_LOCK_SECONDS = 30.0
"""How often a job looks whether the stage is still its own."""
_SOON_SECONDS = 5.0
"""From the signal that makes a hanging process show its stacks to the one that kills it, and the like."""
_KILLED_SECONDS = 600.0
"""A job that was put back into the queue waits so long for SLURM to end it here."""
_VISIBLE_SECONDS = 10
_SEES_TOKEN = """for i in $(seq "$2"); do
  if [ "$(cat "$0" 2>/dev/null)" = "$1" ]; then exit 0; fi
  sleep 1
done
echo "$SLURMD_NODENAME ($(hostname)) does not see $0"
exit 1"""
_ENDED = ("", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
_ENDING_SECONDS = 60.0
"""How long a job that is ending may keep a lock from the one that comes after it."""
_USERS_FAULT = re.compile(r"^\s*exitcode\s*:\s*2\b", re.MULTILINE)
"""What torchrun says of a process that ended with 2; it ends with 1 itself."""


def main(argv: list[str]) -> None:
    """Runs a stage's command in a job of SLURM, until its artifact is complete or the job is queued again."""
    at = argv.index("--")
    parser = argparse.ArgumentParser(prog="python -m megatron_erpd.slurm.job", description=main.__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("job", help="name of the job: RUN/slurm/JOB.json says what it is")
    parser.add_argument("--log", type=Path, required=True, help="file that gets what the stage prints")
    given = parser.parse_args(argv[:at])
    record = JobRecord.read(record_file(given.run, given.job))
    with shared_with_jobs(given.run):
        sys.exit(StageJob(given.run, record, given.log).run(argv[at + 1 :]))


def job_lock(path: Path, job_id: str, restart: int, wait: float = _ENDING_SECONDS) -> NodeLock:
    """The lock of a job, in one of its starts: that of its own former start, or of a job that has ended, is taken over.

    Args:
        wait: seconds that an ending job may keep it; one that is queued or runs keeps it as long as it does, which is a
            `StageError` that names it.
    """

    def is_gone(holder: dict[str, Any], waited: float) -> bool:
        state = state_of(str(holder["job"])) if holder["job"] != job_id else ""
        if state not in _ENDED and (state != "COMPLETING" or waited > wait):
            raise StageError(
                f"{path}: job {holder['job']} ({state.lower()}, on {holder['host']}) has this stage; wait for it, or "
                f"`scancel {holder['job']}`"
            )
        return state in _ENDED

    return NodeLock(path, {"job": job_id, "restart": restart}, is_gone)


class StageJob:
    """A stage in a job of SLURM, in one of its starts."""

    def __init__(self, root: Path, record: JobRecord, log: Path) -> None:
        self.root, self.record, self.log = root, record, log
        self.id = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.artifacts = Artifacts(root, checksums=False)
        self.slice = int(os.environ["SLURM_ARRAY_TASK_ID"]) if record.slices > 1 else 0
        # The last job of an array has the number of the array, which SLURM takes for all of its jobs.
        self.only_this = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{self.slice}" if self.slice else self.id
        self.stage = record.as_slice(self.slice) if self.slice else record.as_stage()
        name = f"{record.name}-{self.slice}" if self.slice else record.name
        self.lock = job_lock(slurm_folder(root) / "locks" / name, self.id, self.restart)
        self.signals: list[int] = []
        self.why_ended = ""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    def run(self, command: Sequence[str]) -> int:
        """Returns the job's exit code; does not return when the job goes back into the queue.

        Raises:
            StageError: the stage failed for good.
        """
        self.lock.acquire()
        try:
            if self._begin():
                self._say(f"{self.stage.name} is complete already")
                return 0
            self._check_shared()
            start = self.log.stat().st_size
            with self._page_drawn():  # while the stage is at work, so that no stage waits for it
                code = self._execute(command, start)
            return self._judge(code, start)
        finally:
            if not self.why_ended.startswith("requeued"):
                self.lock.release()

    def _begin(self) -> bool:
        """Makes the folder ready; returns whether the artifact is complete."""
        if self.slice:  # all slices look at the folder of the whole, one after the other
            whole = job_lock(self.lock.path.with_name(f"{self.record.name}-whole"), self.id, self.restart)
            self._wait_for(whole)
            try:
                if self._make_way(self.record.as_stage()):
                    return True
            finally:
                whole.release()
        if self._make_way(self.stage):
            return True
        if not self.stage.is_tool:
            self.artifacts.begin(self.stage)
        return False

    def _wait_for(self, lock: NodeLock) -> None:
        deadline = time.monotonic() + 600
        while True:
            try:
                return lock.acquire()
            except StageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _make_way(self, stage: Stage) -> bool:
        """Puts an artifact with other settings or inputs aside; returns whether the one asked for is there."""
        assessment, lines = self.artifacts.ready(stage)
        for line in lines:
            self._say(f"{stage.name}: {line}")
        return assessment.found == "complete"

    def _check_shared(self) -> None:
        """A file that is written here must be seen on all nodes."""
        if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) == 1:
            return
        path = (slurm_folder(self.root) / f".seen-{self.id}-{self.restart}").absolute()
        token = secrets.token_hex(8)
        path.write_text(token)
        command = ["srun", "--ntasks-per-node=1", "bash", "-c", _SEES_TOKEN, str(path), token, str(_VISIBLE_SECONDS)]
        try:
            seen = subprocess.run(command, capture_output=True, text=True)
        finally:
            path.unlink(missing_ok=True)
        if seen.returncode != 0 and not self.signals:
            raise StageError(
                f"{self.root}: the nodes of the job do not share this folder; give an --output on a file system that "
                f"all nodes have\n{seen.stdout.strip() or seen.stderr.strip()}"
            )

    def _execute(self, command: Sequence[str], start: int) -> int:
        """Runs the command, passes the signals on, and ends what hangs."""
        if self.signals:  # came before there was anything to tell
            return 1
        self._say(f"{self.stage.name}, start {self.restart} of job {self.id} on {os.environ.get('SLURM_JOB_NODELIST')}")
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL)
        files = [self.log, self.stage.output]
        watch = Watch(files, self.record.hang_minutes * 60)
        asked, tried, told, patience = 0.0, 0.0, False, slurm_patience(self.record.signal_seconds)
        looked = time.monotonic()
        while (code := process.poll()) is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if self.signals and not asked:
                asked = now
                self._say(f"signal {signal.Signals(self.signals[0]).name}: telling the stage to save and to end")
            if asked and now - asked > patience:
                self._say(f"the stage has not ended in {patience:.0f} s after it was told to")
                self._kill(process)
            elif asked and not told and now - tried > _TRY_SECONDS:
                told, tried = self._tell(signal.SIGTERM), now
            elif not asked and watch.hangs():
                self.why_ended = f"hung: no output and no file for {self.record.hang_minutes:g} minutes"
                self._say(f"{self.why_ended}; its stacks follow")
                self._tell(signal.SIGABRT)
                self._wait(process, _SOON_SECONDS)
                self._kill(process)
            elif now - looked > _LOCK_SECONDS:
                looked = now
                if not self.lock.held():
                    self._kill(process)
                    raise StageError(
                        f"{self.lock.path}: is held by another job now; this start of the job was given up"
                    )
        return code

    def _judge(self, code: int, start: int) -> int:
        """What becomes of the job after its command has ended."""
        outcome = judge(self.artifacts, self.stage, code, self.log, start)
        if outcome.done:
            self._say(f"{self.stage.name} is complete" + (f"; {outcome.warning}" if outcome.warning else ""))
            self._write_figures()
            return 0
        named = outcome.why if outcome.own_error else ""
        if signal.SIGUSR1 in self.signals or (self.signals and state_of(self.id) == "RUNNING"):
            self._requeue("its time was over", named)
        if self.signals:
            self._say(f"{self.stage.name} was stopped; what is saved stays")
            return 1
        if named and (code == 2 or _USERS_FAULT.search(read_from(self.log, start))):
            raise StageError(f"{self.stage.name} failed: {named}\nnot queued again, as it would fail again")
        ended = f"its command ended with {describe_code(code)}" if code else "its artifact is not complete"
        self._requeue(self.why_ended or ended, outcome.why)

    def _write_figures(self) -> None:
        """Brings the figures of the run's report up to date; that is quick, and no error of it is this job's."""
        report = InterimReport(self.root)
        if not self.slice and report.shows(self.stage) and (note := report.write_figures()):
            self._say(note)

    @contextmanager
    def _page_drawn(self) -> Iterator[subprocess.Popen[bytes] | None]:
        """Draws the page of the run's report, of what is done already, in a process that ends with the context; where
        that is due."""
        report = InterimReport(self.root)
        if self.slice or not report.shows(self.stage) or not report.page_is_due():
            yield None
            return
        command = [sys.executable, "-m", "megatron_erpd.launch.interim_report", str(self.root)]
        page = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield page
        finally:
            page.kill()
            page.wait()

    def _requeue(self, why: str, details: str) -> NoReturn:
        if self.restart >= self.record.requeues:
            raise StageError(
                f"{self.stage.name} failed: {why}, and the job was queued again {self.restart} times already "
                f"(slurm.requeues)\n{details}"
            )
        self._say(f"{self.stage.name}: {why}; the job is queued again ({self.restart + 1} of {self.record.requeues})")
        if details:
            self._say(details)
        del self.signals[:]
        try:
            slurm("scontrol", "requeue", self.only_this)
        except StageError:
            # SLURM ends the job, and scontrol as a part of it, maybe before scontrol could tell that it is done.
            if not self._is_signalled(_SOON_SECONDS):
                raise
        self.why_ended = "requeued"
        self._is_signalled(_KILLED_SECONDS)
        sys.exit(1)

    def _is_signalled(self, seconds: float) -> bool:
        """Waits for a signal, for so long at most."""
        deadline = time.monotonic() + seconds
        while not self.signals and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return bool(self.signals)

    def _tell(self, number: signal.Signals) -> bool:
        """Signals all processes of the stage, on all nodes; not this one. Returns whether there were any: the step that
        srun makes may not be there yet, or may have ended by itself.

        By the number of the step: SLURM takes a SIGKILL for the job to be its cancellation.
        """
        try:
            steps = steps_of(self.only_this)
            if steps:
                slurm("scancel", f"--signal={number.name.removeprefix('SIG')}", *steps)
            return bool(steps)
        except StageError as error:
            self._say(str(error))
            return False

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self._tell(signal.SIGKILL)
        self._wait(process, _SOON_SECONDS)
        process.kill()
        process.wait()

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def _say(self, text: str) -> None:
        print(f"[job] {text}", flush=True)


if __name__ == "__main__":
    run_command(main)
