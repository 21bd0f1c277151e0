"""A Megatron model, on any layout, as a Hugging Face folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_erpd.checkpoint.hugging_face.export_plan import as_dtype, check_written, element_types, set_config_dtype
from megatron_erpd.checkpoint.hugging_face.sidecar import copy_files
from megatron_erpd.checkpoint.hugging_face.writer import (
    DEFAULT_SHARD_BYTES,
    PlannedFile,
    ShardWriter,
    plan_files,
    write_index,
)
from megatron_erpd.checkpoint.mapping.config import ModelShape, read_model_shape
from megatron_erpd.checkpoint.mapping.param_map import Unit, hf_shapes, units
from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import partial_folder, publish_folder
from megatron_erpd.meeting import gather_objects, raise_together

_NUMBERED_LAYER = re.compile(r"^(decoder\.layers)\.(\d+)\.")


@dataclass(frozen=True)
class _LocalShard:
    """This rank's rows and columns of one unit; `data` shares memory with the parameter."""

    unit: Unit
    data: torch.Tensor
    row: int
    column: int
    is_main: bool
    """Whether this is the main replica (over DP, TP and tied embeddings), the one that is exported."""


def parameter_group() -> dist.ProcessGroup | None:
    """A group of gloo of all ranks, for `export_hf_weights`; None where that is what the ranks have. Collective.

    Over NCCL every pair of ranks would take device memory for a communicator of its own.
    """
    needs_gloo = dist.is_initialized() and dist.get_backend() != "gloo"
    group: Any = dist.new_group(backend="gloo") if needs_gloo else None
    return group


