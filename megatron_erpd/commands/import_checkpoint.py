"""The import stage: a Hugging Face folder as a Megatron checkpoint. No model is built."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, get_args

from megatron_erpd.checkpoint.bridge import import_with_bridge
from megatron_erpd.checkpoint.compare import unlike_table
from megatron_erpd.checkpoint.hugging_face.sidecar import copy_sidecar
from megatron_erpd.checkpoint.hugging_face.sources import resolve_source
from megatron_erpd.checkpoint.hugging_face.tokenizer_report import describe_tokenizer
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.stream_import import write_checkpoint
from megatron_erpd.checkpoint.torch_dist.iterations import TRACKER, find_iteration, iteration_folder, take_iteration
from megatron_erpd.checkpoint.torch_dist.reader import TorchDistReader
from megatron_erpd.errors import RecipeError, raise_problems
from megatron_erpd.files import check_output, check_output_file, write_text
from megatron_erpd.meeting import conversion_processes, do_together, finish_together, num_processes, peak_memory, rank
from megatron_erpd.model.compatible import SOURCE_POLICY
from megatron_erpd.model.runtime import prepare_output
from megatron_erpd.recipe.command_line import request_from, request_parser
from megatron_erpd.recipe.requests import Import
from megatron_erpd.sampling.policy import policy_fingerprint
from megatron_erpd.settings import Layout
from megatron_erpd.settings.arguments import add_processes_argument, settings_from_namespace

_ANY_LENGTH = 2
"""Conversion runs no tokens through the model; Megatron still wants a sequence length."""
_UNPACKED = ".source"
"""Where in an unfinished artifact a GGUF file's weights are."""


def import_checkpoint(argv: list[str]) -> None:
    """`megatron-erpd import`, in every process that shares the work; with --dry-run in one."""
    parser = request_parser(Import, optional=("output",))
    add_processes_argument(parser)
    _add_dry_run(parser)
    given = parser.parse_args(argv)
    if given.dry_run:
        if given.json:
            check_output_file(given.json)
        _dry_run(given)
        return
    if given.output is None:
        raise RecipeError("--output: is missing; name the folder of the artifact")
    if unread := [name for name in (*_LAYOUT, "virtual_stages", "read_gb_per_s", "json") if getattr(given, name)]:
        flag = "--" + unread[0].replace("_", "-")
        raise RecipeError(f"{flag}: is read with --dry-run only; a checkpoint can be loaded under any layout")
    request = request_from(Import, given)
    check_output(request.output)
    with conversion_processes():
        if request.via and num_processes() > 1:
            raise RecipeError("--via megatron-bridge: runs in one process; start it without --processes or torchrun")
        _import(request)


def _import(request: Import) -> None:
    hf_folder, output, via, checkpoint = _begin(request), request.output, request.via, request.checkpoint
    figures: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    if via:
        import_with_bridge(hf_folder, output / "megatron")
    elif checkpoint is not None:
        do_together(checkpoint, lambda: _take(checkpoint, hf_folder, output))
    else:
        folder = iteration_folder(output / "megatron", 0)
        imported = write_checkpoint(hf_folder, folder, lambda: _common_state(hf_folder))
        figures = {"tensors": imported.num_tensors, "bytes": imported.num_bytes, "write_seconds": imported.seconds}
        checksums = {str((folder / name).relative_to(output)): sha for name, sha in imported.checksums.items()}
    figures["peak_memory_bytes"] = peak_memory()

    def complete() -> None:
        if rank() == 0:
            if not via and checkpoint is None:
                write_text(output / "megatron" / TRACKER, "0")
            copy_sidecar(hf_folder, output / "hf")
            if not (output / _UNPACKED).exists() and not via and checkpoint is None:
                figures[SOURCE_POLICY] = policy_fingerprint(hf_folder)
            shutil.rmtree(output / _UNPACKED, ignore_errors=True)

    do_together(output, complete)
    finish_together(output, figures, checksums)
    if rank() == 0:
        size = f": {figures['tensors']} tensors, {figures['bytes'] / 1e9:.2f} GB" if "bytes" in figures else ""
        print(f"{output}{size}", flush=True)


def _begin(request: Import) -> Path:
    """Takes the output folder, and gives the model as a Hugging Face folder whose tokenizer was looked at."""
    model, output = request.hf, request.output
    is_file = Path(model).is_file()
    if is_file:  # known by its content before it is unpacked into the output
        prepare_output(output, request.command, request.identity, request.inputs, request.verify_inputs)
    found: list[Path] = []

    def resolve() -> None:
        if rank() == 0:
            found.append(resolve_source(model, output / _UNPACKED))
            report = describe_tokenizer(found[0])
            print(report or f"{found[0]}: holds no tokenizer, which sampling needs; an export has none", flush=True)

    do_together(model, resolve)
    hf_folder = found[0] if found else resolve_source(model, output / _UNPACKED)  # what the first process made
    if not is_file:
        inputs = {**request.inputs, "hf": hf_folder}
        prepare_output(output, request.command, request.identity, inputs, request.verify_inputs)
    return hf_folder


def _take(checkpoint: Path, hf_folder: Path, output: Path) -> None:
    """Makes an iteration of another program's checkpoint the artifact's, if it is one of this model."""
    if rank() == 0:
        root, iteration = find_iteration(checkpoint)
        folder = iteration_folder(root, iteration)
        raise_problems(folder, unlike_table(TorchDistReader(folder), read_model_shape(hf_folder)))
        take_iteration(root, iteration, output / "megatron")


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

    from megatron_erpd.checkpoint.dry_run import READ_BYTES_PER_SECOND, dry_run, print_dry_run

    rate = READ_BYTES_PER_SECOND if given.read_gb_per_s is None else given.read_gb_per_s * 1e9
    if rate <= 0:
        raise RecipeError(f"--read-gb-per-s {given.read_gb_per_s}: must be above 0")
    layout = settings_from_namespace(given, Layout)
    chunks = 1 if given.virtual_stages is None else given.virtual_stages
    found = dry_run(given.hf, layout, virtual_stages=chunks, bytes_per_second=rate)
    print_dry_run(found, Console(width=None if sys.stdout.isatty() else 150))
    if given.json:
        given.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")


def _common_state(hf_folder: Path) -> dict[str, Any]:
    """What Megatron keeps beside the tensors and looks for when it loads: its arguments, and where the run stands."""
    from megatron_erpd.model.arguments import parse_megatron_arguments
    from megatron_erpd.model.runtime import common_flags

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
