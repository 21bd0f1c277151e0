"""Building models and loading their weights, without an optimizer where none is needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_erpd import platform
from megatron_erpd.checkpoint.torch_dist.iterations import TRACKER, iteration_folder, latest_iteration, saved_iterations
from megatron_erpd.errors import CheckpointError, LayoutError, RecipeError
from megatron_erpd.model.forward import unwrap
from megatron_erpd.model.layer_spec import local_block_spec

_MASTER = "optimizer.state.param."
"""What the distributed optimizer's master weights are called in a checkpoint, before the weight's name."""
_ROWS = 4096
"""Rows of a weight that are compared at a time: a whole embedding's temporary copies are tens of gigabytes."""


def model_config(args: argparse.Namespace) -> GPTModelConfig:
    """The model that the arguments describe: Transformer Engine's layers where installed, else the local ones.

    Raises:
        RecipeError: flags of the user's don't go together.
    """
    try:
        config = gpt_config_from_args(args)
    except (AssertionError, ValueError) as error:  # as the parser says it of other flags
        raise RecipeError(f"Megatron refuses these settings: {error}") from error
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.transformer_impl == "local":
        config.transformer_layer_spec = _local_spec
    return config


def _local_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    return local_block_spec(config.transformer, vp_stage)


def build_frozen_model(config: GPTModelConfig) -> list[torch.nn.Module]:
    """This rank's part of a model that is only run forward: no DDP, no gradients, evaluation mode.

    Returns:
        Its chunks: one for each virtual pipeline stage, one where there are none.
    """
    builder = GPTModelBuilder(config)
    chunks = builder.build_distributed_models(ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False)
    return [chunk.requires_grad_(False).eval() for chunk in chunks]


def load_weights(chunks: Sequence[Any], artifact: Path, iteration: int | None = None) -> int:
    """Loads the weights of an artifact's Megatron checkpoint into a model of any layout; returns the iteration.

    Args:
        chunks: all of the model's on this rank.

    Raises:
        CheckpointError: the checkpoint or the iteration is missing.
    """
    checkpoint = artifact / "megatron"
    if iteration is None:
        iteration = latest_iteration(checkpoint)
    folder = iteration_folder(checkpoint, iteration)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such iteration; {checkpoint} holds {saved_iterations(checkpoint)}")
    load_iteration(chunks, folder)
    return iteration


def load_iteration(chunks: Sequence[Any], folder: Path) -> None:
    """Loads an `iter_...` folder's weights into a model of any layout, under the local or Transformer Engine's layers.

    Args:
        chunks: all of the model's on this rank. Together, as Megatron checks that the ranks load every tensor whole.

    Raises:
        CheckpointError: the model has a parameter that the checkpoint lacks.
    """
    cores = {f"chunk{number}": unwrap(chunk) for number, chunk in enumerate(chunks)}
    # Each kind of layers has FP8 states (empty, where there is no FP8) of modules that the other has not.
    loaded, _, absent = dist_checkpointing.load(
        {name: core.sharded_state_dict() for name, core in cores.items()},
        str(folder),
        strict=StrictHandling.RETURN_UNEXPECTED,
    )
    found = set(absent)
    for name, core in cores.items():
        kept = core.load_state_dict(loaded[name], strict=False)
        found.update(kept.missing_keys, kept.unexpected_keys)
    lacking = sorted(key for key in found if "_extra_state" not in key)
    if lacking:
        raise CheckpointError(f"{folder}: is of another model: {lacking[0]} and {len(lacking) - 1} more don't fit")


def check_optimizer_fits(checkpoint: Path, expert_parallel: int) -> None:
    """Refuses to go on from a checkpoint whose optimizer Megatron can't load; one that isn't there yet is fine.

    With expert parallelism it chains an optimizer for the experts to that of the other parameters, without it there is
    one for all, and it reads the state of neither as the other's.

    Raises:
        LayoutError: the checkpoint was saved with experts spread over ranks and these aren't, or the reverse.
        CheckpointError: it holds other parameters' optimizer state (`platform.save_optimizer_without_padding`).
    """
    if not (checkpoint / TRACKER).is_file():
        return
    folder = iteration_folder(checkpoint, latest_iteration(checkpoint))
    args = dist_checkpointing.load_common_state_dict(str(folder))["args"]
    saved = args.expert_model_parallel_size
    if (saved > 1) != (expert_parallel > 1):
        raise LayoutError(
            f"{folder}: was saved with expert parallel size {saved}, and Megatron can't give its optimizer's state to "
            f"one with {expert_parallel}; go on with expert_parallel {'above 1' if saved > 1 else '1'}, or delete the "
            "training's folder to begin anew"
        )
    marked = getattr(args, platform.WITHOUT_PADDING, False)
    if args.use_distributed_optimizer and not marked and (spoiled := _spoiled_by_padding(folder)):
        raise CheckpointError(
            f"{folder}: an earlier version saved other parameters' optimizer state in the place of that of "
            f"{spoiled[0]} and {len(spoiled) - 1} more, from which a training would go on wrongly; delete the "
            "training's folder to begin anew"
        )


def _spoiled_by_padding(folder: Path) -> list[str]:
    """Weights that aren't their fp32 master weights, rounded, in a checkpoint of the distributed optimizer.

    The first padded bucket spoils all parameters that come after it on its rank, the embedding last and the first
    layer's norms shortly before: these are compared, all norms and the embedding, and no larger weights.
    """
    reader = FileSystemReader(folder)
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    names = [name for name in stored if "norm" in name or "word_embeddings" in name]
    spoiled = []
    for name in sorted(name for name in names if f"{_MASTER}{name}" in stored):
        pair = {
            key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in (name, _MASTER + name)
        }
        load(pair, storage_reader=reader, no_dist=True)
        rows = zip(*(value.split(_ROWS) for value in pair.values()), strict=True)
        # bf16 rounds by half of that
        if not all(torch.allclose(weight.float(), master.float(), rtol=2**-7, atol=0) for weight, master in rows):
            spoiled.append(name)
    return spoiled


def synchronize() -> None:
    """All ranks are here, and what they wrote is on disk."""
    if not platform.is_cpu():
        torch.cuda.synchronize()
    torch.distributed.barrier()
