"""The part files of sampled rollouts: which prompts are in which, and how independent jobs share them.

OUTPUT/.slice-0003-of-0016/rollouts-00007-of-00040.parquet     a job's, under the name that it has in the whole
OUTPUT/rollouts-00007-of-00040.parquet                         a hard link to it, when all slices are there
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.files import link_or_copy
from megatron_erpd.manifest import MANIFEST, Manifest, begin_artifact, differences, read_manifest, verify_manifest
from megatron_erpd.slices import Slice, begin_whole, end_whole, finished_slices, refuse_other_counts, slice_folders

PROMPTS_PER_PART = 128
"""Prompts in one part file: what an interruption loses at most, and what is decoded before the next file begins."""


def num_parts(num_prompts: int) -> int:
    """Part files of so many prompts."""
    return math.ceil(num_prompts / PROMPTS_PER_PART)


def prompts_of(part: int, num_prompts: int) -> range:
    """The prompts of a part file, by their places."""
    return range(part * PROMPTS_PER_PART, min((part + 1) * PROMPTS_PER_PART, num_prompts))


def part_name(part: int, num_prompts: int) -> str:
    """Name of a part file."""
    return f"rollouts-{part:05d}-of-{num_parts(num_prompts):05d}.parquet"


def refuse_empty_slices(where: str, count: int, num_prompts: int) -> None:
    """Raises `RecipeError` where some of `count` slices would have no part file. `where` asks for them."""
    parts = num_parts(num_prompts)
    if count > parts:
        raise RecipeError(
            f"{where}: {num_prompts} prompts make {parts} part file{'s'[: parts != 1]} of {PROMPTS_PER_PART} prompts "
            f"each, and a slice has one at least; take at most {parts} slice{'s'[: parts != 1]}"
        )


def begin_slice(output: Path, own: Slice, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Path:
    """Takes the folder of a slice for it, in the folder of the whole.

    Args:
        settings, inputs: those of the whole, as in `begin_artifact`.
    """
    begin_whole(output, "sample", settings, inputs)
    refuse_other_counts(output, own)
    folder = output / own.hidden_folder
    begin_artifact(folder, "sample", {**settings, "slice": str(own)}, inputs)
    return folder


def begin_merge(
    output: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], num_prompts: int
) -> list[Manifest]:
    """Takes the folder for the whole, after a look at the slices; returns their manifests.

    Raises:
        StageError: a slice is missing, unfinished, damaged or made from something else, or they lack a part file.
    """
    begin_whole(output, "sample", settings, inputs)
    folders = finished_slices(output)
    manifests = [verify_manifest(folder) for folder in folders]
    for number, (folder, manifest) in enumerate(zip(folders, manifests, strict=True), start=1):
        wanted = {**settings, "slice": str(Slice(number, len(folders)))}
        if lines := differences(manifest, "sample", wanted, dict(inputs)):
            raise StageError(f"{folder}: was made from something else; run its job again:\n  " + "\n  ".join(lines))
    names = {name for manifest in manifests for name in manifest.files}
    missing = [name for part in range(num_parts(num_prompts)) if (name := part_name(part, num_prompts)) not in names]
    if missing:
        raise StageError(f"{output}: no slice has {missing[0]}; they were sampled from other prompts, delete them")
    return manifests


def is_merged(output: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether the whole is finished and a kill kept its slices from being removed."""
    if not (output / MANIFEST).is_file() or not slice_folders(output):
        return False
    return not differences(read_manifest(output), "sample", settings, inputs)


def take_parts(names: Sequence[str], folders: Sequence[Path], into: Path) -> None:
    """Takes part files that lie in other folders: hard links, copies where links can't be made."""
    for name in names:
        target = into / name
        source = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if source is None or target.exists():
            continue
        link_or_copy(source, target)


def remove_slices(output: Path) -> None:
    """Removes the folders of the slices, whose parts the whole has."""
    for folder in slice_folders(output):
        shutil.rmtree(folder)
    end_whole(output)
