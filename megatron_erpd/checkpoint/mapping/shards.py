"""What each rank's model holds of the global tensors, and agreement between ranks about what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_erpd.checkpoint.mapping.config import ModelShape
from megatron_erpd.checkpoint.mapping.param_map import Unit, units
from megatron_erpd.errors import CheckpointError

_NUMBERED_LAYER = re.compile(r"^(decoder\.layers)\.(\d+)\.")


@dataclass(frozen=True)
class LocalShard:
    """This rank's rows and columns of one unit; `data` shares memory with the parameter."""

    unit: Unit
    data: torch.Tensor
    row: int
    column: int
    is_main: bool
    """Whether this is the copy that speaks for its replicas (over DP, TP and tied embeddings)."""


def unwrap(model: Any) -> Any:
    """The Megatron model under wrappers for data parallelism and mixed precision."""
    while hasattr(model, "module"):
        model = model.module
    return model


def local_shards(model_chunks: Sequence[Any], shape: ModelShape) -> tuple[list[LocalShard], list[str]]:
    """All parameters of this rank's model chunks, and what doesn't fit the table, a line each. No communication."""
    by_place = {(unit.key, unit.at): unit for unit in units(shape)}
    shards: list[LocalShard] = []
    problems: list[str] = []
    for model in map(unwrap, model_chunks):
        filled: set[str] = set()
        for name, tensor in _sharded_tensors(model):
            filled.add(name)
            key, at = _place(tensor)
            unit = by_place.get((key, at))
            if unit is None:
                where = f" of layer {at[0]}" if at else ""
                problems.append(f"the model's parameter {key}{where} is unknown for {shape.family.name}")
                continue
            problem = _check_global_shape(unit, tensor)
            if problem:
                problems.append(problem)
                continue
            shards.append(_local_shard(unit, tensor))
        parameters = {name for name, _ in model.named_parameters()}
        problems += [
            f"the model's parameter {name} is in no shard of its state" for name in sorted(parameters - filled)
        ]
    return shards, problems


def _sharded_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Name in the model and `ShardedTensor` (several per name where a factory splits a parameter)."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    for name, value in model.sharded_state_dict().items():
        if isinstance(value, ShardedObject):  # Transformer Engine's extra state: FP8 scales, no weights
            continue
        if isinstance(value, ShardedTensor):
            yield name, value
            continue
        assert isinstance(value, ShardedTensorFactory), f"{name}: unexpected {type(value)}"
        for part in value.build():
            assert isinstance(part, ShardedTensor), f"{name}: unexpected {type(part)}"
            yield name, part


def _place(tensor: Any) -> tuple[str, tuple[int, ...]]:
    """Key without layer number, and the layer: an axis of the global tensor, or a number in the key."""
    if tensor.prepend_axis_num:
        return tensor.key, tuple(int(i) for i in tensor.global_offset[: tensor.prepend_axis_num])
    match = _NUMBERED_LAYER.match(tensor.key)
    if match:
        return f"{match[1]}.{tensor.key[match.end() :]}", (int(match[2]),)
    return tensor.key, ()


def _check_global_shape(unit: Unit, tensor: Any) -> str | None:
    shape = tuple(tensor.global_shape[tensor.prepend_axis_num :])
    tail = () if unit.columns is None else (unit.columns,)
    rows_fit = shape[0] >= unit.num_rows if unit.padded else shape[0] == unit.num_rows
    if shape[1:] == tail and rows_fit:
        return None
    return f"the model's parameter {unit} has shape {list(shape)}, but config.json makes it {[unit.num_rows, *tail]}"


def _local_shard(unit: Unit, tensor: Any) -> LocalShard:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    offset = tensor.global_offset[tensor.prepend_axis_num :]
    column = 0 if len(offset) == 1 else int(offset[1])
    return LocalShard(unit, tensor.data.detach(), int(offset[0]), column, is_main_replica(tensor.replica_id))


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, by rank, on every rank. One all-gather; alone without process groups."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(where: object, problems: Sequence[str]) -> None:
    """Raises the same error on every rank if any rank has a problem, so that none waits for one that left.

    Collective over all ranks.

    Raises:
        CheckpointError: `where` and the problems of all ranks, each once.
    """
    raise_problems(where, [line for rank in gather_objects(list(problems)) for line in rank])


def raise_problems(where: object, problems: Sequence[str], limit: int = 20) -> None:
    """Raises if there are problems, and shows up to `limit` of them, each once.

    Raises:
        CheckpointError: `where` and the problems.
    """
    lines = list(dict.fromkeys(problems))
    if not lines:
        return
    if len(lines) == 1:
        raise CheckpointError(lines[0] if lines[0].startswith(str(where)) else f"{where}: {lines[0]}")
    rest = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    raise CheckpointError(f"{where}:\n  " + "\n  ".join([*lines[:limit], *rest]))


def missing_units(shards: Sequence[LocalShard], shape: ModelShape) -> list[str]:
    """Units that no rank's model has, a line each. Collective over all ranks."""
    here = {(shard.unit.key, shard.unit.at) for shard in shards}
    everywhere = set().union(*gather_objects(here))
    return [f"the model has no parameter {unit}" for unit in units(shape) if (unit.key, unit.at) not in everywhere]
