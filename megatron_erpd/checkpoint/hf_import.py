"""Hugging Face weights into a Megatron model, on any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_erpd.checkpoint.hf_config import read_model_shape
from megatron_erpd.checkpoint.hf_weights import HfWeights, check_tensors
from megatron_erpd.checkpoint.shards import LocalShard, local_shards, missing_units, raise_together


@torch.no_grad()
def import_hf_weights(model_chunks: Sequence[Any], hf_folder: Path | str) -> None:
    """Fills the parameters of this rank's model chunks from a Hugging Face folder.

    Every rank reads just the rows and columns that its shards need, a slice at a time: the memory taken is that of
    the largest slice. Values are converted to the parameter's dtype (exact where that is as wide). Rows that Megatron
    pads the vocabulary with become zeros. The copy of tied embeddings on the last pipeline stage is filled too.
    An optimizer that keeps its own copy of the weights must take them over afterwards (`reload_model_params`).

    Collective over all ranks: two small gathers, so that an error is raised on all of them.

    Args:
        model_chunks: this rank's Megatron `GPTModel`s (one, or several under virtual pipelining), wrapped or not.
        hf_folder: folder with `config.json` and safetensors, readable by every rank.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape than `config.json` says; a parameter of the
            model has no source, or a source no parameter (the model was built with other flags). Nothing is filled
            then.
    """
    shape = read_model_shape(hf_folder)
    weights = HfWeights(hf_folder)
    shards, problems = local_shards(model_chunks, shape)
    raise_together(hf_folder, [*check_tensors(weights, shape), *problems])
    raise_together(hf_folder, missing_units(shards, shape))
    for shard in shards:
        _fill(shard, weights)


def _fill(shard: LocalShard, weights: HfWeights) -> None:
    unit, target = shard.unit, shard.data
    columns = None if unit.columns is None else (shard.column, shard.column + target.shape[1])
    filled = 0
    for at, source in unit.pieces(shard.row, target.shape[0]):
        piece = weights.read(unit.hf_names[source.tensor], source.start, source.count, columns)
        target[at : at + source.count].copy_(piece)
        filled += source.count
    if filled < target.shape[0]:
        assert unit.padded, f"{unit}: rows {filled} to {target.shape[0]} have no source"
        target[filled:].zero_()
