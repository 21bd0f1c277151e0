"""Writing Megatron's `torch_dist` format a block of rows at a time, without a model and without process groups.

A checkpoint is planned as a list of files, the same for any number of processes. Each file is written whole or not at
all and leaves a record of what lies where in it; when all records are there, `.metadata` is made of them. So an
interrupted conversion resumes with the first file that is missing, with any number of processes.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_erpd.checkpoint.file_writer import FileWriter, Fill
from megatron_erpd.checkpoint.mapping.param_map import Unit
from megatron_erpd.checkpoint.torch_dist.reader import METADATA
from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import write_text

BLOCK_BYTES = 2**27
"""Largest chunk that is stored. Loading under tensor parallelism reads whole chunks, so of small ones less is read in
vain."""
FILE_BYTES = 2**30
"""Size of a checkpoint's file: what an interrupted conversion may have to do again."""

_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_NO_EXTRA_STATE = ("embedding.", "output_layer.", ".router.")
"""Modules that keep no FP8 state of their own in a checkpoint."""


@dataclass(frozen=True)
class Block:
    """Rows `[row, row + count)` of a unit, stored as one chunk."""

    unit: Unit
    row: int
    count: int

    @property
    def size(self) -> tuple[int, ...]:
        return (self.count,) if self.unit.columns is None else (self.count, self.unit.columns)


@dataclass(frozen=True)
class CheckpointFile:
    """A file of blocks, in order."""

    name: str
    blocks: tuple[Block, ...]


def plan_checkpoint(
    units: Sequence[Unit],
    dtypes: Mapping[str, torch.dtype],
    block_bytes: int = BLOCK_BYTES,
    file_bytes: int = FILE_BYTES,
) -> list[CheckpointFile]:
    """The files of a checkpoint with these units; `dtypes` are by key."""
    files: list[list[Block]] = [[]]
    used = 0
    for unit in units:
        for block in _blocks(unit, dtypes[unit.key].itemsize, block_bytes):
            size = prod(block.size) * dtypes[unit.key].itemsize
            if files[-1] and used + size > file_bytes:
                files.append([])
                used = 0
            files[-1].append(block)
            used += size
    return [CheckpointFile(f"__{i}_0.distcp", tuple(blocks)) for i, blocks in enumerate(files)]


def _blocks(unit: Unit, itemsize: int, block_bytes: int) -> Iterator[Block]:
    rows = max(1, block_bytes // ((unit.columns or 1) * itemsize))
    for start in range(0, unit.num_rows, rows):
        yield Block(unit, start, min(rows, unit.num_rows - start))


class CheckpointFileWriter:
    """Writes the blocks of one file, in their order, and its record. Use as a context."""

    def __init__(self, folder: Path, planned: CheckpointFile) -> None:
        self._folder, self._planned = folder, planned
        self._file = FileWriter(folder / planned.name)
        self._places: list[tuple[int, int]] = []

    def __enter__(self) -> CheckpointFileWriter:
        return self

    def add(self, block: Block, dtype: torch.dtype, fill: Fill) -> None:
        """Takes the next block. `fill` is asked for some of its rows at a time, counted from the block's first."""
        shape = (1,) * len(block.unit.axes) + block.size
        values = partial(self._file.append_tensor, block.size, dtype, fill)
        # Only type and shape of the empty tensor are saved: its memory is never touched, so the system never gives it.
        self._places.append(_save(torch.empty(shape, dtype=dtype), self._file, values))

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        self._file.__exit__(kind, *others)
        if kind is None:
            assert len(self._places) == len(self._planned.blocks), "not all planned blocks came"
            record = {"places": self._places, "size": self._file.size, "sha256": self._file.sha256}
            write_text(_record_path(self._folder, self._planned), json.dumps(record))


def is_written(folder: Path, planned: CheckpointFile) -> bool:
    """Whether a file and its record are there and belong together."""
    record, path = _record(folder, planned), folder / planned.name
    return record is not None and path.is_file() and path.stat().st_size == record["size"]


def finish_checkpoint(
    folder: Path, files: Sequence[CheckpointFile], dtypes: Mapping[str, torch.dtype], common: Mapping[str, Any]
) -> dict[str, str]:
    """Makes the checkpoint loadable, when all its files are written: `.metadata`, Megatron's common state, and entries
    for the FP8 state that modules may ask for.

    Args:
        common: what Megatron keeps beside the tensors: its arguments, the iteration.

    Returns:
        Path in `folder` to SHA-256 of what was written.
    """
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    checksums: dict[str, str] = {}
    for file in files:
        record = _record(folder, file)
        assert record is not None, f"{file.name} is not written"
        checksums[file.name] = record["sha256"]
        for block, (offset, length) in zip(file.blocks, record["places"], strict=True):
            index = _add_chunk(tensors, block, dtypes[block.unit.key])
            storage[index] = _StorageInfo(file.name, offset, length)
    name = f"__{len(files)}_0.distcp"
    with FileWriter(folder / name) as out:
        places = [_save([dict(common)], out), _save([None], out)]
    checksums[name] = out.sha256
    keys = {"common_state/shard_0_1": places[0], **dict.fromkeys(_extra_states(files), places[1])}
    for key, (offset, length) in keys.items():
        tensors[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(name, offset, length)
    with FileWriter(folder / METADATA) as out:
        out.write(pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=storage)))
    checksums[METADATA] = out.sha256
    for file in files:
        _record_path(folder, file).unlink()
    write_text(folder / "metadata.json", json.dumps(_BACKEND))
    return checksums


