"""The export stage: Megatron checkpoints as Hugging Face folders. No model is built."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_erpd.checkpoint.bridge import export_with_bridge
from megatron_erpd.checkpoint.stream_export import ExportResult, export_checkpoint
from megatron_erpd.checkpoint.torch_dist.iterations import (
    iteration_folder,
    latest_iteration,
    read_of_latest,
    saved_iterations,
)
from megatron_erpd.errors import CheckpointError, RecipeError
from megatron_erpd.files import check_output
from megatron_erpd.manifest import read_manifest
from megatron_erpd.meeting import conversion_processes, finish_together, num_processes, peak_memory, rank
from megatron_erpd.model.runtime import prepare_output
from megatron_erpd.settings.arguments import add_processes_argument, add_verify_inputs


def export_checkpoints(argv: list[str]) -> None:
    """Writes Hugging Face folders from Megatron checkpoints, one after another, and compares each with its checkpoint.

    A folder appears when every tensor is in it and was found equal, bit for bit. Under torchrun the processes share the
    work, however many there are.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-erpd export",
        description=export_checkpoints.__doc__,
        epilog="example: megatron-erpd export --checkpoint student=runs/mine/round-01/student --output exported",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="NAME=DIR[@ITERATION]",
        help="artifact to export and the name of its folder; repeatable. @all: every iteration kept, as NAME@ITERATION",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one Hugging Face folder per name")
    parser.add_argument(
        "--via",
        choices=["megatron-bridge"],
        help="convert with Megatron-Bridge, as the checkpoints were imported; needs --hf",
    )
    parser.add_argument(
        "--hf", type=Path, help="with --via: the Hugging Face folder that was imported, weights included"
    )
    add_processes_argument(parser)
    add_verify_inputs(parser)
    given = parser.parse_args(argv)
    if (given.via is None) != (given.hf is None):
        raise RecipeError("--via megatron-bridge and --hf: belong together; give both or neither")
    output: Path = given.output
    check_output(output)
    named = [_parse_checkpoint(text) for text in given.checkpoint]
    inputs, iterations = _identity(named)
    for folder in inputs.values():
        read_manifest(folder)
    settings = {"iterations": iterations, **({"via": given.via} if given.via else {})}

    with conversion_processes():
        if given.via and num_processes() > 1:
            raise RecipeError("--via megatron-bridge: runs in one process; start it without --processes or torchrun")
        # A numbered iteration may be any of the kept ones.
        reads = None if any(iterations.values()) else read_of_latest
        prepare_output(output, "export", settings, inputs, given.verify_inputs, reads)
        exported: list[ExportResult] = []
        checksums: dict[str, str] = {}
        for name, folder, iteration in _expand(named):
            target = output / name
            if target.exists():  # left by an interrupted run; a folder appears only when it is whole
                continue
            source = _iteration(folder / "megatron", iteration)
            if given.via:
                export_with_bridge(given.hf, source, target)
                continue
            exported.append(_export(source, folder / "hf", target))
            checksums |= {f"{name}/{file}": sha for file, sha in exported[-1].checksums.items()}
        figures = {
            "tensors": sum(e.compared.num_tensors for e in exported),
            "bytes": sum(e.compared.num_bytes for e in exported),
            "write_seconds": sum(e.seconds for e in exported),
            "compare_seconds": sum(e.compare_seconds for e in exported),
            "peak_memory_bytes": peak_memory(),
        }

        finish_together(output, figures, checksums)


def _iteration(checkpoint: Path, iteration: int | None) -> Path:
    folder = iteration_folder(checkpoint, latest_iteration(checkpoint) if iteration is None else iteration)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such iteration; {checkpoint} holds {saved_iterations(checkpoint)}")
    return folder


def _export(source: Path, hf_folder: Path, target: Path) -> ExportResult:
    exported = export_checkpoint(source, hf_folder, target)
    if rank() == 0:
        found = exported.compared
        size = f"{found.num_tensors} tensors, {found.num_bytes / 1e9:.2f} GB"
        print(f"{target}: {size}, each compared with {source}: equal", flush=True)
    return exported


def _parse_checkpoint(text: str) -> tuple[str, Path, str | None]:
    match = re.fullmatch(r"([\w.@-]+)=(.+?)(?:@(\d+|all))?", text)
    if not match:
        raise RecipeError(f"--checkpoint {text}: write NAME=DIR, NAME=DIR@ITERATION or NAME=DIR@all")
    return match[1], Path(match[2]), match[3]


def _identity(named: list[tuple[str, Path, str | None]]) -> tuple[dict[str, Path], dict[str, str | None]]:
    """Inputs and iterations by name. A name that comes alone and with @all asks for all; where the two are of different
    artifacts, the second is called NAME@all."""
    inputs: dict[str, Path] = {}
    iterations: dict[str, str | None] = {}
    for name, folder, iteration in sorted(named, key=lambda n: n[2] or ""):
        key = name if inputs.get(name, folder) == folder else f"{name}@{iteration}"
        inputs[key], iterations[key] = folder, iteration
    return inputs, iterations


def _expand(named: list[tuple[str, Path, str | None]]) -> list[tuple[str, Path, int | None]]:
    """`@all` as one export per kept iteration; the last one is left out where the name is exported without a number."""
    plain = {(name, folder) for name, folder, iteration in named if iteration is None}
    expanded: list[tuple[str, Path, int | None]] = []
    for name, folder, iteration in named:
        if iteration != "all":
            expanded.append((name, folder, None if iteration is None else int(iteration)))
            continue
        kept = saved_iterations(folder / "megatron")
        if not kept:
            raise CheckpointError(f"{folder}/megatron: holds no iteration to export; check the path")
        kept = kept[:-1] if (name, folder) in plain else kept
        expanded += [(f"{name}@{i}", folder, i) for i in kept]
    return expanded
