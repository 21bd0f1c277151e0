"""Artifacts that others have replaced: `RUN/replaced/STAGE/0001` and so on.

What was sampled or trained stays there until a person asks for its removal, and comes back when its settings and inputs
are asked for again. What can be made again from other artifacts is removed when the new one is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.manifest import MANIFEST, REQUEST
from megatron_erpd.recipe.stages import TRAINS, Stage

KEPT = ("prepare", "sample", "score", *TRAINS)
"""Commands whose artifacts stay when others replace them: all that was sampled, scored or trained, or made by a command
of the user's."""


@dataclass(frozen=True)
class Replaced:
    """One of them, and the bytes of its files."""

    folder: Path
    bytes: int

    def describe(self) -> str:
        return f"{self.folder}, {_shown(self.bytes)}"


def replaced_folder(root: Path) -> Path:
    """Where a run keeps them."""
    return root / "replaced"


def kept(place: Path) -> list[Path]:
    """The artifacts, or beginnings of some, that are kept for a stage, the oldest first."""
    if is_artifact(place):  # as the version before kept it: one, without a number
        return [place]
    return sorted(folder for folder in place.glob("*") if folder.name.isdecimal() and folder.is_dir())


def is_artifact(folder: Path) -> bool:
    """Whether a stage has begun or ended here."""
    return (folder / MANIFEST).is_file() or (folder / REQUEST).is_file()


def list_replaced(root: Path, stages: Sequence[Stage] | None = None) -> list[Replaced]:
    """All that a run keeps, or what it keeps of these stages."""
    places = sorted(path for path in replaced_folder(root).glob("*") if path.is_dir())
    if stages is not None:
        names = {stage.name.replace("/", "-") for stage in stages}
        places = [place for place in places if place.name.partition(" ")[0] in names]  # `rollouts 1-4`: of a slice
    return [Replaced(folder, _size(folder)) for place in places for folder in kept(place)]


def describe(found: Iterable[Replaced]) -> str:
    """`3 artifacts, 1.20 GiB`."""
    found = list(found)
    return f"{len(found)} artifact{'s'[: len(found) != 1]}, {_shown(sum(one.bytes for one in found))}"


def note(root: Path) -> str | None:
    """A line on what the run keeps; None where it keeps nothing."""
    found = list_replaced(root)
    if not found:
        return None
    return (
        f"{replaced_folder(root)} keeps what others have replaced: {describe(found)}; `megatron-erpd run {root} "
        "--discard` removes it"
    )


def discard(root: Path, stages: Sequence[Stage]) -> list[Replaced]:
    """Removes what these stages, whose artifacts are complete, have replaced; returns it."""
    found = list_replaced(root, stages)
    for one in found:
        shutil.rmtree(one.folder)
        if one.folder.parent != replaced_folder(root) and not any(one.folder.parent.iterdir()):
            one.folder.parent.rmdir()
    if replaced_folder(root).is_dir() and not any(replaced_folder(root).iterdir()):
        replaced_folder(root).rmdir()
    return found


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; of a file with several names once."""
    sizes: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(os.path.join(place, name))
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
