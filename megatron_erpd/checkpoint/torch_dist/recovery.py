"""Which of a training's checkpoints an interrupted run can resume from."""

from __future__ import annotations

from pathlib import Path

from megatron_erpd.checkpoint.torch_dist.iterations import TRACKER, iteration_folder, saved_iterations
from megatron_erpd.checkpoint.torch_dist.reader import METADATA, read_metadata
from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import write_text

INTEGRITY = "integrity.json"
"""SHA-256 of an iteration's files, which Megatron writes under `--verify-integrity`."""


def recover(checkpoint: Path, aside: Path, checksums: bool = False) -> str | None:
    """Has the tracker name an iteration that can be loaded: the one that it names, or else the latest whole one.

    A kill in the wrong moment leaves the tracker empty (Megatron doesn't write it at once), a full disk a shard that is
    too short; Megatron would begin from nothing in the one case and fail in the other. What can't be loaded is moved to
    `aside`. One process calls this, before any loads.

    Args:
        checkpoint: Megatron's folder of iterations; may not be there yet.
        aside: folder for damaged iterations.
        checksums: also read every file and compare with the sums that Megatron recorded (`--verify-integrity`).

    Returns:
        What was found and done, None where all was well.

    Raises:
        CheckpointError: there are iterations and none of them is whole; says what is wrong with each.
    """
    saved = saved_iterations(checkpoint)
    tracked = _tracked(checkpoint)
    if not saved and not (checkpoint / TRACKER).exists():
        return None
    candidates = [i for i in saved if i == tracked] + [i for i in reversed(saved) if i != tracked]
    problems: dict[int, str] = {}
    for iteration in candidates:
        problem = damage(iteration_folder(checkpoint, iteration), checksums)
        if problem is None:
            return _resume_from(checkpoint, iteration, tracked, problems, aside)
        problems[iteration] = problem
    if not (checkpoint / TRACKER).exists():
        return None  # the very first save was cut off: the run begins anew
    found = "".join(f"\n  step {iteration}: {problem}" for iteration, problem in problems.items())
    raise CheckpointError(
        f"{checkpoint}: holds no checkpoint that can be loaded, so the run can't resume; delete the stage's folder to "
        f"start it anew{found or f': {TRACKER} is there, and no iteration'}"
    )


def damage(folder: Path, checksums: bool = False) -> str | None:
    """What keeps an `iter_...` folder from being loaded, None where nothing does.

    Looks at sizes, not at content, unless `checksums` are asked for and there are some.
    """
    if not (folder / "metadata.json").is_file():
        return "its save was not finished"
    try:
        metadata = read_metadata(folder / METADATA)
    except CheckpointError as error:
        return str(error)
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} is cut off: {path.stat().st_size} of {size} bytes"
    return _differing(folder) if checksums and (folder / INTEGRITY).is_file() else None


def _differing(folder: Path) -> str | None:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    try:
        verify_integrity_manifest(str(folder))
    except CheckpointingException as error:
        return str(error)
    return None


def _tracked(checkpoint: Path) -> int | None:
    try:
        text = (checkpoint / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def _resume_from(
    checkpoint: Path, iteration: int, tracked: int | None, problems: dict[int, str], aside: Path
) -> str | None:
    if iteration == tracked:
        return None
    for damaged in problems:
        aside.mkdir(parents=True, exist_ok=True)
        iteration_folder(checkpoint, damaged).rename(_free(aside / iteration_folder(checkpoint, damaged).name))
    write_text(checkpoint / TRACKER, str(iteration))
    lines = [
        f"the checkpoint of step {i} is damaged ({problem}); it is kept in {aside}" for i, problem in problems.items()
    ]
    if tracked not in problems:
        lines.insert(0, f"{checkpoint / TRACKER} named no checkpoint that is there")
    return "; ".join([*lines, f"resuming from step {iteration}"])


def _free(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('.')[0]}.{number}")
    return path
