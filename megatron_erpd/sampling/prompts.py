"""Prompts: a JSON-lines file or a generated reasoning-gym task, as records and as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast
from urllib.parse import parse_qsl

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.math_answers import MATH_VERIFY, answer_text

REASONING_GYM = "reasoning-gym:"
_FIELDS = ("prompt", "answer", "metadata")


class PromptRecord(TypedDict):
    """One prompt.

    `prompt` is text, or a chat as a list of `{"role", "content"}`; `answer` is whatever the verifier compares with
    (None where it needs none); `metadata` is a JSON object that travels with the rollouts.
    """

    prompt: str | list[dict[str, str]]
    answer: Any
    metadata: dict[str, Any]


def load_prompts(
    source: str | Path, limit: int | None = None, first: int = 0, verifier: str | None = None
) -> list[PromptRecord]:
    """Reads prompts.

    Args:
        source: a file of JSON lines with `prompt` and, where wanted, `answer` and `metadata`; or
            `reasoning-gym:TASK?size=100&seed=1&...`, whose further options are those of the task. Its seed is 0 where
            none is given, so the same text always means the same prompts.
        limit: keep so many.
        first: keep those from this one on (counted from 0), and after the last one the first again. Where `limit` keeps
            all of them anyway it changes nothing.
        verifier: what will score the responses; an answer that it can't compare with is refused.

    Raises:
        RecipeError: no such file or task, a line that isn't a prompt, or an answer the verifier can't compare with;
            the message names the line or the option.
    """
    text = str(source)
    records = _generated(text) if text.startswith(REASONING_GYM) else _from_file(Path(source))
    if not records:
        raise RecipeError(f"{source}: holds no prompts")
    if verifier == MATH_VERIFY:
        for number, record in enumerate(records, start=1):
            try:
                answer_text(record["answer"])
            except ValueError as error:
                raise RecipeError(f"{place_of(record, number)}: {error}") from None
    if limit is None or limit >= len(records):
        return records
    start = first % len(records)
    return (records + records)[start : start + limit]


def encode_prompts(tokenizer: Any, records: Sequence[PromptRecord], chat_template: bool = False) -> list[list[int]]:
    """Token ids of every prompt.

    Text is encoded with the tokenizer's own special tokens (usually BOS). With `chat_template` it becomes the user's
    message of a chat that ends where the assistant's answer begins; a prompt that is a chat already needs this.

    Raises:
        RecipeError: the tokenizer has no chat template, or a chat is given without asking for one.
    """
    if not chat_template:
        for index, record in enumerate(records):
            if not isinstance(record["prompt"], str):
                raise RecipeError(f"prompt {index} is a list of messages; set chat_template to true")
        return [[int(token) for token in tokenizer.encode(record["prompt"])] for record in records]
    if not tokenizer.chat_template:
        raise RecipeError(
            "chat_template is true, but the tokenizer has no chat template; set it to false, or add a "
            "chat_template.jinja to the model's folder"
        )
    return [
        [
            int(token)
            for token in tokenizer.apply_chat_template(
                _messages(record), tokenize=True, add_generation_prompt=True, return_dict=False
            )
        ]
        for record in records
    ]


def prompt_text(record: PromptRecord) -> str:
    """The prompt for people to read: the text itself, or the chat's messages one after another."""
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def place_of(record: PromptRecord, number: int) -> str:
    """Where a record was read, as `file: line 3`; `prompt {number}` for one that comes from no file."""
    return getattr(record, "place", f"prompt {number}")


def prompts_digest(records: Sequence[PromptRecord]) -> str:
    """SHA-256 of the records, in order."""
    return hashlib.sha256(json.dumps(list(records), sort_keys=True, default=str).encode()).hexdigest()


class _Placed(dict[str, Any]):
    """A record, equal to a plain one, that knows where it was read."""

    place: str


def _placed(record: PromptRecord, place: str) -> PromptRecord:
    found = _Placed(record)
    found.place = place
    return cast(PromptRecord, found)


def _messages(record: PromptRecord) -> list[dict[str, str]]:
    prompt = record["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _from_file(path: Path) -> list[PromptRecord]:
    if not path.is_file():
        raise RecipeError(
            f"{path}: no such file; give JSON lines with 'prompt' and 'answer', or {REASONING_GYM}TASK?size=100&seed=1"
        )
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(_parse_line(line, f"{path}: line {number}"))
    return records


def _parse_line(line: str, place: str) -> PromptRecord:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{place}: isn't JSON ({error}); write one JSON object per line") from None
    if not isinstance(value, dict) or "prompt" not in value:
        raise RecipeError(f'{place}: has no \'prompt\'; write {{"prompt": ..., "answer": ...}}')
    unknown = sorted(value.keys() - set(_FIELDS))
    if unknown:
        raise RecipeError(f"{place}: {unknown[0]!r} isn't one of {', '.join(_FIELDS)}; put it under 'metadata'")
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise RecipeError(f"{place}: metadata is a {type(metadata).__name__}, expected a JSON object")
    prompt = _checked_prompt(value["prompt"], place)
    return _placed(PromptRecord(prompt=prompt, answer=value.get("answer"), metadata=metadata), place)


def _checked_prompt(prompt: Any, place: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt:
        return prompt
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not prompt or not is_chat:
        raise RecipeError(f"{place}: prompt must be text or a list of {{'role', 'content'}} messages, and not empty")
    return prompt


def _generated(spec: str) -> list[PromptRecord]:
    """Records of `reasoning-gym:TASK?option=value&...`."""
    task, _, query = spec.removeprefix(REASONING_GYM).partition("?")
    options: dict[str, Any] = {"seed": 0}
    for name, value in parse_qsl(query, keep_blank_values=True):
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    dataset_type = reasoning_gym_task(task)
    try:
        dataset = dataset_type(**options)
    # A task's configuration checks itself with assertions and knows its options by its constructor.
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"{spec}: the task refuses its options: {error}") from error
    return [
        PromptRecord(prompt=entry["question"], answer=entry["answer"], metadata=entry["metadata"]) for entry in dataset
    ]


def reasoning_gym_task(task: str) -> Any:
    """A function from options to the data set of a reasoning-gym task; `RecipeError` for an unknown task."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RecipeError(f"{REASONING_GYM}{task}: reasoning-gym isn't installed; pip install reasoning-gym") from error
    if task not in DATASETS:
        near = [name for name in sorted(DATASETS) if task and (task in name or name in task)]
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(DATASETS)}, such as chain_sum"
        raise RecipeError(f"{REASONING_GYM}{task}: there is no task {task!r}; {hint}")
    return lambda **options: reasoning_gym.create_dataset(task, **options)
