"""The import and export stages: Hugging Face folder to Megatron checkpoint and back. No model is built."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, get_args

from megatron_erpd.checkpoint.iterations import TRACKER, iteration_folder, latest_iteration, saved_iterations
from megatron_erpd.checkpoint.processes import conversion_processes, do_together, peak_memory, process_rank
from megatron_erpd.checkpoint.sidecar import copy_sidecar
from megatron_erpd.checkpoint.stream_export import export_checkpoint
from megatron_erpd.checkpoint.stream_import import write_checkpoint
from megatron_erpd.errors import CheckpointError, RecipeError
from megatron_erpd.manifest import finish_artifact, read_manifest
from megatron_erpd.settings import Layout
from megatron_erpd.settings_arguments import settings_from_namespace
from megatron_erpd.training.runtime import prepare_output

_ANY_LENGTH = 2
"""Conversion runs no tokens through the model; Megatron still wants a sequence length."""


def import_checkpoint(argv: list[str]) -> None:
    """Writes a Megatron checkpoint (torch_dist) with a Hugging Face folder's weights, bit for bit.

    The artifact holds `megatron/` (loadable under any layout and precision) and `hf/` (the configuration, tokenizer,
    chat template and all else but the weights). Under torchrun the processes share the work, however many there are.
    With --dry-run nothing is written, and config.json is enough: it shows the mapping, the shapes in every rank of a
    layout, memory and time.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-erpd import",
        description=import_checkpoint.__doc__,
        epilog="example: megatron-erpd import --hf Qwen3-4B --output runs/mine/base\n"
        "         megatron-erpd import --hf Llama-3.1-70B --dry-run --tensor-parallel 8 --pipeline-parallel 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, help="folder of the artifact; required but for a dry run")
    _add_processes(parser)
    _add_dry_run(parser)
    given = parser.parse_args(argv)
    if given.dry_run:
        _dry_run(given)
        return
    if given.output is None:
        raise RecipeError("--output: is missing; name the folder of the artifact")
    if unread := [name for name in (*_LAYOUT, "virtual_stages", "read_gb_per_s", "json") if getattr(given, name)]:
        flag = "--" + unread[0].replace("_", "-")
        raise RecipeError(f"{flag}: is read with --dry-run only; a checkpoint can be loaded under any layout")
    output: Path = given.output

    with conversion_processes():
        do_together(output, lambda: prepare_output(output, "import", {}, {"hf": given.hf}))
        folder = iteration_folder(output / "megatron", 0)
        imported = write_checkpoint(given.hf, folder, lambda: _common_state(given.hf))

        figures = {"tensors": imported.num_tensors, "bytes": imported.num_bytes, "write_seconds": imported.seconds}
        figures["peak_memory_bytes"] = peak_memory()

        def finish() -> None:
            if process_rank() == 0:
                copy_sidecar(given.hf, output / "hf")
                (output / "megatron" / TRACKER).write_text("0")
                checksums = {str((folder / name).relative_to(output)): sha for name, sha in imported.checksums.items()}
                finish_artifact(output, figures, checksums)
                print(f"{output}: {imported.num_tensors} tensors, {imported.num_bytes / 1e9:.2f} GB", flush=True)

        do_together(output, finish)


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
    _add_processes(parser)
    given = parser.parse_args(argv)
    output: Path = given.output
    named = [_parse_checkpoint(text) for text in given.checkpoint]
    inputs, iterations = _identity(named)
    for folder in inputs.values():
        read_manifest(folder)

    with conversion_processes():
        do_together(output, lambda: prepare_output(output, "export", {"iterations": iterations}, inputs))
        checksums: dict[str, str] = {}
        figures: dict[str, float] = dict.fromkeys(("tensors", "bytes", "write_seconds", "compare_seconds"), 0)
        for name, folder, iteration in _expand(named):
            target = output / name
            if target.exists():  # left by an interrupted run; a folder appears only when it is whole
                continue
            checkpoint = folder / "megatron"
            chosen = latest_iteration(checkpoint) if iteration is None else iteration
            source = iteration_folder(checkpoint, chosen)
            if not source.is_dir():
                raise CheckpointError(f"{source}: no such iteration; {checkpoint} holds {saved_iterations(checkpoint)}")
            exported = export_checkpoint(source, folder / "hf", target)
            checksums |= {f"{name}/{file}": sha for file, sha in exported.checksums.items()}
            found = exported.compared
            made = (found.num_tensors, found.num_bytes, exported.seconds, exported.compare_seconds)
            figures = {key: figures[key] + value for key, value in zip(figures, made, strict=True)}
            if process_rank() == 0:
                print(
                    f"{target}: {found.num_tensors} tensors, {found.num_bytes / 1e9:.2f} GB, each compared with "
                    f"{source}: equal",
                    flush=True,
                )

        figures["peak_memory_bytes"] = peak_memory()

        def finish() -> None:
            if process_rank() == 0:
                finish_artifact(output, figures, checksums)

        do_together(output, finish)


_LAYOUT = (
    *("tensor_parallel", "pipeline_parallel", "expert_parallel", "context_parallel", "data_parallel", "precision"),
)
"""Settings of a layout that decide who holds what."""


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="show what would be done, from config.json alone")
    for name in _LAYOUT:
        field = Layout.model_fields[name]
        choices = get_args(field.annotation) or None
        text = f"{field.description} (default: {field.default})"
        group.add_argument("--" + name.replace("_", "-"), type=str if choices else int, choices=choices, help=text)
    group.add_argument("--virtual-stages", type=int, help="chunks of layers in each pipeline stage (default: 1)")
    group.add_argument("--read-gb-per-s", type=float, help="what a process reads from disk, for the times (default: 1)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write it all to a file too")


def _dry_run(given: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_erpd.checkpoint.dry_run import READ_BYTES_PER_SECOND, dry_run
    from megatron_erpd.checkpoint.dry_run_tables import print_dry_run

    rate = READ_BYTES_PER_SECOND if given.read_gb_per_s is None else given.read_gb_per_s * 1e9
    if rate <= 0:
        raise RecipeError(f"--read-gb-per-s {given.read_gb_per_s}: must be above 0")
    layout = settings_from_namespace(given, Layout)
    chunks = 1 if given.virtual_stages is None else given.virtual_stages
    found = dry_run(given.hf, layout, virtual_stages=chunks, bytes_per_second=rate)
    print_dry_run(found, Console(width=None if sys.stdout.isatty() else 150))
    if given.json:
        given.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="share the work among so many processes of this machine (default: 1; under torchrun, those it started)",
    )


def _common_state(hf_folder: Path) -> dict[str, Any]:
    """What Megatron keeps beside the tensors and looks for when it loads: its arguments, and where the run stands."""
    from megatron_erpd.training.arguments import parse_megatron_arguments
    from megatron_erpd.training.runtime import common_flags

    flags = {**common_flags(), "eval_interval": 1, "eval_iters": 0, "save_interval": 1, "lr": 1.0, "train_iters": 0}
    flags |= {"no_save_optim": True, "no_save_rng": True}
    # Megatron prints every argument; a conversion has none that the user chose.
    with _as_single_process(), redirect_stdout(io.StringIO()):
        args = parse_megatron_arguments(hf_folder, Layout(), flags, [], _ANY_LENGTH)
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
        from megatron.training.global_vars import destroy_global_vars

        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


@contextmanager
def _as_single_process() -> Iterator[None]:
    """The arguments in a checkpoint say nothing of the processes that converted it."""
    saved = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


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
