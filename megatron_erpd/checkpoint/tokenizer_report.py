"""Whether a folder's tokenizer fits its model, and what it brings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.data.tokenizers import chat_template_digest
from megatron_erpd.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""Any of these makes a folder one with a tokenizer."""


@dataclass(frozen=True)
class TokenizerReport:
    """What `describe_tokenizer` found.

    Attributes:
        num_tokens: ids that the tokenizer can give: the largest and 1, added tokens included.
        num_rows: of the embedding, by `config.json`.
        bos, eos, pad: ids, None where there is none.
        stop: ids that end a generation by `generation_config.json`, in its order.
        has_chat_template: in `tokenizer_config.json` or a file of its own.
    """

    num_tokens: int
    num_rows: int
    bos: int | None
    eos: int | None
    pad: int | None
    stop: tuple[int, ...]
    has_chat_template: bool

    def __str__(self) -> str:
        spare = self.num_rows - self.num_tokens
        rows = f"{self.num_rows:,} rows of the embedding" + (f", {spare:,} of them without a token" if spare else "")
        special = ", ".join(
            f"{name} {value}" for name, value in (("bos", self.bos), ("eos", self.eos), ("pad", self.pad))
        )
        stop = f"; a generation ends at {', '.join(map(str, self.stop))}" if self.stop else ""
        template = "a" if self.has_chat_template else "no"
        return f"tokenizer: {self.num_tokens:,} tokens, {rows}; {special}{stop}; {template} chat template"


def describe_tokenizer(folder: Path) -> TokenizerReport | None:
    """A Hugging Face folder's tokenizer beside its configuration; None where there is no tokenizer.

    Nothing of the folder is executed: a tokenizer that needs code of its own is refused.

    Raises:
        CheckpointError: the tokenizer can't be loaded, or it gives an id that the embedding has no row for.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, by the kind of tokenizer and what is wrong with it
        raise CheckpointError(
            f"{folder}: its tokenizer can't be loaded ({type(error).__name__}: {error}); fetch its files again, or "
            f"leave all of {', '.join(TOKENIZER_FILES)} out"
        ) from error
    num_rows = _embedding_rows(folder)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= num_rows:
        raise CheckpointError(
            f"{folder}: its tokenizer gives token {token!r} the id {largest}, config.json says vocab_size {num_rows}; "
            "take the tokenizer that belongs to these weights, or resize the model's embedding to it"
        )
    return TokenizerReport(
        num_tokens=largest + 1,
        num_rows=num_rows,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        stop=_stop_ids(folder),
        has_chat_template=chat_template_digest(folder) is not None,
    )


def _embedding_rows(folder: Path) -> int:
    path = folder / "config.json"
    config = _read(path)
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(rows, int) or rows < 1:
        raise CheckpointError(f"{path}: has no vocab_size, so nobody knows the rows of the embedding; fetch it again")
    return rows


def _stop_ids(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    found = _read(path).get("eos_token_id")
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch it again")
    return values
