"""Reading slices of a Hugging Face folder's safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_erpd.checkpoint.hf_config import ModelShape
from megatron_erpd.checkpoint.param_map import EMBEDDING_HF_NAME, HEAD_HF_NAME, hf_shapes, is_ignored
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


class HfWeights:
    """The tensors of a Hugging Face folder, read slice by slice from memory-mapped safetensors files.

    Raises:
        CheckpointError: no weights, weights in another format, a file that the index names is missing or unreadable, or
            the index and the files disagree.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}
        for path, indexed in _find_files(self.folder).items():
            self._open(path, indexed)

    def _open(self, path: Path, indexed: set[str] | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: named in {INDEX} but missing; fetch it again")
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
        held = set(handle.keys())
        if indexed is not None and indexed != held:
            name = min(indexed ^ held)
            where = f"is named in {INDEX} but not in this file" if name in indexed else f"is not named in {INDEX}"
            raise CheckpointError(f"{path}: tensor {name} {where}; fetch the folder again")
        self._files[path.name] = handle
        self._slices.update({name: handle.get_slice(name) for name in held})

    @property
    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """The element type; safetensors' own name where it is none of `DTYPES`."""
        stored = self._slices[name].get_dtype()
        return DTYPES.get(stored, stored)

    def read(self, name: str, start: int, count: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Rows `[start, start + count)` of a tensor, and of them the columns `[low, high)`; on the CPU, as stored."""
        if columns is None:
            return self._slices[name][start : start + count]
        return self._slices[name][start : start + count, columns[0] : columns[1]]


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
            weight_map = json.loads(index.read_text())["weight_map"]
            files: dict[Path, set[str] | None] = {folder / file: set() for file in weight_map.values()}
            for name, file in weight_map.items():
                names = files[folder / file]
                assert names is not None
                names.add(name)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
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