@torch.no_grad()
def export_hf_weights(
    model_chunks: Sequence[Any],
    source_hf_folder: Path | str,
    output_folder: Path | str,
    dtype: torch.dtype | str | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes the model as a Hugging Face folder that loads like the one it came from.

    The first rank puts the tensors together one after another and writes them in files of at most `max_shard_bytes`:
    that is the memory it takes, plus about two of the largest tensor. All is written to a folder beside the output,
    which gets the output's name only when every tensor that the source lists is in it. With the source's element
    types, an import followed by an export gives the same bits.

    Collective over all ranks; parameters travel over gloo, point to point, from the main replica.

    Args:
        model_chunks: this rank's Megatron `GPTModel`s, wrapped or not.
        source_hf_folder: folder to take the configuration, tokenizer and list of tensors from: the original one, or
            what `copy_sidecar` made of it.
        output_folder: folder to make; must not exist.
        dtype: element type of all tensors; None for the source's, tensor by tensor.
        group: of gloo (`parameter_group`); None for the ranks' own. One serves all exports of a process: gloo keeps
            the threads of a group that is given back.
        max_shard_bytes: size at which another file is begun.

    Raises:
        CheckpointError: the output exists, the model doesn't fit `config.json`, the source lists a tensor that would
            not be written, or the first rank could not write.
    """
    source, output = Path(source_hf_folder), Path(output_folder)
    shape = read_model_shape(source)
    shards, problems = _local_shards(model_chunks, shape)
    if output.exists():
        problems.append(f"the output {output} exists and is never written over; give another folder or delete it")
    raise_together(source, problems)
    raise_together(source, _missing_units(shards, shape))
    dtypes, problems = element_types(source, shape, as_dtype(dtype))
    raise_together(source, problems)

    gather = _Gather(shards, group)
    problems = []
    if gather.rank != 0:
        gather.send_all(units(shape), dtypes)
    else:
        try:
            _write(gather, shape, dtypes, source, output, max_shard_bytes)
        except (OSError, CheckpointError) as error:
            problems = [str(error)]
    raise_together(output, problems)


def _local_shards(model_chunks: Sequence[Any], shape: ModelShape) -> tuple[list[_LocalShard], list[str]]:
    """All parameters of this rank's model chunks, and what doesn't fit the table, a line each. No communication."""
    from megatron.core.utils import unwrap_model

    by_place = {(unit.key, unit.at): unit for unit in units(shape)}
    shards: list[_LocalShard] = []
    problems: list[str] = []
    for model in unwrap_model(list(model_chunks)):
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


def _local_shard(unit: Unit, tensor: Any) -> _LocalShard:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    offset = tensor.global_offset[tensor.prepend_axis_num :]
    column = 0 if len(offset) == 1 else int(offset[1])
    return _LocalShard(unit, tensor.data.detach(), int(offset[0]), column, is_main_replica(tensor.replica_id))


def _missing_units(shards: Sequence[_LocalShard], shape: ModelShape) -> list[str]:
    """Units that no rank's model has, a line each. Collective over all ranks."""
    here = {(shard.unit.key, shard.unit.at) for shard in shards}
    everywhere = set().union(*gather_objects(here))
    return [f"the model has no parameter {unit}" for unit in units(shape) if (unit.key, unit.at) not in everywhere]


@dataclass(frozen=True)
class _Piece:
    """Where a shard lies in its unit, as other ranks know it."""

    rank: int
    index: int
    """Number among that rank's shards."""
    row: int
    column: int
    size: tuple[int, ...]


class _Gather:
    """Moves shards to the first rank, unit by unit, in an order that all ranks know."""

    def __init__(self, shards: Sequence[_LocalShard], group: dist.ProcessGroup | None) -> None:
        self._shards = shards
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._group = group
        here = [
            ((shard.unit.key, shard.unit.at), _Piece(self.rank, i, shard.row, shard.column, tuple(shard.data.shape)))
            for i, shard in enumerate(shards)
            if shard.is_main
        ]
        self._pieces: dict[tuple[str, tuple[int, ...]], list[_Piece]] = {}
        for rank_pieces in gather_objects(here):
            for place, piece in rank_pieces:
                self._pieces.setdefault(place, []).append(piece)

    def send_all(self, all_units: Sequence[Unit], dtypes: dict[str, torch.dtype]) -> None:
        """What every rank but the first does: send its shards as their turn comes."""
        for unit in all_units:
            for piece in self._pieces.get((unit.key, unit.at), []):
                if piece.rank == self.rank:
                    dist.send(_as_bytes(self._local(piece, _wire_dtype(unit, dtypes))), dst=0, group=self._group)

    def collect(self, unit: Unit, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[_Piece, torch.Tensor]]:
        """On the first rank: the shards of a unit, one at a time, on the CPU."""
        dtype = _wire_dtype(unit, dtypes)
        for piece in self._pieces.get((unit.key, unit.at), []):
            if piece.rank == self.rank:
                yield piece, self._local(piece, dtype)
                continue
            received = torch.empty(piece.size, dtype=dtype)
            dist.recv(_as_bytes(received), src=piece.rank, group=self._group)
            yield piece, received

    def _local(self, piece: _Piece, dtype: torch.dtype) -> torch.Tensor:
        return self._shards[piece.index].data.to(device="cpu", dtype=dtype).contiguous()


def _wire_dtype(unit: Unit, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The widest element type among a unit's tensors; narrower ones are rounded once, on arrival."""
    found = [dtypes[name] for name in unit.hf_names]
    dtype = found[0]
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _write(
    gather: _Gather,
    shape: ModelShape,
    dtypes: dict[str, torch.dtype],
    source: Path,
    output: Path,
    max_shard_bytes: int,
) -> None:
    """The first rank's part. Shards are received to the end even when writing fails, or their senders would wait."""
    temporary = partial_folder(output)
    failure: OSError | CheckpointError | None = None
    files = plan_files(hf_shapes(shape), dtypes, max_shard_bytes)
    left = list(files)
    try:
        if temporary.exists():  # left by an export that was cut off
            shutil.rmtree(temporary)
        copy_files(source, temporary)
        set_config_dtype(temporary / "config.json", dtypes)
    except (OSError, CheckpointError) as error:
        failure = error
    held: dict[str, torch.Tensor] = {}
    for unit in units(shape):
        try:
            tensors = _assemble(unit, gather, dtypes)
            if failure is not None:
                continue
            held |= tensors
            while left and left[0].shapes.keys() <= held.keys():
                _write_file(temporary, left.pop(0), held)
        except (OSError, CheckpointError) as error:
            failure = failure or error
    if failure is not None:
        raise failure
    write_index(temporary, files)
    check_written(temporary, shape, dtypes)
    publish_folder(output)


def _write_file(folder: Path, planned: PlannedFile, held: dict[str, torch.Tensor]) -> None:
    with ShardWriter(folder, planned) as writer:
        for name in planned.shapes:
            writer.add(name, held.pop(name))


def _assemble(unit: Unit, gather: _Gather, dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of one unit, from all ranks' shards; padding rows are dropped."""
    tensors = {name: torch.empty(size, dtype=dtypes[name]) for name, size in unit.hf_shapes().items()}
    missing = sum(tensor.numel() for tensor in tensors.values())
    for piece, data in gather.collect(unit, dtypes):
        for at, target in unit.pieces(piece.row, piece.size[0]):
            rows = tensors[unit.hf_names[target.tensor]][target.start : target.start + target.count]
            if unit.columns is not None:
                rows = rows[:, piece.column : piece.column + piece.size[1]]
            rows.copy_(data[at : at + target.count])
            missing -= rows.numel()
    if missing != 0:
        raise CheckpointError(f"{unit}: the ranks' shards do not cover it exactly ({missing} elements are missing)")
    return tensors
