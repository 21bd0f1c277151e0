"""How many parameters a model has, and how many of them one process of a layout holds. Nothing is built or loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.parallel_layout import check_layout, stage_layers
from megatron_erpd.checkpoint.mapping.param_map import EMBEDDING_KEY, Split, Unit, units
from megatron_erpd.checkpoint.mapping.shape import ModelShape

VOCABULARY_MULTIPLE = 128
"""On a GPU the vocabulary is padded to a multiple of this times the tensor-parallel size."""


@dataclass(frozen=True)
class ProcessParameters:
    """Parameters in one process. Experts are apart because fewer processes hold a copy of them."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def count_parameters(shape: ModelShape) -> int:
    """Parameters of the Hugging Face model; tied embeddings count once."""
    return sum(_size(unit, unit.num_rows) for unit in units(shape))


def parameters_of(hf_folder: Path) -> int:
    """Parameters of the model in a Hugging Face folder, by its `config.json`.

    Raises:
        CheckpointError: as `read_model_shape`.
    """
    return count_parameters(read_model_shape(hf_folder))


def active_parameters(shape: ModelShape) -> int:
    """Parameters that a token is multiplied with: of a mixture's experts those that it is sent to."""
    found = units(shape)
    experts = sum(_size(unit, unit.num_rows) for unit in found if unit.expert is not None)
    dense = sum(_size(unit, unit.num_rows) for unit in found if unit.expert is None)
    return dense + (experts // shape.num_experts * shape.experts_per_token if shape.num_experts else 0)


def attention_length(shape: ModelShape) -> float:
    """Tokens of a sequence whose attention costs as many operations as all of the model's parameters: 2 per parameter
    and token, and 2 per query element and earlier token for each of attention's two products, half of which are masked.
    """
    return active_parameters(shape) / (shape.num_layers * shape.query_size)


@cache
def parameters_per_stage(
    shape: ModelShape,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    virtual_stages: int = 1,
) -> tuple[ProcessParameters, ...]:
    """Parameters of a process of every pipeline stage. Padding rows of the vocabulary are counted.

    Raises:
        LayoutError: a size doesn't divide what it splits.
    """
    check_layout(shape, tensor_parallel, pipeline_parallel, expert_parallel, virtual_stages)
    layer, outside = _one_layer_and_the_rest(shape)
    dense = _split_sizes((unit for unit in layer if unit.expert is None), tensor_parallel)
    experts = _split_sizes((unit for unit in layer if unit.expert is not None), 1) // expert_parallel
    stages = []
    for stage, chunks in enumerate(stage_layers(shape.num_layers, pipeline_parallel, virtual_stages)):
        here = [unit for unit in outside if _on_stage(unit, shape, stage, pipeline_parallel)]
        layers = sum(map(len, chunks))
        stages.append(ProcessParameters(layers * dense + _split_sizes(here, tensor_parallel), layers * experts))
    return tuple(stages)


@cache
def _one_layer_and_the_rest(shape: ModelShape) -> tuple[list[Unit], list[Unit]]:
    """The units of the first layer, as all layers are alike, and those outside of the layers."""
    found = units(shape)
    return [unit for unit in found if unit.layer == 0], [unit for unit in found if unit.layer is None]


def _on_stage(unit: Unit, shape: ModelShape, stage: int, pipeline_parallel: int) -> bool:
    is_last = stage == pipeline_parallel - 1
    if unit.key == EMBEDDING_KEY:
        return stage == 0 or (is_last and shape.tied_embeddings)
    return is_last


def _split_sizes(found: Iterable[Unit], tensor_parallel: int) -> int:
    return sum(_split_size(unit, tensor_parallel) for unit in found)


def _split_size(unit: Unit, tensor_parallel: int) -> int:
    if unit.split is Split.REPLICATED:
        return _size(unit, unit.num_rows)
    multiple = VOCABULARY_MULTIPLE * tensor_parallel if unit.padded else tensor_parallel
    return _size(unit, -(-unit.num_rows // multiple) * multiple // tensor_parallel)


def _size(unit: Unit, rows: int) -> int:
    return rows * (unit.columns or 1)
