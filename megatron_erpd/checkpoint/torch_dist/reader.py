"""Reading Megatron's `torch_dist` checkpoints tensor by tensor, without a model and without process groups.

The format is PyTorch's distributed checkpoint: files of tensors, each as `torch.save` writes it, and `.metadata`, a
pickle that says which part of which global tensor lies where. Decoder layers and experts are leading axes of the global
tensors, so a checkpoint of any layout reads the same.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from dataclasses import dataclass, is_dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_erpd.checkpoint.hugging_face.weights import read_at
from megatron_erpd.checkpoint.mapping.param_map import Unit
from megatron_erpd.errors import CheckpointError, first_line

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A stored part of a unit: its first row and column there, its size, and what names it in the files."""

    row: int
    column: int
    size: tuple[int, ...]
    index: MetadataIndex


class TorchDistReader:
    """The tensors of one iteration of a Megatron checkpoint, read row by row where they are stored.

    Args:
        folder: an `iter_...` folder.

    Raises:
        CheckpointError: there is no checkpoint in it, `.metadata` can't be read, or names things that have no place in
            it: it is a pickle, and nothing but the classes of the format is ever loaded from it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder / METADATA)
        stored: dict[str, Any] = self._metadata.state_dict_metadata
        self.tensors = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
        self._files: dict[Path, BinaryIO] = {}
        self._places: dict[MetadataIndex, tuple[int, int]] = {}
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}

    def names(self) -> list[str]:
        """Keys of the model's tensors, as Megatron stores them; the optimizer's are left out."""
        return [key for key in self.tensors if not key.startswith(("optimizer.", "chained_"))]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def chunks(self, unit: Unit) -> list[Chunk]:
        """The stored chunks of a unit, in order of rows; empty where the checkpoint doesn't have it.

        Raises:
            CheckpointError: the global tensor has another shape than the unit.
        """
        key, at, axes = self._stored_as(unit)
        if key not in self.tensors:
            return []
        size = self.shape(key)
        wanted = (*axes, unit.num_rows, *(() if unit.columns is None else (unit.columns,)))
        padded = unit.padded and len(size) == len(wanted) and size[len(axes)] >= unit.num_rows
        if size != wanted and not (padded and size[len(axes) + 1 :] == wanted[len(axes) + 1 :]):
            raise CheckpointError(
                f"{self.folder}: tensor {key} has shape {list(size)}, but config.json makes it {list(wanted)}"
            )
        if (key, len(at)) not in self._chunks:
            self._chunks[key, len(at)] = self._by_place(key, len(at))
        return self._chunks[key, len(at)].get(at, [])

    def _by_place(self, key: str, num_axes: int) -> dict[tuple[int, ...], list[Chunk]]:
        """A tensor's chunks by their indices on its leading axes: a mixture has thousands of units in one."""
        found: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in self.tensors[key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if prod(sizes[:num_axes]) != 1:
                raise CheckpointError(f"{self.folder}: a chunk of {key} spans several layers, which is not supported")
            here, part = offsets[num_axes:], sizes[num_axes:]
            column = here[1] if len(here) > 1 else 0
            index = MetadataIndex(key, chunk.offsets)
            found.setdefault(offsets[:num_axes], []).append(Chunk(here[0], column, part, index))
        for chunks in found.values():
            chunks.sort(key=lambda chunk: (chunk.row, chunk.column))
        return found

    def dtype(self, chunk: Chunk) -> torch.dtype:
        found: torch.dtype = self.tensors[chunk.index.fqn].properties.dtype
        return found

    def read_rows(self, rows: torch.Tensor, unit: Unit, name: str, start: int) -> int:
        """Fills `rows` `[n, ...]` with rows `[start, start + n)` of one of a unit's Hugging Face tensors, converted to
        their element type; returns how many elements the checkpoint has of them (of overlapping chunks, all).

        Raises:
            CheckpointError: a chunk's file is missing, cut off or holds something else there.
        """
        filled = 0
        for at, row, count in unit.places(unit.hf_names.index(name), start, len(rows)):
            for chunk in self.chunks(unit):
                low, high = max(chunk.row, row), min(chunk.row + chunk.size[0], row + count)
                if low >= high:
                    continue
                part = rows[at + low - row : at + high - row]
                if unit.columns is not None:
                    part = part[:, chunk.column : chunk.column + chunk.size[1]]
                self._read_into(part, chunk, low - chunk.row)
                filled += part.numel()
        return filled

    def _read_into(self, rows: torch.Tensor, chunk: Chunk, row: int) -> None:
        """Fills `rows` `[n, columns of the chunk]` with rows `[row, row + n)` of a chunk."""
        dtype = self.dtype(chunk)
        place = self._places.get(chunk.index)
        if place is None:
            place = self._places[chunk.index] = self._locate(chunk)
        descriptor, start = place
        is_direct = rows.is_contiguous() and rows.dtype == dtype
        target = rows if is_direct else torch.empty(rows.shape, dtype=dtype)
        row_bytes = prod(chunk.size[1:]) * dtype.itemsize
        read_at(descriptor, start + row * row_bytes, target, self._name(chunk))
        if not is_direct:
            rows.copy_(target)

    def _locate(self, chunk: Chunk) -> tuple[int, int]:
        """The file with a chunk's values, and where in it they begin."""
        info = self._metadata.storage_data[chunk.index]
        path = self.folder / info.relative_path
        try:
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
            section = _Section(self._files[path], info.offset, info.length)
            # Reads the description that torch.save put before the values, and leaves the values where they are.
            with torch.serialization.skip_data():
                found = torch.load(cast(IO[bytes], section), weights_only=True)
            offset = _values_offset(section)
        except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self._name(chunk)} can't be read ({first_line(error)})") from None
        dtype = self.dtype(chunk)
        is_it = isinstance(found, torch.Tensor) and found.numel() == prod(chunk.size) and found.dtype == dtype
        if not is_it or not found.is_contiguous() or found.storage_offset() != 0:
            raise CheckpointError(f"{self._name(chunk)} holds something else than {dtype} {list(chunk.size)}")
        return self._files[path].fileno(), info.offset + offset

    def _name(self, chunk: Chunk) -> str:
        path = self.folder / self._metadata.storage_data[chunk.index].relative_path
        return f"{path}: tensor {chunk.index.fqn} at {list(chunk.index.offset or ())}"

    def _stored_as(self, unit: Unit) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, indices and leading axes of a unit here: models of unlike layers have the layer in the key."""
        layers = "decoder.layers."
        if unit.key in self.tensors or not unit.key.startswith(layers):
            return unit.key, unit.at, unit.axes
        return f"{layers}{unit.layer}.{unit.key.removeprefix(layers)}", unit.at[1:], unit.axes[1:]

    def layerless(self, key: str) -> str:
        """The table's key for a stored key."""
        parts = key.split(".")
        if key.startswith("decoder.layers.") and parts[2].isdigit():
            return ".".join([*parts[:2], *parts[3:]])
        return key


