"""Whether a training can save in the time that a job leaves it before its time limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.checkpoint.torch_dist.iterations import iteration_folder, latest_iteration
from megatron_erpd.errors import CheckpointError, ErpdError
from megatron_erpd.plan.disk import checkpoint_bytes
from megatron_erpd.progress import read_json_lines
from megatron_erpd.recipe.requests import Import, TrainingRequest
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings import SlurmSettings
from megatron_erpd.settings.slurm import slurm_patience
from megatron_erpd.training.metrics import SAVE_TIME
from megatron_erpd.units import duration, size

_ANY_DISK = 0.1
"""GB per second that every disk writes: of a save that needs no more, nothing is said."""


@dataclass(frozen=True)
class SaveTime:
    """A training's save at the end of its job's time.

    Attributes:
        bytes: of a checkpoint, the optimizer's state included.
        signal_seconds: as the stage's job has them.
        gb_per_second: that the processes of a training write together; None where that isn't known.
        source: where that is from, in words; where it isn't known, how it becomes known.
    """

    stage: str
    bytes: int
    signal_seconds: int
    gb_per_second: float | None
    source: str

    @property
    def allowed(self) -> float:
        """Seconds that the job leaves for it, of which the step that is under way takes some."""
        return slurm_patience(self.signal_seconds)

    @property
    def seconds(self) -> float | None:
        return None if self.gb_per_second is None else self.bytes / 1e9 / self.gb_per_second

    @property
    def needed(self) -> float:
        """GB per second at which it takes all of that time."""
        return self.bytes / 1e9 / self.allowed

    @property
    def warning(self) -> str | None:
        """Why it may not be complete in time, and what to change; None where it is."""
        what = f"{self.stage}: a save is {size(self.bytes)}, and slurm.signal_seconds {self.signal_seconds} leaves it "
        what += duration(self.allowed)
        if self.seconds is None:
            if self.needed <= _ANY_DISK:
                return None
            return f"{what}: the disk must take {self.needed:.3g} GB/s; {self.source}"
        if self.seconds <= self.allowed:
            return None
        enough = math.ceil(max(self.seconds + 5, self.seconds / 0.9))
        return (
            f"{what}, but at {self.gb_per_second:.3g} GB/s ({self.source}) it takes {duration(self.seconds)}: what was "
            f"trained since the last checkpoint would be lost at the time limit; set slurm.signal_seconds to {enough} "
            "and as much more as a step takes"
        )


def save_times(stages: Sequence[Stage], shape: ModelShape) -> list[SaveTime]:
    """Of the trainings whose jobs have something to go by: a `slurm` section."""
    found, measured = [], _measured(stages)
    for stage in stages:
        if not isinstance(stage.request, TrainingRequest) or stage.slurm == SlurmSettings():
            continue
        given = stage.slurm.write_gb_per_second
        speed, source = (given, "given") if given else measured
        if speed is None:
            source = "give what it takes as slurm.write_gb_per_second"
            if not stage.request.layout.async_save:  # nobody waits for one beside the training
                source += ", or save once, and it is measured"
        found.append(
            SaveTime(stage.name, checkpoint_bytes(stage.request, shape), stage.slurm.signal_seconds, speed, source)
        )
    return found


def save_warnings(stages: Sequence[Stage]) -> list[str]:
    """What there is to say of the saves of a run, as far as its model is there."""
    folder = next(Path(stage.request.hf) for stage in stages if isinstance(stage.request, Import))
    try:
        shape = read_model_shape(folder)
    except ErpdError:
        return []  # prepared later, or told of the model
    return warnings_of(save_times(stages, shape))


def warnings_of(saves: Sequence[SaveTime]) -> list[str]:
    """One for trainings that differ by their name alone."""
    names: dict[str, list[str]] = {}
    for save in saves:
        if save.warning:
            names.setdefault(save.warning.removeprefix(save.stage), []).append(save.stage)
    return [", ".join(stages) + warning for warning, stages in names.items()]


def _measured(stages: Sequence[Stage]) -> tuple[float | None, str]:
    """GB per second of the last save of a training of the run that was timed, and which that was."""
    for stage in reversed(stages):
        checkpoint, metrics = stage.output / "megatron", stage.output / "metrics.jsonl"
        if not isinstance(stage.request, TrainingRequest) or not metrics.is_file():
            continue
        taken = [row[SAVE_TIME] for row in read_json_lines(metrics) if row.get(SAVE_TIME)]
        try:
            latest = iteration_folder(checkpoint, latest_iteration(checkpoint))  # whole, as others may not be
            written = sum(path.stat().st_size for path in latest.iterdir())
        except (CheckpointError, FileNotFoundError):  # none yet; or one that another replaces at this moment
            continue
        if taken:
            return written / 1e9 / taken[-1], f"measured by {stage.name}"
    return None, ""
