"""All of a Hugging Face folder that is not weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_erpd.checkpoint.hugging_face.weights import HfWeights
from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import write_text
from megatron_erpd.model_folder import has_weights, is_of_weights

TENSOR_LIST = "source_tensors.json"
"""The source's tensors in a sidecar: name to element type and shape. What an export must account for."""

_FOLDERS = ("additional_chat_templates",)
"""Subfolders that belong to a tokenizer; all others (other formats of the weights, caches) are left out."""


def copy_sidecar(source: Path | str, destination: Path | str) -> None:
    """Copies configuration, tokenizer, chat template, generation settings and licence: all files but the weights, their
    indices and adapters.

    The list of the source's tensors is written beside them (`source_tensors.json`), so that a later export can be held
    to it without the weights. One process calls this; existing files are replaced.

    Raises:
        CheckpointError: the source has no `config.json`, or its weights are there but unreadable.
    """
    source, destination = Path(source), Path(destination)
    copy_files(source, destination)
    tensors = read_tensor_list(source)
    if tensors is not None:
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in tensors.items()]
        write_text(destination / TENSOR_LIST, "{\n" + ",\n".join(lines) + "\n}\n")


def copy_files(source: Path, destination: Path) -> None:
    """The files of `copy_sidecar`, without the list of tensors."""
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source}: has no config.json; give a Hugging Face folder")
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_sidecar(path.name):
            shutil.copyfile(path, destination / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)


def _is_sidecar(name: str) -> bool:
    return not name.startswith(".") and not is_of_weights(name) and name != TENSOR_LIST


def read_tensor_list(folder: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Name to element type (safetensors' name) and shape of a folder's tensors; None where nothing tells.

    Read from the weights, or from the list that `copy_sidecar` left.
    """
    if has_weights(folder):
        weights = HfWeights(folder)
        return {name: (weights.label(name), list(weights.shape(name))) for name in sorted(weights.names)}
    path = folder / TENSOR_LIST
    if not path.is_file():
        return None
    try:
        return {name: (str(dtype), list(size)) for name, (dtype, size) in json.loads(path.read_text()).items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a list of tensors ({error}); import the checkpoint again") from None
