"""How many parameters a model has, and how many of them one process of a layout holds. Nothing is built or loaded."""

from __future__ import annotations

from megatron_erpd.checkpoint.hf_config import ModelShape, check_layout
from megatron_erpd.checkpoint.param_map import Split, Unit, units

VOCABULARY_MULTIPLE = 128
"""On a GPU the vocabulary is padded to a multiple of this times the tensor-parallel size."""


def count_parameters(shape: ModelShape) -> int:
    """Parameters of the Hugging Face model; tied embeddings count once."""
    return sum(_size(unit, unit.num_rows) for unit in units(shape))


def parameters_per_process(shape: ModelShape, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> int:
    """Parameters of a process of the last pipeline stage, which holds the most: it has the output layer, with tied
    embeddings a copy of the embedding.

    Padding rows of the vocabulary are counted.

    Raises:
        LayoutError: a size doesn't divide what it splits.
    """
    check_layout(shape, tensor_parallel, pipeline_parallel)
    found = units(shape)
    per_layer = [unit for unit in found if unit.layer == 0]
    layers = shape.num_layers // pipeline_parallel * sum(_split(unit, tensor_parallel) for unit in per_layer)
    outside = [unit for unit in found if unit.layer is None]
    if pipeline_parallel > 1 and not shape.tied_embeddings:
        outside = [unit for unit in outside if not unit.key.startswith("embedding.")]
    return layers + sum(_split(unit, tensor_parallel) for unit in outside)


def _split(unit: Unit, tensor_parallel: int) -> int:
    if unit.split is Split.WHOLE or unit.expert is not None:
        return _size(unit, unit.num_rows)
    multiple = VOCABULARY_MULTIPLE * tensor_parallel if unit.padded else tensor_parallel
    return _size(unit, -(-unit.num_rows // multiple) * multiple // tensor_parallel)


def _size(unit: Unit, rows: int) -> int:
    return rows * (unit.columns or 1)
