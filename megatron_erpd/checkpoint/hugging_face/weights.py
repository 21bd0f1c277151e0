"""Reading slices of a Hugging Face folder's safetensors files.

The safetensors library opens and checks the files; the bytes are read with `pread` into memory of our own. Its slices
are of a memory map, which counts as the process's resident memory: reading a 140 GB model through it would look like
using 140 GB, and does use them under a memory limit that counts file pages.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from megatron_erpd.checkpoint.mapping.config import ModelShape
from megatron_erpd.checkpoint.mapping.param_map import (
    EMBEDDING_HF_NAME,
    HEAD_HF_NAME,
    JOINED_EXPERTS,
    hf_shapes,
    is_ignored,
)
from megatron_erpd.errors import CheckpointError
from megatron_erpd.model_folder import read_tensors

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


class HfWeights:
    """The tensors of a Hugging Face folder, read slice by slice.

    Args:
        folder: with safetensors files.
        only: names of the files to open, where the folder is not finished.
        once: what is read is not read again, so the system's memory need not keep it.

    Raises:
        CheckpointError: from `model_folder.read_tensors`: no weights, or more than one set of them; a file is missing,
            unreadable or cut off, a tensor is in two files, or the index and the files disagree.
    """

    def __init__(self, folder: Path | str, only: Sequence[str] | None = None, *, once: bool = False) -> None:
        self.folder = Path(folder)
        self._once = once and hasattr(os, "posix_fadvise")
        self._tensors = read_tensors(self.folder, only)
        self._descriptors: dict[Path, int] = {}

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def label(self, name: str) -> str:
        """Safetensors' name of the element type."""
        return self._tensors[name].label

    def dtype(self, name: str) -> torch.dtype | str:
        """The element type; safetensors' own name where it is none of `DTYPES`."""
        return DTYPES.get(self.label(name), self.label(name))

    def itemsize(self, name: str) -> int:
        """Bytes of an element."""
        return DTYPES[self.label(name)].itemsize

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows `[start, start + count)` of a tensor; on the CPU, as stored."""
        rows = torch.empty(count, *self.shape(name)[1:], dtype=DTYPES[self.label(name)])
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
