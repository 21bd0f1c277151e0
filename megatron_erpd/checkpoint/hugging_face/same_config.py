"""Whether two Hugging Face folders describe one computation: configuration, stop tokens and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_erpd.checkpoint.hugging_face.tokenizer_report import stop_ids
from megatron_erpd.errors import CheckpointError
from megatron_erpd.sources.tokenizer import has_tokenizer, read_object, same_vocabulary

_OF_NO_MATTER = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "id2label", "label2id"}
"""Keys about the file. (`architectures` is held against the family's table when a folder is read.)"""
_NOTED = {
    *("max_position_embeddings", "pad_token_id", "use_cache", "initializer_range", "attention_dropout"),
    *("hidden_dropout", "dtype", "torch_dtype", "output_router_logits", "router_aux_loss_coef"),
}
"""Keys that change no logit of a sequence: said, and no reason to refuse."""
_GENERATION = "generation_config.json"


def configuration_differences(ours: Path, theirs: Path) -> tuple[list[str], list[str]]:
    """Keys whose values differ in two folders, a line each, with the library's defaults filled in.

    Args:
        ours, theirs: folders with `config.json`; `generation_config.json` and a tokenizer are compared where they are.

    Returns:
        What changes the computation or where a response ends; and what doesn't.

    Raises:
        CheckpointError: a file can't be read.
    """
    first, second = _configuration(ours), _configuration(theirs)
    matter: list[str] = []
    noted: list[str] = []
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key) and key not in _OF_NO_MATTER:
            line = f"{key} is {_shown(first, key)} in {ours}/config.json, {_shown(second, key)} in {theirs}/config.json"
            (noted if key in _NOTED else matter).append(line)
    stops = [sorted(stop_ids(folder)) for folder in (ours, theirs)]
    if stops[0] != stops[1]:
        matter.append(
            f"eos_token_id is {stops[0]} in {ours}/{_GENERATION}, {stops[1]} in {theirs}/{_GENERATION}, so that "
            "responses end elsewhere"
        )
    found = [has_tokenizer(folder) for folder in (ours, theirs)]
    if all(found):
        if not same_vocabulary(ours, theirs):
            matter.append(f"the tokenizers of {ours} and {theirs} differ: token ids mean different things")
    elif any(found):
        noted.append(f"{ours if found[1] else theirs} holds no tokenizer, {theirs if found[1] else ours} does")
    return matter, noted


def _configuration(folder: Path) -> dict[str, Any]:
    """`config.json` as the library reads it; what is nested has keys with dots."""
    from transformers import AutoConfig

    path = folder / "config.json"
    read_object(path)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's strict checks raise several kinds of errors
        raise CheckpointError(f"{path}: transformers does not accept it: {error}") from None
    return _flat(config.to_dict())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + str(key): value}
    return found


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "not set"
