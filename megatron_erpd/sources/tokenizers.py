"""What the project asks of a tokenizer, and what tells two of them apart."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


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
