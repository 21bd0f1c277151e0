"""Writing tensors as a Hugging Face folder's safetensors files of bounded size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_erpd.checkpoint.hf_weights import INDEX, SINGLE

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Size of a weight file. What most published checkpoints use; also about the memory that an export takes."""


class ShardWriter:
    """Takes tensors in the planned order and writes each file when it is full.

    A tensor larger than a file has one of its own. A single file is called `model.safetensors`; several are numbered
    and listed in an index.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self._folder = folder
        sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        self._total_bytes = sum(sizes.values())
        self._files = _plan(sizes, max_shard_bytes)
        self._current = 0
        self._held: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes the next tensor, contiguous and on the CPU."""
        self._held[name] = tensor
        if len(self._held) == len(self._files[self._current]):
            assert list(self._held) == self._files[self._current], "tensors came in another order than planned"
            save_file(self._held, self._folder / self._file_name(self._current), metadata={"format": "pt"})
            self._held = {}
            self._current += 1

    def finish(self) -> None:
        """Writes the index where there are several files."""
        assert self._current == len(self._files) and not self._held, "not all planned tensors came"
        if len(self._files) == 1:
            return
        weight_map = {name: self._file_name(i) for i, names in enumerate(self._files) for name in names}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file_name(self, i: int) -> str:
        count = len(self._files)
        return SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _plan(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names per file, in order."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files
