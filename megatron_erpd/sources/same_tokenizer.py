"""Whether rollouts and a model mean the same by a token id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CheckpointError, RolloutError
from megatron_erpd.model_folder import vocabulary_files
from megatron_erpd.sources.tokenizer import CONFIG, load_tokenizer
from megatron_erpd.sources.tokenizers import tokenizer_digest

_BESIDE_VOCABULARY = (CONFIG, "merges.txt", "added_tokens.json", "special_tokens_map.json")
_ROWS_READ = 256
_SHOWN_CHARACTERS = 60


def check_rollouts(rollouts: Rollouts, source: Path | str, hf_folder: Path, tokenizer: Any = None) -> str | None:
    """Compares the tokenizer that made the rollouts' token ids with that of the model that reads them.

    Only what an id means is compared (`data.tokenizers.tokenizer_digest`), not templates, padding or other settings.

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
