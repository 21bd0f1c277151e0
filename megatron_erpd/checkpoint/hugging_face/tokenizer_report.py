"""Whether a folder's tokenizer fits its model, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.model_folder import vocabulary_files
from megatron_erpd.sources.tokenizer import CONFIG, chat_template_digest, embedding_rows, load_tokenizer, read_object


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
        CheckpointError: from `load_tokenizer`.
    """
    if not vocabulary_files(folder) and not (folder / CONFIG).is_file():
        return None
    tokenizer = load_tokenizer(folder)
    return TokenizerReport(
        num_tokens=max(tokenizer.get_vocab().values()) + 1,
        num_rows=embedding_rows(folder),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        stop=stop_ids(folder),
        has_chat_template=chat_template_digest(folder) is not None,
    )


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a generation by `generation_config.json`, in its order; none where it names none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    found = read_object(path).get("eos_token_id")
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)
