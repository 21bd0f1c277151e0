"""Whether policies can be compared token by token: one architecture, one vocabulary, one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_erpd.checkpoint.hf_config import model_flags
from megatron_erpd.errors import CheckpointError

_MAY_DIFFER = ("max_position_embeddings",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")


def check_compatible(policies: Mapping[str, Path]) -> None:
    """Every policy must be readable as the base is: all are built from the base's configuration and see its tokens.

    Args:
        policies: name to artifact, `base` among them; each holds `hf/`.

    Raises:
        CheckpointError: a policy has another vocabulary size (padding rows follow from it), another architecture or
            another tokenizer than the base; names both folders and what differs.
    """
    base = policies["base"]
    expected = model_flags(base / "hf")
    for name, folder in policies.items():
        if folder == base:
            continue
        found = model_flags(folder / "hf")
        # The vocabulary first: it is what most often differs, and the reason for many other differences.
        for key in sorted(expected, key=lambda key: key != "vocab_size"):
            if key not in _MAY_DIFFER and found.get(key) != expected[key]:
                raise CheckpointError(
                    f"policy {name!r} {folder} has {key} {found.get(key)}, the base {base} has {expected[key]}: their "
                    "log-probs can't be compared; give a policy that was trained from this base"
                )
        _check_tokenizer(name, folder, base)


def _check_tokenizer(name: str, folder: Path, base: Path) -> None:
    ours, theirs = folder / "hf", base / "hf"
    if _tokenizer_bytes(ours) == _tokenizer_bytes(theirs):
        return  # copies, as every stage passes them on: nothing to load
    for path, other in ((ours, theirs), (theirs, ours)):
        if not _tokenizer_bytes(path):
            raise CheckpointError(
                f"policy {name!r}: {path} holds no tokenizer and {other} does, so nothing tells whether their token "
                "ids mean the same; import it from a folder with its tokenizer"
            )
    from megatron_erpd.data.tokenizers import tokenizer_digest
    from megatron_erpd.sampling.policy import load_tokenizer

    if tokenizer_digest(load_tokenizer(ours)) != tokenizer_digest(load_tokenizer(theirs)):
        raise CheckpointError(
            f"policy {name!r} {folder} has another tokenizer than the base {base} (the vocabularies differ): their "
            "token ids mean different things; give a policy that was trained from this base"
        )


def _tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
