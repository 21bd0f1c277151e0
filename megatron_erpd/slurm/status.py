"""Where the jobs of a submitted run are: in the queue, at which step, how long they may still run, how they failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_erpd.errors import StageError
from megatron_erpd.launch.display import Display
from megatron_erpd.launch.processes import error_message, progress_of, tail_of
from megatron_erpd.manifest import read_manifest
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.slurm.jobs import job_name
from megatron_erpd.slurm.queue import Queued, how_ended, queued
from megatron_erpd.slurm.submit import read_submitted


def show_jobs(display: Display, stages: Sequence[Stage], root: Path) -> None:
    """Adds what is known of the jobs to the rows of stages that are not done. Nothing changes where none was submitted.

    Raises:
        StageError: SLURM can't be asked.
    """
    submitted = read_submitted(root)
    known = queued() if submitted else {}
    for stage in stages:
        row = display.rows[stage.name]
        if row.state == "done":
            continue
        for name in (f"{job_name(stage.name)}-slices", job_name(stage.name)):
            if name not in submitted:
                continue
            number = str(submitted[name]["id"])
            if number in known:
                runs = any(job.state in ("RUNNING", "COMPLETING") for job in known[number])
                row.state = "running" if runs else "waiting"
                row.note = _note(name, number, known[number], stage, root)
                break  # what waits for the slices says nothing new
            if _made_later(stage, str(submitted[name].get("submitted", "9999"))):
                continue  # the job did its work; that it is to be done again is not its failure
            how = how_ended(number)
            if how.startswith("COMPLETED"):
                continue
            row.state = "stopped" if how.startswith("CANCELLED") else "failed"
            row.note = f"job {number} {how}{_why(root, name, number)}"
            break


def _made_later(stage: Stage, submitted: str) -> bool:
    """Whether the artifact that is there is of the job that was submitted then, or later."""
    try:
        return read_manifest(stage.output).created >= submitted
    except StageError:
        return False


def _note(name: str, number: str, jobs: Sequence[Queued], stage: Stage, root: Path) -> str:
    """`job 17 RUNNING, 3:10:00 left, start 2, iteration 40, loss 0.31`; of a stage that doesn't train, what it said
    last."""
    states = [job.state for job in jobs]
    counts = ", ".join(f"{states.count(s)} {s}" if len(states) > 1 else s for s in dict.fromkeys(states))
    words = [f"job {number} {counts}"]
    running = [job for job in jobs if job.state == "RUNNING"]
    if not running:
        return f"{words[0]} ({', '.join(dict.fromkeys(job.reason for job in jobs))})"
    words += [f"{running[0].time_left} left"] if running[0].time_left not in ("UNLIMITED", "INVALID") else []
    logs = _logs(root, name, number)
    starts = len(logs)
    words += [f"start {starts}"] if starts > 1 and len(jobs) == 1 else []
    step = progress_of(stage.output, tail_of(logs[-1]) if logs else "")
    return ", ".join([*words, *([step] if step else [])])


def _why(root: Path, name: str, number: str) -> str:
    """The first line of the error that the job's last start ended with, and where the rest is."""
    logs = _logs(root, name, number)
    if not logs:
        return ""
    message = error_message(tail_of(logs[-1]).splitlines())
    return (f": {'; '.join(line.strip() for line in message.splitlines()[:3])}" if message else "") + (
        f" (log in {logs[-1]})"
    )


def _logs(root: Path, name: str, number: str) -> list[Path]:
    """The logs of a job's starts, in their order; of an array, those of all its jobs."""
    found = [*(root / "logs" / "slurm").glob(f"{name}-{number}-*.log")]
    found += (root / "logs" / "slurm").glob(f"{name}-{number}_*-*.log")
    return sorted(found, key=lambda path: path.stat().st_mtime)
