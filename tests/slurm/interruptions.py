"""Interrupting the jobs of a run at their work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_erpd.slurm.jobs import JobRecord
from megatron_erpd.slurm.queue import queued, slurm
from megatron_erpd.slurm.submit import read_submitted, record_file
from tests.slurm.runs import Run

WAYS = ("the signal before the time limit", "SIGKILL of the stage's processes")
"""How a job is interrupted, in its first start and in its second."""


@dataclass
class Task:
    """A job, or one of an array."""

    record: JobRecord
    job: str
    """The number that sbatch printed."""
    slice: int = 0
    begun: dict[int, float] = field(default_factory=dict)
    """When a start was first seen at its stage."""
    interrupted: int = 0
    """How often it was."""

    @property
    def number(self) -> str:
        return f"{self.job}_{self.slice}" if self.slice else self.job

    @property
    def name(self) -> str:
        return f"{self.record.name} {self.slice}" if self.slice else self.record.name

    @property
    def output(self) -> Path:
        return (self.record.as_slice(self.slice) if self.slice else self.record.as_stage()).output

    def works(self, root: Path, file: str | None) -> bool:
        """Whether its next start is at its stage, and has written this file of the artifact."""
        restart = self.interrupted
        log = root / "logs" / "slurm" / f"{self.record.name}-{self.number}-{restart}.log"
        if restart not in self.begun:
            if not (log.is_file() and f"start {restart} of job" in log.read_text()):
                return False
            self.begun[restart] = time.time()
        if file is None:
            return True
        with suppress(FileNotFoundError):
            return (self.output / file).stat().st_mtime > self.begun[restart]
        return False

    def interrupt(self) -> bool:
        """Does it in the way that has its turn; False where there is nothing to kill yet."""
        if self.interrupted == 0:
            slurm("scancel", "--batch", "--signal=USR1", self.number)
        else:
            processes = processes_of_stage(self.job, self.slice)
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not processes:
                return False
        self.interrupted += 1
        return True


def interrupt_all(run: Run, files: Mapping[str, str], seconds: float) -> list[Task]:
    """Interrupts all jobs of a run in each of the `WAYS` and waits for their end.

    Args:
        files: the file of an artifact that shows that a command is at its work; one that is not named is interrupted as
            soon as it has been started.
    """
    tasks = []
    for name, submitted in read_submitted(run.root).items():
        record = JobRecord.read(record_file(run.root, name))
        slices = range(1, record.slices + 1) if record.slices > 1 else (0,)
        tasks += [Task(record, str(submitted["id"]), number) for number in slices]

    def all_ended() -> bool:
        for task in tasks:
            if task.interrupted < len(WAYS) and task.works(run.root, files.get(task.record.as_stage().command)):
                task.interrupt()
        known = queued()
        return not any(task.job in known for task in tasks)

    run.until(all_ended, seconds, "all jobs end")
    return tasks


def processes_of_stage(job: str, slice: int = 0) -> list[int]:
    """What srun has started in a job of this machine: neither the program around the stage nor srun itself."""
    wanted = {"SLURM_JOB_ID": job} if not slice else {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(slice)}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            variables = dict(word.split("=", 1) for word in words if "=" in word)
            if "SLURM_STEP_ID" in variables and wanted.items() <= variables.items():
                found.append(int(path.parent.name))
    return found
