"""What the project asks of a tokenizer, for sources that have text only."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_erpd.data.schema import RowProblem

Messages = Sequence[Mapping[str, Any]]


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

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
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


def encode_prompt(prompt: str | Messages, tokenizer: Tokenizer, *, user_message: bool) -> tuple[str, list[int]]:
    """A prompt as the model would see it.

    Args:
        prompt: text, or a list of messages, which always goes through the chat template.
        tokenizer: the base model's.
        user_message: put plain text into the chat template as a user's message.

    Returns:
        (text, token ids). The tokenizer's own begin tokens are added to plain text that doesn't carry them.
    """
    if isinstance(prompt, str) and user_message:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        try:
            # tokenize=False: what tokenize=True returns differs between versions of transformers.
            text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever they like on messages they don't know
            raise RowProblem("malformed", "prompt", f"the chat template refuses it ({error})") from error
        return text, list(tokenizer.encode(text, add_special_tokens=False))
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return prompt, list(tokenizer.encode(prompt, add_special_tokens=not has_bos))


def encode_response(response: str | Messages, tokenizer: Tokenizer, *, append_eos: bool) -> tuple[str, list[int]]:
    """A response's text and token ids.

    Args:
        response: text, or a list holding the one assistant message.
        tokenizer: the base model's.
        append_eos: end it with the end token, which decoded text has lost and which the model must learn to give.
    """
    if not isinstance(response, str):
        messages = list(response)
        if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
            detail = f"{len(messages)} messages; a response must be a single text message (no tool calls, no turns)"
            raise RowProblem("malformed", "response", detail)
        response = messages[0]["content"]
    assert isinstance(response, str)
    ids = list(tokenizer.encode(response, add_special_tokens=False))
    eos = tokenizer.eos_token_id
    if ids and append_eos and eos is not None and ids[-1] != eos:
        ids.append(eos)
    return response, ids
