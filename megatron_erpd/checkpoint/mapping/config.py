"""What a Hugging Face `config.json` means to Megatron.

The reference for what a key means is the model class of the `transformers` library. A key whose meaning Megatron can't
reproduce exactly is an error that names it: a model that trains with other mathematics than it was sampled
with looks fine and is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_erpd.checkpoint.mapping.families import FAMILIES, REFUSED
from megatron_erpd.checkpoint.mapping.parallel_layout import check_layout, pipeline_flags
from megatron_erpd.checkpoint.mapping.shape import Family, ModelShape
from megatron_erpd.errors import CheckpointError


def read_model_shape(hf_folder: Path | str) -> ModelShape:
    """The parameter geometry of a Hugging Face folder's model. Reads `config.json` only.

    Raises:
        CheckpointError: no folder, no `config.json`, an unsupported architecture or key.
    """
    family, config = _read_config(Path(hf_folder))
    return family.read_shape(Path(hf_folder) / "config.json", family, config)


def model_flags(
    hf_folder: Path | str,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    *,
    virtual_stages: int = 1,
    max_length: int | None = None,
    make_vocab_size_divisible_by: int = 128,
) -> dict[str, object]:
    """Megatron's architecture arguments for a Hugging Face folder, by the names that `megatron.training` gives them.

    Args:
        hf_folder: folder with a `config.json`; weights are not looked at.
        tensor_parallel, pipeline_parallel, expert_parallel: sizes that the layout must be checked against.
        virtual_stages: chunks of layers in each pipeline stage.
        max_length: longest sequence that will run through the model, in tokens; checked where given.
        make_vocab_size_divisible_by: Megatron pads the vocabulary to a multiple of this times `tensor_parallel`.

    Returns:
        Argument name to value; True for a switch to set. `vocab_size` is the unpadded size. `max_position_embeddings`
        is the smaller of the model's context and its sliding window: up to that length a sliding window and
        full attention are the same, and Megatron refuses a longer `seq_length`.

    Raises:
        CheckpointError: the folder or `config.json` is missing, the architecture isn't supported, a key has no exact
            counterpart in Megatron, or `max_length` is more than the model's context or sliding window.
        LayoutError: a parallel size doesn't divide what it splits.
    """
    path = Path(hf_folder) / "config.json"
    family, config = _read_config(Path(hf_folder))
    shape = family.read_shape(path, family, config)
    check_layout(shape, tensor_parallel, pipeline_parallel, expert_parallel, virtual_stages)
    return {
        **family.flags(path, shape, config, max_length),
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        **pipeline_flags(shape.num_layers, pipeline_parallel, virtual_stages),
    }


def context_lengths(hf_folder: Path | str) -> tuple[int, int]:
    """Up to how many tokens a model of a folder is computed exactly in Megatron, and how many positions it has.

    Raises:
        CheckpointError: as `read_model_shape`.
    """
    family, config = _read_config(Path(hf_folder))
    return family.context_length(Path(hf_folder), config, None), int(config.max_position_embeddings)


def flags_to_argv(flags: Mapping[str, object]) -> list[str]:
    """Command-line form of Megatron arguments: True is a bare flag, False and None are left out, lists are spread."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        argv.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        argv += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return argv


def _read_config(folder: Path) -> tuple[Family, Any]:
    """The architecture's family and the configuration with the library's defaults filled in."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder with config.json and safetensors files")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so this is no Hugging Face model folder; check the path")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch the file again")
    architectures = raw.get("architectures") or []
    name = architectures[0] if len(architectures) == 1 else None
    if name in REFUSED:
        raise CheckpointError(f"{path}: {name} can't be expressed by Megatron-Core: {REFUSED[name]}")
    if name not in FAMILIES:
        raise CheckpointError(f"{path}: architectures is {architectures}; supported: one of {', '.join(FAMILIES)}")
    for key, why in (("quantization_config", "the weights are quantised"), ("auto_map", "it brings its own code")):
        if raw.get(key):
            raise CheckpointError(f"{path}: {key} is set: {why}, which is not supported; use a plain checkpoint")
    family = FAMILIES[name]
    if raw.get("model_type") != family.name:
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, but {name} has {family.name!r}")
    from transformers import AutoConfig

    try:
        return family, AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library's strict checks raise several kinds of errors
        raise CheckpointError(f"{path}: transformers does not accept it: {error}") from None
