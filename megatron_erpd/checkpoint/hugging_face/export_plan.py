"""What an export has to hold: the tensors of the folder that the model came from, and their element types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_erpd.checkpoint.hugging_face.sidecar import read_tensor_list
from megatron_erpd.checkpoint.hugging_face.weights import DTYPES, HfWeights
from megatron_erpd.checkpoint.mapping.config import ModelShape
from megatron_erpd.checkpoint.mapping.param_map import HEAD_HF_NAME, hf_shapes, is_ignored
from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import write_text


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """An element type by PyTorch's name for it."""
    if isinstance(dtype, str):
        known = {str(value).removeprefix("torch."): value for value in DTYPES.values()}
        if dtype not in known:
            raise CheckpointError(f"dtype {dtype!r} is unknown; use one of {', '.join(known)}")
        return known[dtype]
    return dtype


def element_types(
    source: Path, shape: ModelShape, dtype: torch.dtype | None
) -> tuple[dict[str, torch.dtype], list[str]]:
    """Name to element type of all tensors to write, in order; and what the source lists that isn't among them."""
    wanted = hf_shapes(shape)
    listed = read_tensor_list(source)
    if listed is None:
        default = dtype or _config_dtype(source)
        return dict.fromkeys(wanted, default), []
    ignored = {name for name in listed if is_ignored(name)}
    if shape.tied_embeddings:
        ignored.add(HEAD_HF_NAME)
    problems = [f"the source has no tensor {name}" for name in wanted if name not in listed]
    problems += [f"the source's tensor {name} would be lost" for name in listed if name not in {*wanted, *ignored}]
    for name in wanted:
        kind, size = listed.get(name, ("F32", list(wanted[name])))
        if size != list(wanted[name]):
            problems.append(f"the source's tensor {name} has shape {size}, not {list(wanted[name])}")
        if kind not in DTYPES:
            problems.append(f"the source's tensor {name} has element type {kind}; known are {', '.join(DTYPES)}")
    if problems:
        return {}, problems
    return {name: dtype or DTYPES[listed[name][0]] for name in wanted}, []


def _config_dtype(source: Path) -> torch.dtype:
    config = json.loads((source / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(name, str):
        raise CheckpointError(f"{source}/config.json: has no dtype, and no list of tensors tells it; give a dtype")
    value = as_dtype(name)
    assert value is not None
    return value


def set_config_dtype(path: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Has `config.json` name the element type of what is written; the file stays as it is where it does already."""
    kinds = set(dtypes.values())
    if len(kinds) != 1:  # mixed, as the source was: its own word stands
        return
    name = str(kinds.pop()).removeprefix("torch.")
    config = json.loads(path.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == name for key in keys):
        return
    config.update(dict.fromkeys(keys, name))
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_written(folder: Path, shape: ModelShape, dtypes: Mapping[str, torch.dtype]) -> None:
    """Opens what was written and holds it to the list, so that a truncated file never gets the output's name."""
    weights = HfWeights(folder)
    expected = hf_shapes(shape)
    for name in expected.keys() | weights.names:
        if name not in weights.names or name not in expected:
            raise CheckpointError(f"{folder}: tensor {name} was not written as planned; export again")
        if weights.shape(name) != expected[name] or weights.dtype(name) != dtypes[name]:
            raise CheckpointError(f"{folder}: tensor {name} was written with another shape or type; export again")
