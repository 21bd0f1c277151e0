"""The import and export stages: Hugging Face folder to Megatron checkpoint and back, on any layout."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_erpd.checkpoint import copy_sidecar, export_hf_weights, import_hf_weights
from megatron_erpd.checkpoint.iterations import saved_iterations
from megatron_erpd.errors import CheckpointError, RecipeError
from megatron_erpd.manifest import finish_artifact, read_manifest, settings_identity
from megatron_erpd.training.arguments import add_layout_arguments, layout_from_namespace, rank, split_pass_through
from megatron_erpd.training.runtime import initialize, prepare_output, stage_process

_ANY_LENGTH = 2
"""Conversion runs no tokens through the model; Megatron still wants a sequence length."""


def import_checkpoint(argv: list[str]) -> None:
    """Writes a Megatron checkpoint (torch_dist) with a Hugging Face folder's weights, bit for bit.

    The artifact holds `megatron/` (loadable under any layout) and `hf/` (the configuration, tokenizer, chat template
    and all else but the weights).
    """
    parser = argparse.ArgumentParser(
        prog="megatron-erpd import",
        description=import_checkpoint.__doc__,
        epilog="example: megatron-erpd import --hf Qwen3-4B --output runs/mine/base --tensor-parallel 2",
    )
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder of the artifact")
    add_layout_arguments(parser)
    own, pass_through = split_pass_through(argv)
    namespace = parser.parse_args(own)
    layout = layout_from_namespace(namespace)
    identity = settings_identity({}, precision=layout.precision)
    prepare_output(namespace.output, "import", identity, {"hf": namespace.hf})

    run_flags = {
        "save": str(namespace.output / "megatron"),
        "no_save_optim": True,
        "no_save_rng": True,
        "no_load_optim": True,
        "train_iters": 0,
    }
    with stage_process() as store:
        args = initialize(namespace.hf, layout, run_flags, pass_through, _ANY_LENGTH, store)
        from megatron.training.checkpointing import save_checkpoint

        from megatron_erpd.training.model import build_frozen_model, model_config, synchronize

        model = build_frozen_model(model_config(args))
        import_hf_weights([model], namespace.hf)
        save_checkpoint(0, [model], None, None, 0)
        if rank() == 0:
            copy_sidecar(namespace.hf, namespace.output / "hf")
            finish_artifact(namespace.output)
        synchronize()


def export_checkpoints(argv: list[str]) -> None:
    """Writes Hugging Face folders from Megatron checkpoints of one architecture, one after another."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd export",
        description=export_checkpoints.__doc__,
        epilog="example: megatron-erpd export --checkpoint student=runs/mine/round-01/student --output exported",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="NAME=DIR[@ITERATION]",
        help="artifact to export and the name of its folder; repeatable. @all: every iteration kept, as NAME@ITERATION",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one Hugging Face folder per name")
    add_layout_arguments(parser)
    own, pass_through = split_pass_through(argv)
    namespace = parser.parse_args(own)
    layout = layout_from_namespace(namespace)
    named = [_parse_checkpoint(text) for text in namespace.checkpoint]
    inputs, iterations = _identity(named)
    settings = settings_identity({"iterations": iterations}, precision=layout.precision)
    prepare_output(namespace.output, "export", settings, inputs)
    for folder in inputs.values():
        read_manifest(folder)

    first = named[0][1] / "hf"
    with stage_process() as store:
        flags = {"no_load_optim": True, "train_iters": 0}
        args = initialize(first, layout, flags, pass_through, _ANY_LENGTH, store)
        from megatron_erpd.training.model import build_frozen_model, load_weights, model_config, synchronize

        model = build_frozen_model(model_config(args))
        for name, folder, iteration in _expand(named):
            target = namespace.output / name
            if target.exists():  # left by an interrupted run; a folder appears only when it is whole
                continue
            load_weights(model, folder, iteration)
            export_hf_weights([model], folder / "hf", target)
            synchronize()
        if rank() == 0:
            finish_artifact(namespace.output)
        synchronize()


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
