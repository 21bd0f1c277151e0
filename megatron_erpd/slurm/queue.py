"""Queries to SLURM through its command-line programs."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_erpd.errors import StageError

_SECONDS = 60
"""A controller that does not answer is an error, not a wait without end."""


@dataclass(frozen=True)
class Queued:
    """A job that has not ended."""

    state: str
    reason: str
    time_left: str


def queued(user: str | None = None) -> dict[str, list[Queued]]:
    """The user's jobs that have not ended, by the number that sbatch printed; an array has one for each of its jobs."""
    listed = slurm("squeue", "--noheader", "--array", f"--user={user or getpass.getuser()}", "--format=%F|%T|%r|%L")
    jobs: dict[str, list[Queued]] = {}
    for line in listed.splitlines():
        number, state, reason, left = line.split("|", 3)
        jobs.setdefault(number.strip(), []).append(Queued(state, reason, left))
    return jobs


def state_of(job_id: str) -> str:
    """The state of one job (`RUNNING`), empty when the queue has forgotten it."""
    try:
        listed = slurm("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%A|%T")
    except StageError as error:
        if "Invalid job id" in str(error):
            return ""
        raise
    # The number of an array names all of its jobs: the one asked for has it as its own.
    states = dict(line.split("|", 1) for line in listed.splitlines() if line)
    return states.get(job_id, "")


def steps_of(job_id: str) -> list[str]:
    """The running steps of a job that srun started, as scancel names them."""
    listed = slurm("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i").split()
    return [step for step in listed if step.rpartition(".")[2].isdigit()]


def how_ended(job_id: str) -> str:
    """How a job that the queue does not list any more ended, as far as anybody knows."""
    if shutil.which("sacct"):
        try:
            listed = slurm("sacct", "-X", "-n", "-P", f"--jobs={job_id}", "--format=State,ExitCode")
        except StageError:  # no accounting here
            listed = ""
        states = dict.fromkeys(line.replace("|", ", exit code ") for line in listed.splitlines() if line)
        if states:
            return "; ".join(states)
    try:
        shown = slurm("squeue", "--noheader", "--states=all", "--array", f"--jobs={job_id}", "--format=%T")
    except StageError:
        shown = ""
    return "; ".join(dict.fromkeys(shown.split())) or "ended, and SLURM has forgotten how"


def slurm(*command: str) -> str:
    """Runs a program of SLURM and returns what it printed.

    Raises:
        StageError: it isn't there, doesn't answer, or fails; with what it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise StageError(
            f"{command[0]}: not found; run this where SLURM's programs are (a login node), or add them to PATH"
        ) from None
    except subprocess.TimeoutExpired:
        raise StageError(f"{command[0]}: no answer in {_SECONDS} s; is the SLURM controller up?") from None
    if done.returncode != 0:
        raise StageError(f"{_shown(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _shown(command: Sequence[str]) -> str:
    text = " ".join(command)
    return text if len(text) < 200 else text[:200] + " ..."