def read_metadata(path: Path) -> Metadata:
    """A distributed checkpoint's `.metadata`.

    Raises:
        CheckpointError: missing, broken, or a pickle with anything else in it; such a one is not loaded.
    """
    try:
        found = _FormatUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing, so {path.parent.name} is no finished torch_dist checkpoint; check the path"
        ) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint ({error})") from None
    if not isinstance(found, Metadata) or found.storage_data is None:
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint")
    return found


class _FormatUnpickler(pickle.Unpickler):
    """Loads the classes that describe a checkpoint, and nothing else; one function: the lookup of a layout."""

    _MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
    _PLAIN = {("torch", "Size"), ("collections", "OrderedDict"), ("torch.serialization", "_get_layout")}

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if self._may_be_known(module, name) else None
        is_class = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        if is_class or (module, name) in self._PLAIN or isinstance(found, (torch.dtype, torch.memory_format)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there, and was not loaded")

    def _may_be_known(self, module: str, name: str) -> bool:
        return module.startswith(self._MODULES) or (module, name) in self._PLAIN or module == "torch"


def _values_offset(section: _Section) -> int:
    """Where the bytes of the one storage begin in a file of `torch.save`, which is a zip without compression."""
    with zipfile.ZipFile(cast(IO[bytes], section)) as archive:
        (entry,) = (entry for entry in archive.infolist() if "/data/" in entry.filename)
    section.seek(entry.header_offset + 26)  # past what the header has before the lengths of its two last fields
    name, extra = struct.unpack("<HH", section.read(4))
    return entry.header_offset + 30 + int(name) + int(extra)


class _Section(io.RawIOBase):
    """A part of a file as a file of its own; several of one file share its position, so one is read at a time."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        got: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += got
        return got
