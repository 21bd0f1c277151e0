"""The tokenizer of a Hugging Face folder, refused where it can't be the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_erpd.errors import CheckpointError, first_line
from megatron_erpd.model_folder import refuse_lfs_pointer, vocabulary_files

CONFIG = "tokenizer_config.json"
_WITHOUT_VOCABULARY = ("ByT5Tokenizer",)
"""Classes of `transformers` that need no file: their tokens are bytes."""
_FEWEST = 3
"""A tokenizer has at least one token for so many rows of the embedding. Rows are padded and kept for later, but a third
of them without a token are the most that published models have."""
_WHERE = "copy them from the model that this one was trained from"


def load_tokenizer(hf_path: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder with a `config.json`. Nothing of the folder is executed.

    Raises:
        CheckpointError: there is none (for some families `transformers` would make an empty one), it can't be loaded,
            needs code of its own, or doesn't fit the rows of the embedding where `config.json` says how many there are.
    """
    folder = Path(hf_path)
    _check_files(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, by the kind of tokenizer and what is wrong with it
        for path in sorted(folder.glob("*.json")):
            read_object(path)  # names the file that is cut off, if one is
        raise CheckpointError(
            f"{folder}: its tokenizer can't be loaded ({type(error).__name__}: {first_line(error)}); fetch its files "
            "again"
        ) from error
    _check_vocabulary(folder, tokenizer)
    return tokenizer


def check_end(hf_path: str | Path) -> None:
    """Raises `CheckpointError` where nothing in a Hugging Face folder says which token ends a response."""
    folder = Path(hf_path)
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file() and read_object(path).get("eos_token_id") not in (None, []):
            return
    if load_tokenizer(folder).eos_token_id is None:
        raise without_end(folder)


def without_end(folder: Path | str) -> CheckpointError:
    """The error for a model whose responses would never end."""
    return CheckpointError(
        f"{folder}: no eos_token_id in generation_config.json, config.json or the tokenizer; responses would never "
        "end: add one to generation_config.json"
    )


def embedding_rows(folder: Path) -> int:
    """The rows of a model's embedding by its `config.json`.

    Raises:
        CheckpointError: the file can't be read or doesn't say.
    """
    rows = _vocab_size(folder)
    if not isinstance(rows, int) or rows < 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: has no vocab_size, so nobody knows the rows of the embedding; fetch it again"
        )
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises `CheckpointError` where it doesn't."""
    refuse_lfs_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch it again")
    return values


def _vocab_size(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: isn't a Hugging Face model folder (no config.json); give a local folder")
    config = read_object(path)
    text = config.get("text_config")
    return config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)


def _check_files(folder: Path) -> None:
    _vocab_size(folder)  # a folder of a model, not of a tokenizer alone
    found = vocabulary_files(folder)
    for path in (*found, folder / "merges.txt"):
        refuse_lfs_pointer(path)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("auto_map"):
        raise CheckpointError(
            f"{folder / CONFIG}: auto_map is set: the tokenizer needs code of its own, which is not executed; where "
            "tokenizer.json holds all of it, remove auto_map and set tokenizer_class to PreTrainedTokenizerFast"
        )
    names = {path.name for path in found}
    if not names and config.get("tokenizer_class") not in _WITHOUT_VOCABULARY:
        besides = f", only {CONFIG}" if config else ""
        raise CheckpointError(
            f"{folder}: holds no tokenizer{besides}: neither tokenizer.json, tokenizer.model nor vocab.json with "
            f"merges.txt; {_WHERE}"
        )
    merges = (folder / "merges.txt").is_file()
    if names == {"vocab.json"} and not merges:
        raise CheckpointError(
            f"{folder}: holds vocab.json but not merges.txt, without which it is no tokenizer; {_WHERE}"
        )


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{folder}: its tokenizer has no tokens but {len(vocabulary)} special ones, so it encodes every text as "
            f"nothing; its files are incomplete: {_WHERE}"
        )
    if _vocab_size(folder) is None:
        return
    rows = embedding_rows(folder)
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= rows:
        raise CheckpointError(
            f"{folder}: its tokenizer gives token {token!r} the id {largest}, config.json says vocab_size {rows}; take "
            "the tokenizer that belongs to these weights, or resize the model's embedding to it"
        )
    if len(vocabulary) * _FEWEST < rows:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(vocabulary)} tokens, config.json says vocab_size {rows}; it belongs to "
            f"another model, or its files are incomplete: {_WHERE}"
        )