def _add_chunk(tensors: dict[str, Any], block: Block, dtype: torch.dtype) -> MetadataIndex:
    unit, leading = block.unit, (1,) * len(block.unit.axes)
    tail = block.size[1:]
    if unit.key not in tensors:
        size = torch.Size((*unit.axes, unit.num_rows, *tail))
        tensors[unit.key] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [])
    offsets = torch.Size((*unit.at, block.row, *(0 for _ in tail)))
    tensors[unit.key].chunks.append(ChunkStorageMetadata(offsets, torch.Size((*leading, *block.size))))
    return MetadataIndex(unit.key, offsets, len(tensors[unit.key].chunks) - 1)


def _extra_states(files: Sequence[CheckpointFile]) -> list[str]:
    """Keys of the (empty) FP8 state of every module that may have one, under the local and Transformer Engine's layers.

    Megatron refuses a checkpoint that lacks a key it asks for, and never minds one that it doesn't.
    """
    found: dict[str, None] = {}
    for block in (block for file in files for block in file.blocks):
        unit, module = block.unit, block.unit.key.rpartition(".")[0]
        if any(part in f"{module}." for part in _NO_EXTRA_STATE):
            continue
        at, axes = unit.at or (0,), unit.axes or (1,)
        shard = f"shard_{'.'.join(map(str, at))}_{'.'.join(map(str, axes))}"
        found[f"{module}._extra_state/{shard}"] = None
        parent, _, name = module.rpartition(".")
        if name == "linear_qkv":
            found[f"{parent}.core_attention._extra_state/{shard}"] = None
    return list(found)


def _save(value: Any, file: FileWriter, values: Callable[[], None] | None = None) -> tuple[int, int]:
    """Appends a value as PyTorch's distributed checkpoints hold it; returns its offset and length in the file.

    Args:
        values: for a tensor of which only type and size count, appends its bytes when `torch.save` comes to them.
    """
    start, stream = file.size, _SaveStream(file, values)
    # Neither torch.load nor anything else here checks the zip's CRC-32 sums, which would take half of the time; files
    # have a SHA-256 of their own.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data() if values else nullcontext():
            torch.save(value, cast(IO[bytes], stream))
    except RuntimeError:
        if stream.error is None:
            raise
    finally:
        torch.serialization.set_crc32_options(before)
    if stream.error is not None:  # torch.save raises an error of its own for whatever goes wrong in a file
        raise stream.error
    return start, file.size - start


class _SaveStream(io.RawIOBase):
    """What `torch.save` writes to. Under `skip_data` it seeks past a tensor's bytes, which are appended instead."""

    def __init__(self, file: FileWriter, values: Callable[[], None] | None) -> None:
        super().__init__()
        self._file, self._values = file, values
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        num_bytes = memoryview(data).nbytes
        self._append(num_bytes, lambda: self._file.write(data))
        return num_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR and self._values is not None, "torch.save seeks only past the bytes that it skips"
        self._append(offset, self._values)
        return self._file.size

    def _append(self, num_bytes: int, work: Callable[[], object]) -> None:
        if self.error is not None:  # torch.save still ends its zip after an error
            return
        start = self._file.size
        try:
            work()
        except BaseException as error:
            self.error = error
            raise
        assert self._file.size - start == num_bytes


def _record_path(folder: Path, planned: CheckpointFile) -> Path:
    return folder / f".{planned.name}.json"


def _record(folder: Path, planned: CheckpointFile) -> dict[str, Any] | None:
    path = _record_path(folder, planned)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if len(record["places"]) == len(planned.blocks):
            return dict(record)
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path}: not the record of {planned.name}; delete the folder and import again")
