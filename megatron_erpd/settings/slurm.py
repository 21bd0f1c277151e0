"""How the jobs of a run are submitted to SLURM. Nothing here changes a result."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from megatron_erpd.settings.base import Settings

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_DIRECTIVES = ("job-name", "output", "open-mode", "chdir", "signal", "requeue", "dependency", "array", "ntasks")


class SlurmSettings(Settings):
    """What a job asks for, what it runs in, and when it is given up."""

    account: str | None = Field(default=None, description="account to charge")
    partition: str | None = Field(default=None, description="partition, or several with commas")
    qos: str | None = Field(default=None, description="quality of service")
    reservation: str | None = Field(default=None, description="reservation")
    constraint: str | None = Field(default=None, description="features that the nodes must have")
    nodes: int | None = Field(
        default=None, ge=1, description="nodes; default: the layout's processes / gpus_per_node, 1 without GPUs"
    )
    gpus_per_node: int | None = Field(
        default=None,
        ge=1,
        description="GPUs of a node, a process for each (of vLLM one for all); default: none are asked for",
    )
    cpus_per_task: int | None = Field(default=None, ge=1, description="cores of a node; default: the cluster's")
    memory: str | None = Field(default=None, description="memory of a node, such as 200G; 0: all of it")
    time: str | None = Field(
        default=None, description="time limit of a job, such as 04:00:00; a stage may take several such jobs"
    )
    sbatch: list[str] = Field(default=[], description="more #SBATCH lines, such as --exclusive")
    environment: dict[str, str] = Field(default={}, description="environment variables")
    setup: list[str] = Field(default=[], description="shell lines before the stage, such as module load cuda")
    container_image: str | None = Field(default=None, description="image in which the stage runs, by pyxis and enroot")
    container_mounts: list[str] = Field(
        default=[], description="FROM:TO each, besides the run's folder, the current one and the checkout"
    )
    python: str | None = Field(
        default=None, description="interpreter of the stage; default: this one, in a container python3"
    )
    signal_seconds: int = Field(
        default=300, ge=10, le=65535, description="before the time limit, a stage saves and its job is queued again"
    )
    write_gb_per_second: float | None = Field(
        default=None,
        gt=0,
        description="GB that all processes of a training write to the run's disk in a second, for a plan of its saves; "
        "default: what trainings of the run have measured",
    )
    requeues: int = Field(default=10, ge=0, description="times that a job is queued again before it fails")
    hang_minutes: float = Field(
        default=60, gt=0, description="a stage whose log and files stand still for so long is ended"
    )
    slices: int = Field(
        default=1, ge=1, le=9999, description="jobs of an array that share a precompute stage or the sampling"
    )

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        if self.time is not None and _seconds(self.time) <= self.signal_seconds:
            raise ValueError(
                f"signal_seconds {self.signal_seconds}: the time limit {self.time} is not longer than that, and the "
                "stage would be told to end as soon as it starts; change one of them"
            )
        for name in self.environment:
            if not _ENVIRONMENT_NAME.fullmatch(name):
                raise ValueError(f"environment: {name!r} is no name of an environment variable")
        for line in self.sbatch:
            option = line.removeprefix("#SBATCH").strip().lstrip("-").partition("=")[0].partition(" ")[0]
            if option in _OWN_DIRECTIVES:
                raise ValueError(f"sbatch: {line!r}: --{option} is written by submit; remove the line")
        if self.container_mounts and self.container_image is None:
            raise ValueError("container_mounts: has no effect without container_image; give an image")
        return self


def slurm_patience(signal_seconds: float) -> float:
    """Seconds that a stage has for saving, of those between the signal and the time limit."""
    return signal_seconds - max(5.0, 0.1 * signal_seconds)


def _seconds(time: str) -> int:
    """What SLURM takes for a time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"time {time!r}: write MINUTES, HH:MM:SS or DAYS-HH:MM:SS, in quotes")
    days, numbers = match[1], [int(group) for group in match.groups()[1:] if group]
    if days is not None:
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
