"""The iterations in a Megatron checkpoint folder: which is the latest, which are kept, taking one of them out."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import link_or_copy, write_text

TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE_TRACKER = "latest_train_state.pt"
"""What Megatron-Bridge writes beside the tracker; some of its checkpoints have it alone."""

_FORMAT = "torch_dist"


def latest_iteration(checkpoint: Path) -> int:
    """The iteration that a Megatron checkpoint folder's tracker names.

    Raises:
        CheckpointError: there is no tracker, or it holds no iteration whose folder exists.
    """
    tracker = checkpoint / TRACKER
    if tracker.is_file():
        text = tracker.read_text().strip()
    elif (checkpoint / BRIDGE_TRACKER).is_file():
        tracker = checkpoint / BRIDGE_TRACKER
        text = _bridge_step(tracker)
    else:
        raise CheckpointError(f"{checkpoint}: no {TRACKER} in it, so it is no Megatron checkpoint; check the path")
    if not text.isdigit() or not iteration_folder(checkpoint, int(text)).is_dir():
        raise CheckpointError(
            f"{tracker}: holds {text!r}, which names no folder beside it; write the number of an iter_ folder into "
            f"{TRACKER}"
        )
    return int(text)


def find_iteration(path: Path) -> tuple[Path, int]:
    """The checkpoint folder and the iteration that a user means, of Megatron-LM or of Megatron-Bridge.

    Args:
        path: a checkpoint folder, of which the latest iteration is meant, or the folder of an iteration.

    Raises:
        CheckpointError: it is neither, or holds no tensors in the format torch_dist, which any layout can read.
    """
    name = re.fullmatch(r"iter_(\d{7,})", path.name)
    root, iteration = (path.parent, int(name[1])) if name else (path, latest_iteration(path))
    _check_format(iteration_folder(root, iteration))
    return root, iteration


def _check_format(folder: Path) -> None:
    """Raises `CheckpointError` for an iteration that is saved in another format than torch_dist."""
    path = folder / "metadata.json"
    if not path.is_file():
        legacy = any(folder.glob("mp_rank_*"))
        other = (
            "Megatron's old format, torch" if legacy else "fsdp_dtensor" if (folder / ".metadata").is_file() else None
        )
        what = f"is saved in {other}" if other else "holds no metadata.json, so it is no whole checkpoint"
        raise CheckpointError(f"{folder}: {what}; save it with --ckpt-format {_FORMAT}")
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: can't be read ({error!r}); copy the checkpoint again") from None
    if backend != _FORMAT:
        raise CheckpointError(f"{folder}: is saved in {backend}; save it with --ckpt-format {_FORMAT}")


def _bridge_step(path: Path) -> str:
    """The step in a file of Megatron-Bridge's; nothing in it is executed."""
    import torch

    try:
        return str(int(torch.load(path, map_location="cpu", weights_only=True)["step"]))
    except Exception as error:  # unpickling has many kinds, and texts that advise to execute what is in the file
        raise CheckpointError(
            f"{path}: can't be read ({type(error).__name__}); write an iteration's number into {TRACKER} beside it"
        ) from None


def iteration_folder(checkpoint: Path, iteration: int) -> Path:
    """Where Megatron keeps an iteration."""
    return checkpoint / f"iter_{iteration:07d}"


def saved_iterations(checkpoint: Path) -> list[int]:
    """All iterations kept in a checkpoint folder, in order."""
    return sorted(int(p.name[5:]) for p in checkpoint.glob("iter_*") if p.name[5:].isdigit())


def read_of_latest(artifact: Path, files: list[str]) -> list[str]:
    """Of an artifact's files, those that are read with its latest checkpoint: all but the other iterations."""
    try:
        latest = iteration_folder(Path("megatron"), latest_iteration(artifact / "megatron"))
    except CheckpointError:  # no checkpoint, or one whose tracker is damaged
        return files
    return [name for name in files if not name.startswith("megatron/iter_") or Path(name).is_relative_to(latest)]


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
        link_or_copy(path, copy)
    write_text(destination / TRACKER, str(iteration))
