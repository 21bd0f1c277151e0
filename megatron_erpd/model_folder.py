"""Which files of a Hugging Face folder are its weights: one answer for the import, the samplers and every comparison.

`transformers`, vLLM and an import choose among the files of a folder by rules of their own. A folder that they would
read alike is accepted; any other is refused with what to remove, because a policy would be sampled with other weights
than are trained. docs/conversion.md has the rules.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_erpd.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tiktoken.model", "*.tiktoken"),
)
"""Patterns of the files that hold a tokenizer's vocabulary."""

_ADAPTER = re.compile(r"adapters?([._-].*)?\.(safetensors|bin|pt|json)", re.IGNORECASE)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.IGNORECASE)
_INDEX_OF_WEIGHTS = re.compile(r".*\.index(\.[\w-]+)?\.json", re.IGNORECASE)
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".npz"),
)
_VARIANT = re.compile(r"model\.[\w-]+(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.[\w-]+\.json")
_OTHER_WEIGHTS = (
    ("quantization_config", "the weights are quantised, which is not supported; take a plain checkpoint"),
    ("compression_config", "the weights are compressed, which is not supported; take a plain checkpoint"),
    ("transformers_weights", f"transformers would read that file and nothing else does; name the file {SINGLE}"),
)
"""Keys of `config.json` that say how to read the weights."""

_LFS = b"version https://git-lfs.github.com/spec/"
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are.

    Attributes:
        path: the safetensors file.
        start: of the tensor's first byte in it.
        shape: of the tensor.
        label: its element type by safetensors' name.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    label: str


