"""Conversations: what a prompt and a response may be, and how they become token ids.

Sampling, evaluation, selection, training on the policy's own rollouts and imports all ask here, so that the same row
gives the same tokens everywhere. Nothing of a conversation is left out silently: what the chat template doesn't
render, or renders as something else, is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_erpd.data.schema import RowProblem
from megatron_erpd.settings import TemplateSettings
from megatron_erpd.sources.chat_template import ChatTemplate
from megatron_erpd.sources.tokenizer import Tokenizer

Message = dict[str, Any]

_ASSISTANT = "assistant"
_SYSTEM = ("system", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what the model wrote before its answer; transformers shows a template one under the names of the others."""
_KEYS = ("role", "content", *_REASONING, "tool_calls", "tool_call_id", "name")
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content)\1\s*:\s*['"\[]""")
"""As JSON and Python write a list of messages."""
_OPENING = re.compile(r"(<[^<>/\s]+>)(\s*)$")
_FIRST_TAG = re.compile(r"\s*(<[^<>/\s]+>)")
_MARK = "\u2983erpd\u2984"
"""Stands for a text to see where a template puts it."""


def checked_messages(value: Any, field: str) -> list[Message]:
    """A conversation with every content as text: that of several text parts is joined.

    Args:
        value: as a source has it. Keys without a value (null, or an empty list) count as not there.
        field: what it is of, for the error.

    Raises:
        RowProblem: it is no list of messages with a role and text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise RowProblem("malformed", field, "must be text or a list of {'role', 'content'} messages, and not empty")
    return [_checked_message(message, number, field) for number, message in enumerate(value, start=1)]


def refuse_written_messages(value: Any, field: str) -> None:
    """Raises `RowProblem` for text that is a list of messages, written out: the model would be shown brackets."""
    if not isinstance(value, str) or not _WRITTEN.match(value):
        return
    detail = "is the text of a list of messages; give the list itself, as JSON lines or Parquet have it"
    raise RowProblem("malformed", field, detail)


def _checked_message(message: Any, number: int, field: str) -> Message:
    def refuse(detail: str) -> RowProblem:
        return RowProblem("malformed", field, f"message {number} {detail}")

    if not isinstance(message, Mapping):
        raise refuse(f"is a {type(message).__name__}; messages are objects with 'role' and 'content'")
    found = {key: value for key, value in message.items() if not _nothing(value)}
    unknown = [key for key in found if key not in _KEYS]
    if unknown:
        raise refuse(f"has the key {unknown[0]!r}, which nothing reads; a message has {', '.join(_KEYS)}")
    if not isinstance(found.get("role"), str) or not found["role"]:
        raise refuse(f"has no role but {message.get('role')!r}; write system, user, assistant or tool")
    reasoning = {str(found[key]) for key in _REASONING if key in found}
    if len(reasoning) > 1:
        raise refuse(f"has {' and '.join(key for key in _REASONING if key in found)}, which differ; keep one")
    for key in (*_REASONING, "tool_call_id", "name"):
        if key in found and not isinstance(found[key], str):
            raise refuse(f"has a {type(found[key]).__name__} as {key}, expected text")
    calls = found.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise refuse("has tool_calls that are no list of objects")
    content = message.get("content")
    if content is None and calls:
        content = ""  # as chat APIs write a message that only calls tools
    return {**found, "content": _text(content, refuse, "content" in message)}


def _text(content: Any, refuse: Any, given: bool) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        what = ("null" if content is None else f"a {type(content).__name__}") if given else "missing"
        what = "an empty list" if content == [] else what
        raise refuse(f"has no text: its content is {what}; write text, or a list of text parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        found = {k: v for k, v in part.items() if not _nothing(v)} if isinstance(part, Mapping) else {}
        if found.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = found.get("type", type(part).__name__)
            raise refuse(f"has a part of its content that isn't text ({kind!r}); only {_TEXT_PARTS[0]!r} parts can be")
        other = [key for key in found if key not in ("type", "text")]
        if other:
            raise refuse(f"has a text part with the key {other[0]!r}, which nothing reads; remove it")
        texts.append(part["text"])
    return "".join(texts)


def _nothing(value: Any) -> bool:
    """Whether a key says nothing: columns of Parquet files and chat APIs give every message all keys."""
    return value is None or (isinstance(value, list | dict | str) and not value)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model sees it: its text, token ids, and the messages behind them where there are any."""

    text: str
    ids: list[int]
    messages: list[Message] | None = None


class Chat:
    """How conversations become token ids, for one tokenizer and its chat template.

    Args:
        tokenizer: the base model's.
        settings: what the template is given besides the messages.

    Attributes:
        repeated_openings: how many responses began with the tag that the template had ended their prompt with.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TemplateSettings | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or TemplateSettings()
        self.repeated_openings = 0
        self._rendered_parts: dict[Any, list[bool] | None] = {}

    @cached_property
    def template(self) -> ChatTemplate:
        """Read when it is first needed: text alone needs none. Raises `RecipeError` for one that can't be used."""
        return ChatTemplate(self.tokenizer, self.settings)

    def prompt(self, prompt: str | Sequence[Any], *, user_message: bool) -> EncodedPrompt:
        """A prompt as the model would see it.

        Args:
            prompt: text, or a list of messages, which always goes through the chat template. Where the last message is
                the assistant's, it is the beginning of the response and is continued.
            user_message: put text into the chat template as a user's message.

        The tokenizer's own begin tokens are added to text that doesn't carry them; a template writes its own.

        Raises:
            RowProblem: the prompt can't be rendered, or not all of it.
            RecipeError: the template or its settings can't be used, whatever the prompt.
        """
        if isinstance(prompt, str) and not user_message:
            given = self.settings.given
            if given:
                detail = f"is text that goes through no chat template, and {given[0]} would have no effect; put it into"
                raise RowProblem("malformed", "prompt", f"{detail} a user's message, or leave {given[0]} out")
            bos = self.tokenizer.bos_token
            has_bos = bool(bos) and prompt.startswith(str(bos))
            return EncodedPrompt(prompt, list(self.tokenizer.encode(prompt, add_special_tokens=not has_bos)))
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = self._with_system_prompt(checked_messages(prompt, "prompt"))
        text = self._render_prompt(messages, "prompt")
        self._refuse_dropped_contents(messages)
        for i, message in enumerate(messages):
            for key in _extra_keys(message):
                if key in ("tool_call_id", "name") and _answers_in_order(messages, i):
                    continue  # it says what the place says: which call was answered
                self._refuse_dropped_key(messages, i, key, text)
        return EncodedPrompt(text, list(self.tokenizer.encode(text, add_special_tokens=False)), messages)

    def response(
        self, response: str | Sequence[Any], prompt: EncodedPrompt | None, *, append_eos: bool
    ) -> tuple[str, list[int]]:
        """A response's text and token ids.

        Args:
            response: text, or a list holding the one assistant message. Reasoning and tool calls are what the chat
                template makes of them.
            prompt: what it answers, where that was encoded here.
            append_eos: end it with the end token, which decoded text has lost and which the model must learn to give.

        Raises:
            RowProblem: it isn't one message of the assistant, or the template doesn't render all of it.
        """
        if not isinstance(response, str):
            messages = checked_messages(response, "response")
            if len(messages) != 1:
                detail = f"{len(messages)} messages; a response is a single one (no other turns)"
                raise RowProblem("malformed", "response", detail)
            [message] = messages
            if message["role"] != _ASSISTANT:
                detail = f"is a message of the role {message['role']!r}; a response is the assistant's"
                raise RowProblem("malformed", "response", detail)
            response = self._render_response(message, prompt) if _extra_keys(message) else message["content"]
        assert isinstance(response, str)
        response = self._without_repeated_opening(response, prompt)
        ids = list(self.tokenizer.encode(response, add_special_tokens=False))
        eos = self.tokenizer.eos_token_id
        if ids and append_eos and eos is not None and ids[-1] != eos:
            ids.append(eos)
        return response, ids

    def _without_repeated_opening(self, response: str, prompt: EncodedPrompt | None) -> str:
        """Templates of reasoning models end the prompt with `<think>`, and other programs write it before the response:
        twice is a text that no model was sampled from."""
        opening = _OPENING.search(prompt.text) if prompt is not None and prompt.messages is not None else None
        if opening is None or not response.lstrip().startswith(opening[1]):
            return response
        self.repeated_openings += 1
        return response.lstrip().removeprefix(opening[1]).removeprefix(opening[2])

    def _with_system_prompt(self, messages: list[Message]) -> list[Message]:
        if self.settings.system_prompt is None:
            return messages
        if messages[0]["role"] in _SYSTEM:
            detail = "begins with a system message of its own, and system_prompt gives another; remove one of them"
            raise RowProblem("malformed", "prompt", detail)
        return [{"role": "system", "content": self.settings.system_prompt}, *messages]

    def _render_prompt(self, messages: list[Message], field: str) -> str:
        """Up to where the response begins."""
        *before, last = messages
        if last["role"] != _ASSISTANT:
            return self.template.render(messages, field, generation=True)
        if "tool_calls" in last:
            raise RowProblem("malformed", field, "ends with tool calls of the assistant, which can't be continued")
        marked = {**last, "content": last["content"] + _MARK}
        text, mark, _ = self.template.render([*before, marked], field, generation=False).partition(_MARK)
        if not mark or not text.endswith(last["content"]):
            detail = "ends with the beginning of the assistant's answer, which the chat template writes as another text"
            raise RowProblem("malformed", field, f"{detail}; leave it out, or put it into the text as it is to be")
        first = _FIRST_TAG.match(last["content"])
        rendered = self.template.render(before, field, generation=False) if first and before else None
        head = text.removesuffix(last["content"])
        if first and rendered is not None and head.startswith(rendered) and first[1] in head[len(rendered) :]:
            detail = f"ends with an answer that begins with {first[1]}, which the chat template writes before it too"
            raise RowProblem("malformed", field, f"{detail}; put the whole conversation into the text as it is to be")
        return text

    def _refuse_dropped_contents(self, messages: list[Message]) -> None:
        """Looks for each message's content in what the template makes of such a conversation."""
        shape = tuple((message["role"], *sorted(message)) for message in messages)
        if shape not in self._rendered_parts:
            marked = [{**message, "content": f"{_MARK}{i}."} for i, message in enumerate(messages)]
            try:
                text = self._render_prompt(marked, "prompt")
            except RowProblem:
                self._rendered_parts[shape] = None  # it looks at the contents; each prompt is looked at then
            else:
                self._rendered_parts[shape] = [f"{_MARK}{i}." in text for i in range(len(messages))]
        rendered = self._rendered_parts[shape]
        if rendered is None:
            text = self._render_prompt(messages, "prompt")
            rendered = [message["content"].strip() in text for message in messages]
        for number, (message, found) in enumerate(zip(messages, rendered, strict=True), start=1):
            if message["content"].strip() and not found:
                detail = f"message {number} (role {message['role']!r}) isn't in what the chat template renders"
                raise RowProblem("malformed", "prompt", f"{detail}; remove it, or take a template that renders it")

    def _refuse_dropped_key(self, messages: list[Message], i: int, key: str, text: str) -> None:
        if self._changes(messages, i, key, text):
            return
        # Templates of reasoning models leave the reasoning of earlier turns out: that is what the model was trained on.
        earlier = messages[: i + 1]
        if key in _REASONING and i + 1 < len(messages):
            last = self._try_render(earlier)
            if last is not None and self._changes(earlier, i, key, last):
                return
        detail = f"message {i + 1} has {key}, which the chat template doesn't render; remove it"
        raise RowProblem("malformed", "prompt", f"{detail}, or take a template that does")

    def _changes(self, messages: list[Message], i: int, key: str, text: str) -> bool:
        """Whether the template makes another text than this without the key of message i."""
        gone = _REASONING if key in _REASONING else (key,)
        left = {name: value for name, value in messages[i].items() if name not in gone}
        return self._try_render([*messages[:i], left, *messages[i + 1 :]]) != text

    def _try_render(self, messages: list[Message]) -> str | None:
        try:
            return self._render_prompt(messages, "prompt")
        except RowProblem:
            return None

    def _render_response(self, message: Message, prompt: EncodedPrompt | None) -> str:
        """What the template renders behind the prompt for a message with more than content, without its end."""
        keys = ", ".join(_extra_keys(message))
        if prompt is None or prompt.messages is None or prompt.messages[-1]["role"] == _ASSISTANT:
            where = (
                "the beginning of a message" if prompt is not None and prompt.messages else "a prompt without messages"
            )
            detail = f"has {keys} behind {where}, where no chat template can put it"
            raise RowProblem("malformed", "response", f"{detail}; write the whole response as text")
        before = prompt.messages

        def render(answer: Message) -> str:
            return self.template.render([*before, answer], "response", generation=False)

        text = render(message)
        for key in _extra_keys(message):
            gone = _REASONING if key in _REASONING else (key,)
            if render({name: value for name, value in message.items() if name not in gone}) == text:
                detail = f"has {key}, which the chat template doesn't render; write the whole response as text"
                raise RowProblem("malformed", "response", detail)
        _, mark, end = render({"role": _ASSISTANT, "content": _MARK}).partition(_MARK)
        body = text.removeprefix(prompt.text).removesuffix(end)
        whole = mark and len(prompt.text) + len(body) + len(end) == len(text)
        if not whole or not body or message["content"].strip() not in body:
            detail = f"has {keys}; the chat template's text for it doesn't begin where the prompt ends, or lacks a part"
            raise RowProblem("malformed", "response", f"{detail}; write the whole response as text")
        return body


def _answers_in_order(messages: list[Message], i: int) -> bool:
    """Whether message i is a tool's, and is to the calls before it what its place among the tools' messages says."""
    if messages[i]["role"] != "tool":
        return False
    calls = [call for message in messages[:i] for call in message.get("tool_calls", [])]
    place = sum(message["role"] == "tool" for message in messages[:i])
    if place >= len(calls):
        return False
    function = calls[place].get("function", calls[place])
    name = function.get("name") if isinstance(function, Mapping) else None
    of_call = {"tool_call_id": calls[place].get("id"), "name": name}
    return all(messages[i][key] == value for key, value in of_call.items() if key in messages[i])


def _extra_keys(message: Message) -> list[str]:
    return [key for key in message if key not in ("role", "content")]
