"""Prompts: rows of a file, folder or data set, or a generated reasoning-gym task, as records and as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast
from urllib.parse import parse_qsl

from megatron_erpd.errors import RecipeError, RolloutError
from megatron_erpd.sampling.math_answers import MATH_VERIFY, answer_text
from megatron_erpd.settings import ChatSettings

REASONING_GYM = "reasoning-gym:"
_FIELDS = ("prompt", "answer", "metadata")


class PromptRecord(TypedDict):
    """One prompt.

    `prompt` is text, or a chat as a list of `{"role", "content"}`; `answer` is whatever the verifier compares with
    (None where it needs none); `metadata` is a JSON object that travels with the rollouts.
    """

    prompt: str | list[dict[str, Any]]
    answer: Any
    metadata: dict[str, Any]


def load_prompts(
    source: str | Path, limit: int | None = None, first: int = 0, verifier: str | None = None
) -> list[PromptRecord]:
    """Reads prompts.

    Args:
        source: a file, folder or data set of the hub (`sources/files.py`) whose rows have `prompt` and, where wanted,
            `answer` and `metadata`; with `?prompt=question&answer=solution` behind it, rows that call them so, whose
            other fields become metadata. Or `reasoning-gym:TASK?size=100&seed=1&...`, whose further options are those
            of the task. Its seed is 0 where none is given, so the same text always means the same prompts.
        limit: keep so many.
        first: keep those from this one on (counted from 0), and after the last one the first again. Where `limit` keeps
            all of them anyway it changes nothing.
        verifier: what will score the responses; an answer that it can't compare with is refused.

    Raises:
        RecipeError: no such file or task, a line that isn't a prompt, or an answer the verifier can't compare with;
            the message names the line or the option.
    """
    text = str(source)
    records = _generated(text) if text.startswith(REASONING_GYM) else _from_source(text)
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


def encode_prompts(
    tokenizer: Any, records: Sequence[PromptRecord], settings: ChatSettings | None = None
) -> list[list[int]]:
    """Token ids of every prompt, as `data.chat.Chat` makes them.

    Text is encoded with the tokenizer's own special tokens (usually BOS). With `chat_template` it becomes the user's
    message of a chat that ends where the assistant's answer begins; a prompt that is a chat already needs this.

    Raises:
        RecipeError: the tokenizer has no chat template, or one that refuses a prompt or doesn't render all of it, or a
            chat is given without asking for one; the message names the row.
    """
    from megatron_erpd.data.schema import RowProblem
    from megatron_erpd.sources.chat import Chat

    settings = settings or ChatSettings()
    chat, encoded = Chat(tokenizer, settings), []
    for number, record in enumerate(records, start=1):
        prompt, place = record["prompt"], place_of(record, number)
        if not settings.chat_template and not isinstance(prompt, str):
            raise RecipeError(f"{place}: the prompt is a list of messages; set chat_template to true")
        try:
            encoded.append(chat.prompt(prompt, user_message=settings.chat_template).ids)
        except RowProblem as problem:
            raise RecipeError(f"{place}: {problem}") from problem
    return encoded


def prompt_text(record: PromptRecord) -> str:
    """The prompt for people to read: the text itself, or the chat's messages one after another."""
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def place_of(record: PromptRecord, number: int) -> str:
    """Where a record was read, as `file:3`; `prompt {number}` for one that comes from no file."""
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


def _from_source(text: str) -> list[PromptRecord]:
    from megatron_erpd.data.schema import RowProblem
    from megatron_erpd.sources.files import open_source
    from megatron_erpd.sources.rows import read_rows

    records = []
    try:
        source = open_source(text)
        unknown = sorted(source.fields.keys() - set(_FIELDS))
        if unknown:
            raise RecipeError(f"{text}: ?{unknown[0]}=... isn't one of {', '.join(_FIELDS)}")
        for path in source.files:
            for place, row in read_rows(path):
                if isinstance(row, RowProblem):
                    raise RecipeError(f"{place}: {row.detail}")
                records.append(_record(row, place, source.fields))
    except RolloutError as error:
        raise RecipeError(str(error)) from error
    return records


def _record(row: Mapping[str, Any], place: str, fields: Mapping[str, str]) -> PromptRecord:
    """A row as a record.

    Args:
        fields: our names to the row's; with any, the row's other fields become metadata.
    """
    from megatron_erpd.data.schema import RowProblem, check_storable
    from megatron_erpd.sources.field_map import MISSING, lookup
    from megatron_erpd.sources.rows import TextRow, parsed

    values = {name: lookup(row, fields.get(name, name)) for name in _FIELDS}
    if values["prompt"] is MISSING:
        wanted = fields.get("prompt", "prompt")
        hint = 'write {"prompt": ..., "answer": ...}, or say behind the source what it is called: ?prompt=question'
        raise RecipeError(f"{place}: has no {wanted!r} (it has {', '.join(map(repr, row)) or 'nothing'}); {hint}")
    missing = next((name for name in fields if values[name] is MISSING), None)
    if missing is not None:
        raise RecipeError(f"{place}: has no {fields[missing]!r}, which is to be the {missing}")
    used = {fields.get(name, name) for name in _FIELDS}
    others = {name: value for name, value in row.items() if name not in used}
    if others and not fields:
        hint = "put it under 'metadata', where ?prompt=NAME behind the source puts all that isn't named there"
        raise RecipeError(f"{place}: {min(others)!r} isn't one of {', '.join(_FIELDS)}; {hint}")
    answer, metadata = (None if values[name] is MISSING else values[name] for name in ("answer", "metadata"))
    try:
        if isinstance(row, TextRow):
            answer, metadata = answer or None, parsed(metadata, "metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise RecipeError(f"{place}: metadata is a {type(metadata).__name__}, expected a JSON object")
        # As JSON has it: Parquet and Arrow know dates and decimals besides.
        metadata = json.loads(json.dumps({**others, **(metadata or {})}, default=str))
        for name, value in (("prompt", values["prompt"]), ("answer", answer), ("metadata", metadata)):
            check_storable(value, name)
    except RowProblem as problem:
        raise RecipeError(f"{place}: {problem}") from problem
    except RecursionError:
        raise RecipeError(f"{place}: is nested too deeply") from None
    prompt = _checked_prompt(values["prompt"], place)
    return _placed(PromptRecord(prompt=prompt, answer=answer, metadata=metadata), place)


def _checked_prompt(prompt: Any, place: str) -> str | list[dict[str, Any]]:
    from megatron_erpd.data.schema import RowProblem
    from megatron_erpd.sources.chat import checked_messages, refuse_written_messages

    try:
        if isinstance(prompt, str) and prompt:
            refuse_written_messages(prompt, "prompt")
            return prompt
        return checked_messages(prompt, "prompt")
    except RowProblem as problem:
        raise RecipeError(f"{place}: {problem}") from None


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
