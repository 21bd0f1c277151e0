"""Slices: an artifact made by independent jobs. Each makes a slice, in a folder of its own inside that of the whole, as
an artifact that its job resumes; when all are finished, one job makes the whole of them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError
from megatron_erpd.locks import file_lock
from megatron_erpd.manifest import MANIFEST, begin_artifact

_BEGIN = ".begin"
"""Locked while a job takes the folder of the whole."""
_FOLDER = re.compile(r"\.?slice-(\d{4})-of-(\d{4})")


@dataclass(frozen=True)
class Slice:
    """The `number`-th, from 1, of `count` slices."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`3/16`. Raises `argparse.ArgumentTypeError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
            raise argparse.ArgumentTypeError(f"{text!r}: write I/N with 1 <= I <= N <= 9999, such as 3/16")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder(self) -> str:
        """Its name in the folder of the whole, where the whole's content stays in the slices' folders."""
        return f"slice-{self.number:04d}-of-{self.count:04d}"

    @property
    def hidden_folder(self) -> str:
        """The same, where it moves up: a hidden name is no content of an artifact."""
        return f".{self.folder}"

    def share(self, total: int) -> range:
        """Which of `total` things are this slice's: neighbours, and as many as the others have, or one more."""
        return range(total * (self.number - 1) // self.count, total * self.number // self.count)


def add_slice_arguments(parser: argparse.ArgumentParser, does: str, things: str) -> None:
    """`--slice` and `--merge-slices` of a command that does something to things which jobs can share."""
    slices = parser.add_mutually_exclusive_group()
    slices.add_argument(
        "--slice",
        type=Slice.parse,
        metavar="I/N",
        help=f"{does} the I-th of N slices of {things}, into a folder inside of --output: N independent jobs make the "
        "whole, each resumed for itself",
    )
    slices.add_argument("--merge-slices", action="store_true", help="after all slices: make the whole of them")


def begin_whole(output: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Takes the folder for the artifact of all slices (`begin_artifact`); jobs that start at once do it one after the
    other."""
    output.mkdir(parents=True, exist_ok=True)
    with file_lock(output / _BEGIN, wait=math.inf):
        begin_artifact(output, stage, settings, inputs)


def end_whole(output: Path) -> None:
    """Removes what only `begin_whole` needed."""
    (output / _BEGIN).unlink(missing_ok=True)


def slice_folders(output: Path) -> list[Path]:
    """The folders of slices, finished or not, in their order."""
    return sorted(path for path in output.glob("*slice-*") if _FOLDER.fullmatch(path.name))


def refuse_other_counts(output: Path, own: Slice) -> None:
    """Raises `StageError` where the folder holds slices of another number than `own` is of."""
    others = {_count(path) for path in slice_folders(output)} - {own.count}
    if others:
        raise StageError(
            f"{output}: holds slices of {', '.join(map(str, sorted(others)))}, --slice {own} asks for {own.count}; "
            "delete them or go on with their number"
        )


def finished_slices(output: Path) -> list[Path]:
    """The folders of all slices of a whole, in their order.

    Raises:
        StageError: there are none, one is missing or not finished, or there are slices of several numbers.
    """
    found = slice_folders(output)
    if not found:
        raise StageError(f"{output}: holds no slices; run the jobs with --slice 1/N to N/N first")
    counts = sorted({_count(path) for path in found})
    if len(counts) > 1:
        raise StageError(f"{output}: holds slices of {' and of '.join(map(str, counts))}; delete those of one number")
    prefix = found[0].name.partition("slice-")[0]
    folders = [output / f"{prefix}{Slice(number + 1, counts[0]).folder}" for number in range(counts[0])]
    missing = [folder.name for folder in folders if not (folder / MANIFEST).is_file()]
    if missing:
        raise StageError(
            f"{output}: {len(missing)} of {counts[0]} slices aren't finished, the first is {missing[0]}; run its job "
            "again"
        )
    return folders


def _count(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[2])
