"""Reading slices of a Hugging Face folder's safetensors files.

The safetensors library opens and checks the files; the bytes are read with `pread` into memory of our own. Its slices
are of a memory map, which counts as the process's resident memory: reading a 140 GB model through it would look like
using 140 GB, and does use them under a memory limit that counts file pages.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_erpd.checkpoint.hf_config import ModelShape
from megatron_erpd.checkpoint.param_map import EMBEDDING_HF_NAME, HEAD_HF_NAME, JOINED_EXPERTS, hf_shapes, is_ignored
from megatron_erpd.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Element types of weights that are supported, by safetensors' names."""


_AHEAD_BYTES = 2**24
"""What the disk is asked for beyond a large piece that is read: the next pieces most probably lie there."""
_AHEAD_FROM = 2**20


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes are."""

    path: Path
    start: int
    shape: tuple[int, ...]
    label: str


class HfWeights:
    """The tensors of a Hugging Face folder, read slice by slice.

    Args:
        folder: with safetensors files.
        only: names of the files to open, where the folder is not finished.
        once: what is read is not read again, so the system's memory need not keep it.

    Raises:
        CheckpointError: no weights, weights in another format, a file that the index names is missing, unreadable or
            cut off, a tensor is in two files, or the index and the files disagree.
    """

    def __init__(self, folder: Path | str, only: Sequence[str] | None = None, *, once: bool = False) -> None:
        self.folder = Path(folder)
        self._once = once and hasattr(os, "posix_fadvise")
        self._tensors: dict[str, _Stored] = {}
        self._descriptors: dict[Path, int] = {}
        found: Mapping[Path, set[str] | None]
        found = _find_files(self.folder) if only is None else {self.folder / name: None for name in only}
        for path, indexed in found.items():
            self._open(path, indexed)

    def _open(self, path: Path, indexed: set[str] | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though {INDEX} names it; fetch it again")
        held = read_header(path)
        if indexed is not None and indexed != held.keys():
            name = min(indexed ^ held.keys())
            where = f"is named in {INDEX} but not in this file" if name in indexed else f"is not named in {INDEX}"
            raise CheckpointError(f"{path}: tensor {name} {where}; fetch the folder again")
        for name in held.keys() & self._tensors.keys():
            raise CheckpointError(f"{path}: tensor {name} is in {self._tensors[name].path.name} too; fetch both again")
        self._tensors.update(held)

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype | str:
        """The element type; safetensors' own name where it is none of `DTYPES`."""
        stored = self._tensors[name].label
        return DTYPES.get(stored, stored)

    def itemsize(self, name: str) -> int:
        """Bytes of an element."""
        return DTYPES[self._tensors[name].label].itemsize

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows `[start, start + count)` of a tensor; on the CPU, as stored."""
        rows = torch.empty(count, *self.shape(name)[1:], dtype=DTYPES[self._tensors[name].label])
        self.read_into(rows, name, start)
        return rows

    def read_into(self, rows: torch.Tensor, name: str, start: int) -> None:
        """Fills contiguous `rows` `[n, ...]`, of the stored element type, with rows `[start, start + n)` of a tensor.

        Raises:
            CheckpointError: the file ends before them.
        """
        stored = self._tensors[name]
        row_bytes = prod(stored.shape[1:]) * rows.element_size()
        descriptor, offset = self._descriptor(stored.path), stored.start + start * row_bytes
        read_at(descriptor, offset, rows, f"{stored.path}: tensor {name}")
        if self._once:
            os.posix_fadvise(descriptor, offset, rows.nbytes, os.POSIX_FADV_DONTNEED)

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file, which the library has opened and found whole.

    Raises:
        CheckpointError: it isn't such a file, or is cut off.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header, its offsets and the file's size
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size), object_pairs_hook=_refuse_twice)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
    return {
        name: _Stored(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in it twice")
    return found


def read_at(descriptor: int, offset: int, target: torch.Tensor, what: str) -> None:
    """Fills a contiguous tensor with a file's bytes from `offset` on.

    Raises:
        CheckpointError: the file ends before them, or can't be read; names `what`.
    """
    view = memoryview(target.view(-1).view(torch.uint8).numpy()) if target.numel() else memoryview(b"")
    done = 0
    try:
        if len(view) >= _AHEAD_FROM and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset + len(view), _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{what} ends before its last byte; fetch the file again")
            done += got
    except OSError as error:
        raise CheckpointError(f"{what} can't be read ({error})") from None


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors files that `HfWeights` would open."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def _find_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's weight files, each with the names that the index has for it (None without an index)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder with config.json and safetensors files")
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(), object_pairs_hook=_refuse_twice)["weight_map"]
            files: dict[Path, set[str] | None] = {folder / file: set() for file in weight_map.values()}
            for name, file in weight_map.items():
                names = files[folder / file]
                assert names is not None
                names.add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of weights ({error!r}); fetch it again") from None
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    shards = sorted(folder.glob("model-*.safetensors"))
    if shards:
        raise CheckpointError(f"{index}: missing, though {shards[0].name} is there; fetch the index too")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise CheckpointError(
            f"{folder}: has weights only as {pickled[0]}, a pickle, which is not opened here; load it with "
            "transformers where you trust it and write it again with `model.save_pretrained(folder)`"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; check the path")


def check_tensors(weights: HfWeights, shape: ModelShape) -> list[str]:
    """What is wrong with a folder's tensors for a model of this shape, a line each; reads headers only.

    One exception: where tied embeddings are stored twice both are read, because only equal ones are tied.
    """
    if joined := sorted(name for name in weights.names if name.endswith(JOINED_EXPERTS)):
        return [
            f"tensor {joined[0]} holds all experts of a layer; write the folder again with transformers' "
            "`model.save_pretrained(folder, save_original_format=True)`, which keeps them apart"
        ]
    expected = hf_shapes(shape)
    ignored = {name for name in weights.names if is_ignored(name)}
    if shape.tied_embeddings and HEAD_HF_NAME in weights.names:
        ignored.add(HEAD_HF_NAME)
    problems = [f"tensor {name} is missing" for name in expected if name not in weights.names]
    for name in sorted(weights.names - ignored - set(expected)):
        problems.append(f"tensor {name} is unknown for {shape.family.name}, and would be lost")
    for name in sorted(weights.names & set(expected)):
        if weights.shape(name) != expected[name]:
            found, wanted = list(weights.shape(name)), list(expected[name])
            problems.append(f"tensor {name} has shape {found}, but config.json makes it {wanted}")
        if not isinstance(weights.dtype(name), torch.dtype):
            problems.append(f"tensor {name} has element type {weights.dtype(name)}; known are {', '.join(DTYPES)}")
    if not problems and HEAD_HF_NAME in ignored and not _same(weights, HEAD_HF_NAME, EMBEDDING_HF_NAME):
        problems.append(f"tie_word_embeddings is true, but {HEAD_HF_NAME} differs from {EMBEDDING_HF_NAME}")
    return problems


def _same(weights: HfWeights, a: str, b: str, rows_at_once: int = 4096) -> bool:
    if weights.shape(a) != weights.shape(b):
        return False
    rows = weights.shape(a)[0]
    for start in range(0, rows, rows_at_once):
        count = min(rows_at_once, rows - start)
        if not torch.equal(weights.read(a, start, count), weights.read(b, start, count)):
            return False
    return True
