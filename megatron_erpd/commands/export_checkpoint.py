"""The export stage: Megatron checkpoints as Hugging Face folders. No model is built."""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron_erpd.recipe.command_line import request_from, request_parser
from megatron_erpd.recipe.requests import Checkpoint, Export
from megatron_erpd.settings.arguments import add_processes_argument


def export_checkpoints(argv: list[str]) -> None:
    """`megatron-erpd export`, in every process that shares the work."""
    parser = request_parser(Export)
    add_processes_argument(parser)
    request = request_from(Export, parser.parse_args(argv))
    if (request.via is None) != (request.hf is None):
        raise RecipeError("--via megatron-bridge and --hf: belong together; give both or neither")
    output, named = request.output, request.checkpoints
    check_output(output)
    for one in named:
        read_manifest(one.folder)

    with conversion_processes():
        if request.via and num_processes() > 1:
            raise RecipeError("--via megatron-bridge: runs in one process; start it without --processes or torchrun")
        # A numbered iteration may be any of the kept ones.
        reads = None if any(one.iteration for one in named) else read_of_latest
        prepare_output(output, request.command, request.identity, request.inputs, request.verify_inputs, reads)
        exported: list[ExportResult] = []
        checksums: dict[str, str] = {}
        for name, folder, iteration in _expand(named):
            target = output / name
            if target.exists():  # left by an interrupted run; a folder appears only when it is whole
                continue
            source = _iteration(folder / "megatron", iteration)
            if request.hf:
                export_with_bridge(request.hf, source, target)
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


def _expand(named: Sequence[Checkpoint]) -> list[tuple[str, Path, int | None]]:
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