def weight_files(folder: Path | str) -> dict[Path, frozenset[str] | None]:
    """The files that hold a folder's weights, each with the tensors that the index has for it (None without an index).

    Looks at names, `config.json` and the index; the files themselves are not opened.

    Raises:
        CheckpointError: there are no weights, only some in another format, or an adapter's; or the folder holds more
            than one set of weights, and programs would choose differently. Names the files and says what to remove.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder with config.json and safetensors files")
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and not path.is_dir())
    refuse_adapter(folder)
    _refuse_spelling(folder, names)
    _refuse_configured(folder)
    tensors = [name for name in names if name.lower().endswith(".safetensors")]
    if INDEX in names:
        return _indexed(folder, tensors)
    if SINGLE not in names:
        raise _no_weights(folder, names, tensors)
    if others := [name for name in tensors if name != SINGLE]:
        raise CheckpointError(
            f"{folder}: holds {_listed(others)} beside {SINGLE}; without an index vLLM reads every .safetensors file, "
            f"transformers and an import only {SINGLE}: remove {_listed(others)}, or move what belongs to the model "
            "elsewhere"
        )
    return {folder / SINGLE: None}


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors files that `weight_files` would look at."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def is_of_weights(name: str) -> bool:
    """Whether a file's name is that of weights in any format, of their index, or of an adapter's part."""
    is_weights = name.lower().endswith(_WEIGHT_SUFFIXES)
    return is_weights or bool(_INDEX_OF_WEIGHTS.fullmatch(name) or _ADAPTER.fullmatch(name))


def refuse_adapter(folder: Path) -> None:
    """Raises `CheckpointError` for a folder that holds a PEFT adapter, alone or beside the weights."""
    found = sorted(path.name for path in folder.iterdir() if _ADAPTER.fullmatch(path.name) and not path.is_dir())
    if not found:
        return
    merge = "merge it into its base model (`PeftModel.from_pretrained(...).merge_and_unload()`, then `save_pretrained`)"
    if not has_weights(folder):
        base = _read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if base else ""
        raise CheckpointError(
            f"{folder}: holds {_listed(found)}, an adapter{of}, and not the weights of a model; {merge} and give the "
            "folder that this writes"
        )
    raise CheckpointError(
        f"{folder}: holds an adapter beside the weights, which transformers adds where peft is installed and no other "
        f"program does; remove {_listed(found)}, or {merge} and give the folder that this writes"
    )


def read_tensors(folder: Path | str, only: Sequence[str] | None = None) -> dict[str, StoredTensor]:
    """Name to place of the tensors in a folder's weight files; reads headers only.

    Args:
        only: names of the files to open, where the folder is not finished.

    Raises:
        CheckpointError: from `weight_files`; a file is missing, unreadable or cut off, a tensor is in two files, or the
            index and the files disagree.
    """
    folder = Path(folder)
    files: dict[Path, frozenset[str] | None]
    files = weight_files(folder) if only is None else {folder / name: None for name in only}
    found: dict[str, StoredTensor] = {}
    for path, indexed in files.items():
        held = read_header(path)
        if indexed is not None and indexed != held.keys():
            name = min(indexed ^ held.keys())
            where = f"is named in {INDEX} but not in this file" if name in indexed else f"is not named in {INDEX}"
            raise CheckpointError(f"{path}: tensor {name} {where}; fetch the folder again")
        for name in held.keys() & found.keys():
            raise CheckpointError(f"{path}: tensor {name} is in {found[name].path.name} too; fetch both again")
        found.update(held)
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, which the library has opened and found whole.

    Raises:
        CheckpointError: it isn't such a file, or is cut off.
    """
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="numpy"):  # checks the header, its offsets and the file's size
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size), object_pairs_hook=_refuse_twice)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
    return {
        name: StoredTensor(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def refuse_lfs_pointer(path: Path) -> None:
    """Raises `CheckpointError` for what Git LFS leaves in a file's place where the file was not fetched."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_LFS))
    except OSError:
        return  # told by whoever reads it
    if begin == _LFS:
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS and not the file itself; run `git lfs pull` where it was cloned, or "
            "fetch the file again"
        )


def vocabulary_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a tokenizer's vocabulary, in the order of their names."""
    found = {path for pattern in VOCABULARY_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name[0] != ".")


def _refuse_spelling(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if name.lower() in (SINGLE, INDEX) and name != name.lower():
            raise CheckpointError(
                f"{folder / name}: readers look for {name.lower()}, and not every file system tells the two apart; "
                f"rename it to {name.lower()}, or remove it"
            )


def _refuse_configured(folder: Path) -> None:
    config = _read_object(folder / "config.json")
    for key, why in _OTHER_WEIGHTS:
        if config.get(key):
            raise CheckpointError(f"{folder / 'config.json'}: {key} is set: {why}")


def _indexed(folder: Path, tensors: Sequence[str]) -> dict[Path, frozenset[str] | None]:
    """The files that the index names, if no program would read others."""
    index = folder / INDEX
    named = _read_index(index)
    for file in named:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: names {file}, which is no .safetensors file of this folder; vLLM would not read it: put the "
                "file into the folder and correct the index, or fetch the folder again"
            )
    if SINGLE in tensors and set(named) != {SINGLE}:
        raise CheckpointError(
            f"{folder}: holds two sets of weights, {SINGLE} and the {len(named)} files that {INDEX} names "
            f"({_listed(sorted(named))}); transformers reads the former, vLLM and an import the latter: remove "
            f"{SINGLE}, or {INDEX} with its files"
        )
    if left := [name for name in tensors if _SHARD.fullmatch(name) and name not in named]:
        raise CheckpointError(
            f"{folder}: holds {_listed(left)}, which {INDEX} doesn't name; it seems to be left of another save: remove "
            f"{'it' if len(left) == 1 else 'them'}, or fetch the index that belongs to "
            f"{'it' if len(left) == 1 else 'them'}"
        )
    for file in named:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: missing, though {INDEX} names it; fetch it again")
    return {folder / file: names for file, names in named.items()}


def _read_index(index: Path) -> dict[str, frozenset[str]]:
    """File to the tensors that an index has for it."""
    refuse_lfs_pointer(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_refuse_twice)["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
        if not files or not all(isinstance(file, str) and file for file in files):
            raise ValueError("its weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of weights ({error!r}); fetch it again") from None
    return {file: frozenset(names) for file, names in files.items()}


def _no_weights(folder: Path, names: Sequence[str], tensors: Sequence[str]) -> CheckpointError:
    """What is there instead of weights that every program would find."""
    if shards := [name for name in tensors if _SHARD.fullmatch(name)]:
        return CheckpointError(f"{folder / INDEX}: missing, though {shards[0]} is there; fetch the index too")
    if variants := [name for name in names if _VARIANT.fullmatch(name)]:
        return CheckpointError(
            f"{folder}: has weights only as a variant ({_listed(variants)}), which is read where it is asked for by "
            f"name; load it with transformers (`variant=...`) and write it again with `model.save_pretrained(folder)`"
        )
    if tensors:
        return CheckpointError(
            f"{folder}: has neither {SINGLE} nor {INDEX} but {_listed(tensors)}; fetch the files in the format of "
            f"transformers, or, if this is the model, rename it to {SINGLE}"
        )
    if pickled := [name for name in names if name.endswith(".bin")]:
        return CheckpointError(
            f"{folder}: has weights only as {pickled[0]}, a pickle, which is not opened here; load it with "
            "transformers where you trust it and write it again with `model.save_pretrained(folder)`"
        )
    if files := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(f"{folder}: has weights only as {files[0]}; give that file's own path to an import")
    return CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; check the path")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none, which whoever needs the file reports."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in it twice")
    return found
