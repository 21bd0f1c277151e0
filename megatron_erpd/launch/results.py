"""The last line of a command: the artifact that it wrote, and its main figures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError
from megatron_erpd.launch.processes import last_step
from megatron_erpd.manifest import MANIFEST, METRICS, WARNINGS, Manifest, read_manifest
from megatron_erpd.slices import Slice
from megatron_erpd.units import counted, duration, size

_NOT_SAID = ("seconds", "starts", "bytes", "peak_memory_bytes", "policy_fingerprint", WARNINGS)
"""Figures of a summary that are told otherwise, or are of no use at the end; those in seconds aren't told either."""

Stamp = tuple[int, int]
"""When a manifest was written, and which file it is."""


def output_folders(argv: Sequence[str]) -> list[Path]:
    """Where a command with these arguments may leave its artifact: `--output`, or the folder of its slice there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--slice")
    try:
        given = parser.parse_known_args(argv)[0]
        own = Slice.parse(given.slice) if given.slice else None
    except (argparse.ArgumentError, argparse.ArgumentTypeError):  # the command itself says what is wrong
        return []
    if given.output is None:
        return []
    return [given.output / own.folder, given.output / own.hidden_folder] if own else [given.output]


def stamps(folders: Sequence[Path]) -> dict[Path, Stamp]:
    """The manifests that are in these folders."""
    found = {}
    for folder in folders:
        if (folder / MANIFEST).is_file():
            status = (folder / MANIFEST).stat()
            found[folder] = (status.st_mtime_ns, status.st_ino)
    return found


def describe_artifact(folder: Path) -> str:
    """`wrote runs/mine/round-01/teacher: iterations 64, last iteration 64, loss 0.31; 12 files, 3.4 MB, in 45 s`.

    Raises:
        StageError: there is no artifact.
    """
    manifest = read_manifest(folder)
    figures = [*_figures(manifest.summary)]
    if step := last_step(folder / METRICS):
        figures.append(f"last {step}")
    told = [", ".join(figures), _size_and_time(manifest)]
    return f"wrote {folder}: {'; '.join(filter(None, told))}"


def say_written(before: Mapping[Path, Stamp], folders: Sequence[Path]) -> None:
    """Prints what was written to the folders since `before`, `stamps` of then."""
    for folder, stamp in stamps(folders).items():
        if before.get(folder) != stamp:
            try:
                print(describe_artifact(folder), flush=True)
            except StageError as error:  # somebody else's, who writes there at the same time
                print(f"{folder}: {error}", flush=True)


def _size_and_time(manifest: Manifest) -> str:
    whole = f"{counted(len(manifest.files), 'file')}, {size(sum(file['size'] for file in manifest.files.values()))}"
    seconds, starts = manifest.summary.get("seconds"), manifest.summary.get("starts")
    took = f", in {duration(seconds)}" if seconds is not None else ""
    return whole + took + (f" of {starts} starts" if starts else "")


def _figures(summary: Mapping[str, Any]) -> Iterator[str]:
    for key, value in summary.items():
        name = key.replace("_", " ")
        if value is None or key in _NOT_SAID or key.endswith("_seconds"):
            continue
        if isinstance(value, Mapping):
            inner = value.get("mean", value)
            yield f"{name}: {', '.join(_figures(inner))}" if isinstance(inner, Mapping) else f"{name} {_shown(inner)}"
        else:
            yield f"{name} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
