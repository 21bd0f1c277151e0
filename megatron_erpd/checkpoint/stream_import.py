"""A Hugging Face folder as a Megatron checkpoint that any layout can load; no model is built.

Every process reads the slices that its files need and writes those files. A few pieces of some MB are in memory,
whatever the size of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_erpd.checkpoint.file_writer import Fill, require_space
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights, check_tensors
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.param_map import Unit, units
from megatron_erpd.checkpoint.torch_dist.writer import (
    BLOCK_BYTES,
    FILE_BYTES,
    Block,
    CheckpointFile,
    CheckpointFileWriter,
    finish_checkpoint,
    is_written,
    plan_checkpoint,
)
from megatron_erpd.errors import raise_problems
from megatron_erpd.files import remove_unfinished
from megatron_erpd.meeting import ShareProgress, do_together, rank, share


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote."""

    num_tensors: int
    """Tensors of the Hugging Face folder."""
    num_bytes: int
    seconds: float
    """That reading and writing took."""
    checksums: dict[str, str]
    """Path in the checkpoint's folder to SHA-256; empty on all processes but the first."""


def write_checkpoint(
    hf_folder: Path,
    folder: Path,
    common: Callable[[], Mapping[str, Any]],
    *,
    block_bytes: int = BLOCK_BYTES,
    file_bytes: int = FILE_BYTES,
) -> ImportResult:
    """Writes a folder's weights as an iteration of a Megatron checkpoint, with the bits that they have.

    Tensors keep their element type (the widest of those that one Megatron tensor is made of); Megatron converts them
    when it loads. Rows that it pads the vocabulary with are no part of the checkpoint. Files that an interrupted import
    left whole are kept.

    Collective over all processes, of which there may be any number.

    Args:
        hf_folder: with `config.json` and safetensors, readable by every process.
        folder: the `iter_...` folder to fill, on a file system that all processes share.
        common: makes what Megatron keeps beside the tensors; called on the first process.
        block_bytes, file_bytes: sizes of a stored chunk and of a file.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape than `config.json` says, a file is broken, or
            there is no room. Without `.metadata` what was written is no checkpoint to Megatron.
    """
    shape = read_model_shape(hf_folder)
    found = units(shape)
    weights = HfWeights(hf_folder)
    raise_problems(hf_folder, check_tensors(weights, shape))
    dtypes = _stored_dtypes(found, weights)
    files = plan_checkpoint(found, dtypes, block_bytes, file_bytes)
    todo: list[CheckpointFile] = []

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not is_written(folder, file)]
        todo.extend(missing)
        if rank() == 0:
            remove_unfinished(folder)
            require_space(folder, sum(_size(file, dtypes) for file in missing))

    do_together(folder, prepare)
    mine = share(todo)
    state = common() if rank() == 0 else {}
    begin = time.monotonic()
    progress = ShareProgress("imported", sum(_size(file, dtypes) for file in mine))

    def write() -> None:
        for file in mine:
            with CheckpointFileWriter(folder, file) as writer:
                for block in file.blocks:
                    writer.add(block, dtypes[block.unit.key], _reads(block, weights, progress))

    do_together(folder, write)
    checksums: dict[str, str] = {}

    def finish() -> None:
        if rank() == 0:
            checksums.update(finish_checkpoint(folder, files, dtypes, state))

    do_together(folder, finish)
    num_tensors = sum(len(unit.hf_names) for unit in found)
    num_bytes = sum(_size(file, dtypes) for file in files)
    return ImportResult(num_tensors, num_bytes, time.monotonic() - begin, checksums)


def _stored_dtypes(found: Sequence[Unit], weights: HfWeights) -> dict[str, torch.dtype]:
    """The element type of each key: of all its layers, the widest."""
    dtypes: dict[str, torch.dtype] = {}
    for unit in found:
        for name in unit.hf_names:
            dtype = weights.dtype(name)
            assert isinstance(dtype, torch.dtype)
            dtypes[unit.key] = torch.promote_types(dtypes.get(unit.key, dtype), dtype)
    return dtypes


def _size(file: CheckpointFile, dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(prod(block.size) * dtypes[block.unit.key].itemsize for block in file.blocks)


def _reads(block: Block, weights: HfWeights, progress: ShareProgress) -> Fill:
    """What reads the rows of a block where they lie in the folder."""
    unit = block.unit

    def fill(rows: torch.Tensor, start: int) -> None:
        filled = 0
        for at, source in unit.pieces(block.row + start, len(rows)):
            name, target = unit.hf_names[source.tensor], rows[at : at + source.count]
            if weights.dtype(name) == rows.dtype:
                weights.read_into(target, name, source.start)
            else:
                target.copy_(weights.read(name, source.start, source.count))
            filled += source.count
        assert filled == len(rows), f"{unit}: rows of {block} have no source"
        progress.advance(rows.nbytes)

    return fill
