"""Tokenizers: the part of one that is used here, that of a Hugging Face folder (refused where it can't be the model's),
and whether two give token ids the same meaning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_erpd.errors import CheckpointError, RolloutError, first_line
from megatron_erpd.model_folder import refuse_lfs_pointer, vocabulary_files

if TYPE_CHECKING:
    from megatron_erpd.data.rollouts import Rollouts

CONFIG = "tokenizer_config.json"
_WITHOUT_VOCABULARY = ("ByT5Tokenizer",)
"""Classes of `transformers` that need no file: their tokens are bytes."""
_FEWEST = 3
"""A tokenizer has at least one token for so many rows of the embedding. Rows are padded and kept for later, but a third
of them without a token are the most that published models have."""
_WHERE = "copy them from the model that this one was trained from"
_BESIDE_VOCABULARY = (CONFIG, "merges.txt", "added_tokens.json", "special_tokens_map.json")
_ROWS_READ = 256
_SHOWN_CHARACTERS = 60


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def bos_token(self) -> str | None:
        """Text of the begin token."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end token."""

    def get_vocab(self) -> Mapping[str, int]:
        """Token -> id, added tokens included."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to ids."""

    @property
    def chat_template(self) -> Any:
        """The chat template, or several by name; None where there is none."""

    def get_chat_template(self) -> str:
        """The chat template's text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Messages to text."""


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
            f"{folder / 'config.json'}: has no vocab_size, the number of rows of the embedding; fetch it again"
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


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (token -> id, added tokens included): equal digests, equal meaning of token ids."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


def chat_template_digest(folder: Path) -> str | None:
    """SHA-256 of a Hugging Face folder's chat templates, as text; None where it has none."""
    found: dict[str, Any] = {}
    for path in sorted([*folder.glob("chat_template.*"), *folder.glob("additional_chat_templates/*")]):
        found[path.name] = path.read_text()
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    if template is not None:
        found[config.name] = template
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else None


def check_rollouts(rollouts: Rollouts, source: Path | str, hf_folder: Path, tokenizer: Any = None) -> str | None:
    """Compares the tokenizer that made the rollouts' token ids with that of the model that reads them.

    Only what an id means is compared (`tokenizer_digest`), not templates, padding or other settings.

    Args:
        rollouts: read from `source`.
        source: what messages call them.
        hf_folder: the model's configuration and tokenizer.
        tokenizer: of that folder, where it is loaded already.

    Returns:
        What people should know where nothing can be compared: the rollouts record no tokenizer, or the model has none.

    Raises:
        RolloutError: the tokenizers differ; names both, and a rollout that they read differently.
        CheckpointError: the model's tokenizer can't be loaded.
    """
    recorded = rollouts.tokenizer_digest
    if recorded is None:
        return f"{source}: records no tokenizer, so nothing tells whether its token ids are those of {hf_folder}"
    if tokenizer is None and not has_tokenizer(hf_folder):
        return f"{hf_folder}: holds no tokenizer, so nothing tells whether the token ids of {source} are the model's"
    tokenizer = tokenizer or load_tokenizer(hf_folder)
    own = tokenizer_digest(tokenizer)
    if own == recorded:
        return None
    raise RolloutError(
        f"{source}: was made with another tokenizer (digest {recorded[:12]}) than that of {hf_folder} (digest "
        f"{own[:12]}, {len(tokenizer.get_vocab())} tokens), so that token ids mean different things. "
        f"{_difference(rollouts, tokenizer)}. Sample from this model, or import the text again with --tokenizer and "
        "this folder"
    )


def check_policies(name: str, folder: Path, base: Path) -> None:
    """Raises `CheckpointError` where a policy's tokenizer gives ids another meaning than the base's."""
    if not same_vocabulary(folder, base):
        raise CheckpointError(
            f"policy {name!r} {folder} has another tokenizer than the base {base} (the vocabularies differ): their "
            "token ids mean different things; give a policy that was trained from this base"
        )


def same_vocabulary(a: Path, b: Path) -> bool:
    """Whether the tokenizers of two folders give ids one meaning. Files that are copies are not loaded.

    Raises:
        CheckpointError: the files differ, and a tokenizer can't be loaded.
    """
    return _tokenizer_bytes(a) == _tokenizer_bytes(b) or (
        tokenizer_digest(load_tokenizer(a)) == tokenizer_digest(load_tokenizer(b))
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer, whole or not."""
    return bool(vocabulary_files(folder)) or (folder / CONFIG).is_file()


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


def _tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    paths = [*vocabulary_files(folder), *(folder / name for name in _BESIDE_VOCABULARY)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _difference(rollouts: Rollouts, tokenizer: Any) -> str:
    """Where this tokenizer reads something else than the text that a rollout records, or that no text tells."""
    for i in range(min(len(rollouts), _ROWS_READ)):
        for what, text, ids in (
            ("response", rollouts.response_text(i), rollouts.response_tokens(i)),
            ("prompt", rollouts.prompt_text(i), rollouts.prompt_tokens(i)),
        ):
            try:
                read = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
            except Exception as error:  # whatever a tokenizer raises for an id that it doesn't have
                return f"The first that can't be read is the {what} of {rollouts.location(i)} ({error})"
            if text and text.strip() not in read:  # a chat template puts a prompt's text between others
                return (
                    f"The first that they read differently is the {what} of {rollouts.location(i)}: "
                    f"{_where_differing(text.strip(), read.strip())}"
                )
    return "No text tells where: the vocabularies may differ in tokens that these rollouts don't hold"


def _where_differing(recorded: str, read: str) -> str:
    pairs = enumerate(zip(recorded, read, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(recorded), len(read)))
    start = max(0, at - _SHOWN_CHARACTERS // 2)
    here = slice(start, start + _SHOWN_CHARACTERS)
    return f"{recorded[here]!r} was recorded, this tokenizer reads {read[here]!r}"
