"""The iterations in a Megatron checkpoint folder: which is the latest, which are kept, taking one of them out."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from megatron_erpd.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


def latest_iteration(checkpoint: Path) -> int:
    """The iteration that a Megatron checkpoint folder's tracker names.

    Raises:
        CheckpointError: there is no tracker, or it holds no iteration whose folder exists.
    """
    tracker = checkpoint / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{checkpoint}: no {TRACKER} in it, so it is no Megatron checkpoint; check the path")
    text = tracker.read_text().strip()
    if not text.isdigit() or not iteration_folder(checkpoint, int(text)).is_dir():
        raise CheckpointError(
            f"{tracker}: holds {text!r}, which names no folder beside it; write the number of an iter_ folder into it"
        )
    return int(text)


def iteration_folder(checkpoint: Path, iteration: int) -> Path:
    """Where Megatron keeps an iteration."""
    return checkpoint / f"iter_{iteration:07d}"


def saved_iterations(checkpoint: Path) -> list[int]:
    """All iterations kept in a checkpoint folder, in order."""
    return sorted(int(p.name[5:]) for p in checkpoint.glob("iter_*") if p.name[5:].isdigit())


class SaveIntervals(NamedTuple):
    """Every how many steps a checkpoint is saved, and every how many one is kept for good (a multiple of it)."""

    save: int
    retain: int


def save_intervals(num_iterations: int, checkpoints: int, save_interval: int | None) -> SaveIntervals:
    """At most `checkpoints` kept ones at equal distances, the last step's among them, and between two of them as many
    saves as it takes that no more than `save_interval` steps can be lost.

    Megatron wants the distance of the kept ones to be a multiple of that of the saves, so it may grow by a few steps.
    """
    distance = max(1, math.ceil(num_iterations / checkpoints))
    saves = math.ceil(distance / save_interval) if save_interval else 1
    save = math.ceil(distance / saves)
    return SaveIntervals(save, save * saves)


def prune(checkpoint: Path, retain: int) -> None:
    """Removes what is neither a multiple of `retain` nor the latest iteration.

    Megatron does so at every save, but for what a kill left: the beginning of a checkpoint, or one whose successor was
    just saved. It does so in a thread, which may be at work on the same folder.

    Raises:
        CheckpointError: a folder can't be removed.
    """
    latest = latest_iteration(checkpoint)
    for iteration in saved_iterations(checkpoint):
        folder = iteration_folder(checkpoint, iteration)
        if iteration == latest or (iteration < latest and iteration % retain == 0):
            continue
        for _ in range(3):
            shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise CheckpointError(f"{folder}: is no checkpoint to keep and can't be removed; delete it")


def take_iteration(source: Path, iteration: int, destination: Path) -> None:
    """Makes a checkpoint folder that holds one iteration of another: hard links, copies where links can't be made.

    Called again after an interruption, it ends with the same.

    Raises:
        CheckpointError: the source lacks the iteration.
    """
    folder = iteration_folder(source, iteration)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such iteration; {source} holds {saved_iterations(source)}")
    target = iteration_folder(destination, iteration)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(path, copy)
    (destination / TRACKER).write_text(str(iteration))
