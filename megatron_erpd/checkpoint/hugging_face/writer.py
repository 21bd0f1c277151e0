"""Writing tensors as a Hugging Face folder's safetensors files of bounded size, a tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_erpd.checkpoint.file_writer import FileWriter, Fill
from megatron_erpd.checkpoint.hugging_face.weights import DTYPES
from megatron_erpd.files import write_json
from megatron_erpd.model_folder import INDEX, SINGLE

DEFAULT_SHARD_BYTES = 2 * 10**9
"""Size of a weight file: what an interrupted export may have to do again, and what processes share out."""

_LABELS = {dtype: label for label, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedFile:
    """A weight file to write: its tensors in the order of their bytes, widest elements first as safetensors wants."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def tensor_bytes(self) -> int:
        return sum(self._size(name) for name in self.shapes)

    def header(self) -> bytes:
        """The file's beginning: the length of the JSON table of tensors, and the table, padded to 8 bytes."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in self.shapes.items():
            end = at + self._size(name)
            table[name] = {"dtype": _LABELS[self.dtypes[name]], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _size(self, name: str) -> int:
        return prod(self.shapes[name]) * self.dtypes[name].itemsize


class ShardWriter:
    """Writes one planned file; tensors come in the planned order. Use as a context: whole, or not there."""

    def __init__(self, folder: Path, planned: PlannedFile) -> None:
        self._planned = planned
        self._names = iter(planned.shapes)
        self._file = FileWriter(folder / planned.name)

    def __enter__(self) -> ShardWriter:
        self._file.write(self._planned.header())
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes the next tensor: contiguous, on the CPU."""
        self._check(name, tuple(tensor.shape), tensor.dtype)
        if tensor.numel():
            self._file.write(tensor.detach().view(-1).view(torch.uint8).numpy())

    def add_rows(self, name: str, fill: Fill) -> None:
        """Takes the next tensor as what puts its rows, some at a time, where it is told to."""
        self._check(name)
        self._file.append_tensor(self._planned.shapes[name], self._planned.dtypes[name], fill)

    def _check(self, name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> None:
        expected = next(self._names)
        assert name == expected, f"{name} came where {expected} was planned"
        assert shape in (None, self._planned.shapes[name]) and dtype in (None, self._planned.dtypes[name]), name

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        if kind is None:
            left = next(self._names, None)
            assert left is None, f"{left} was planned and did not come"
        self._file.__exit__(kind, *others)

    @property
    def sha256(self) -> str:
        """Of the whole file, once it is written."""
        return self._file.sha256


def plan_files(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[PlannedFile]:
    """Which tensor goes into which file, in order; a tensor larger than a file has one of its own.

    A single file is called `model.safetensors`; several are numbered, and `write_index` lists them.
    """
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtypes[name].itemsize
        if files[-1] and used + size > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    count = len(files)
    planned = []
    for i, names in enumerate(files):
        ordered = sorted(names, key=lambda name: -dtypes[name].itemsize)  # stable: in one type the order stays
        planned.append(
            PlannedFile(
                SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors",
                {name: tuple(shapes[name]) for name in ordered},
                {name: dtypes[name] for name in ordered},
            )
        )
    return planned


def write_index(folder: Path, files: list[PlannedFile]) -> None:
    """Writes the index of several files; one alone needs none."""
    if len(files) == 1:
        return
    weight_map = {name: file.name for file in files for name in file.shapes}
    total = sum(file.tensor_bytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
