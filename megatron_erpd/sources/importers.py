"""Rollouts from other programs' files (`sources.py`): known formats by name, others by a field map.

Token ids are taken as they are. Text is encoded only where there are no ids, and the report says so: encoding decoded
text doesn't always give back the tokens that were sampled, and log-probs of other tokens are other log-probs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.data.rollouts import SampleNames, write_rollouts
from megatron_erpd.data.schema import (
    Rollout,
    RowProblem,
    check_record,
    check_storable,
    group_id_of,
    log_prob_array,
    reward_value,
    token_array,
    token_bytes,
)
from megatron_erpd.errors import RolloutError
from megatron_erpd.settings import ImportSettings
from megatron_erpd.sources.chat import Chat, EncodedPrompt, refuse_written_messages
from megatron_erpd.sources.field_map import FINISH_REASONS, NO_SAMPLE, PRESETS, FieldMap, finish_word
from megatron_erpd.sources.files import open_source
from megatron_erpd.sources.import_report import ImportReport, constant_groups, render, summary
from megatron_erpd.sources.rows import read_rows
from megatron_erpd.sources.tokenizer import Tokenizer, tokenizer_digest

__all__ = ["PRESETS", "ImportReport", "import_rollouts", "render", "try_rollouts"]

_TRIED_FILES = 8
NEAR_LONGEST = 0.98
"""Encoded text has not quite the tokens that were sampled: how near to the longest response counts as that long."""
RE_ENCODED_NOTE = (
    "Some token ids were made by encoding text. They may differ from the tokens that were sampled, which shifts "
    "log-probs; prefer a source that keeps token ids."
)


def import_rollouts(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    settings: ImportSettings | None = None,
    *,
    fields: Mapping[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> ImportReport:
    """Reads, checks and writes rollouts; the output appears only when all of it is good.

    Args:
        source: a file, a folder, a data set of the hub, or a list of these (see `files.py`).
        output: the Parquet file to write.
        settings: how rows are read and what becomes of bad ones; what the chat template is given goes into the file.
            A rollout whose tokens equal an earlier one's is another draw by default: dropping it would shift its
            group's mean. A `sample_id` that occurs twice is always rejected.
        fields: entries over the format's (see `field_map.py`): our name -> path in the source.
        tokenizer: the base model's; needed for sources without token ids. Its digest goes into the file, and ids beyond
            its largest are refused.

    Returns:
        What was accepted and rejected, and what the rollouts look like.

    Raises:
        RolloutError: a bad argument, a bad row (named by file, row and field), or nothing accepted.
    """
    settings = settings or ImportSettings()
    run = _Import(source, output, settings, fields, tokenizer)
    metadata: dict[str, Any] = {"imported_from": [path.name for path in run.files], "import_preset": settings.format}
    if tokenizer is not None:
        metadata["tokenizer_digest"] = tokenizer_digest(tokenizer)
    if settings.given:
        metadata["template"] = settings.model_dump(include=set(settings.given))
    write_rollouts(output, run.rollouts(), metadata, vocab_size=run.vocab_size)
    run.describe()
    return run.report


def try_rollouts(
    source: str | Path | Sequence[str | Path],
    num_rows: int,
    settings: ImportSettings,
    fields: Mapping[str, str],
    tokenizer: Tokenizer,
) -> tuple[int, str]:
    """Whether an import begins well: reads the first rows of the first files and writes nothing.

    Args:
        source, settings, fields, tokenizer: as in `import_rollouts`.
        num_rows: of each file.

    Returns:
        Length of the longest rollout among them, in tokens, and its place; 0 without any.

    Raises:
        RolloutError: as in `import_rollouts`; with `on_reject` 'error' for a bad row among these.
    """
    return _Import(source, "", settings, fields, tokenizer).try_rows(num_rows)


class _Excluded(Exception):
    """A sample that the framework which wrote it leaves out of its trainings, by the value of one of our fields."""

    def __init__(self, field_name: str, value: object) -> None:
        super().__init__(f"{field_name} {value}")
        self.field, self.value = field_name, value


@dataclass
class _Built:
    """A rollout, and what of it was made from text; `assumed_ended`: nothing known says whether it was cut off."""

    rollout: Rollout
    encoded_prompt: bool
    encoded_response: bool
    assumed_ended: bool


@dataclass
class _Builder:
    """Makes one rollout of mapped values."""

    chat: Chat | None
    settings: ImportSettings
    user_message: bool
    """Whether plain-text prompts go into the chat template as a user's message."""

    def build(self, values: Mapping[str, Any]) -> "_Built":
        """Raises `RowProblem`, and `_Excluded` for a sample that the other framework leaves out."""
        finish_reason = _finish_reason(values)
        _check_marks(values, finish_reason)
        reward = reward_value(values.get("reward"), "reward")
        if reward is None and not self.settings.allow_unverified:
            detail = "is missing or null; score the rollout, or pass allow_unverified to keep it as unverified"
            raise RowProblem("no_reward", "reward", detail)
        prompt_ids, response_ids = self._given_ids(values)
        prompt, response = values.get("prompt"), values.get("response")
        check_storable(prompt, "prompt")
        check_storable(response, "response")
        encoded_prompt, encoded_response = prompt_ids is None, response_ids is None
        encoded: EncodedPrompt | None = None
        if prompt_ids is None:
            chat, prompt = self._text(prompt, "prompt")
            encoded = chat.prompt(prompt, user_message=self.user_message)
            prompt, prompt_ids = encoded.text, token_array(encoded.ids, "prompt")
        elif self.chat is not None and self.chat.settings.given:
            detail = f"are taken as they are, and {self.chat.settings.given[0]} would have no effect; remove that"
            raise RowProblem("malformed", "prompt_token_ids", detail)
        if response_ids is None:
            append_eos = self.settings.append_eos and finish_reason != "length"
            chat, response = self._text(response, "response")
            response, ids = chat.response(response, encoded, append_eos=append_eos)
            response_ids = token_array(ids, "response")
        _check_loss_mask(values.get("loss_mask"), response_ids.size)
        rollout = Rollout(
            prompt_token_ids=prompt_ids,
            response_token_ids=response_ids,
            group_id=_group_id(values.get("group_id"), prompt_ids),
            reward=reward,
            behavior_log_probs=log_prob_array(values.get("behavior_log_probs"), "behavior_log_probs"),
            sample_id=_sample_id(values.get("sample_id")),
            finish_reason=finish_reason,
            prompt=prompt if isinstance(prompt, str) else None,
            response=response if isinstance(response, str) else None,
            metadata=_metadata(values),
        )
        assumed_ended = encoded_response and finish_reason not in ("stop", "length") and self.settings.append_eos
        return _Built(rollout, encoded_prompt, encoded_response, assumed_ended)

    @staticmethod
    def _given_ids(values: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Prompt and response ids where the source has them, split if it keeps them in one list."""
        if values.get("token_ids") is None:
            prompt, response = values.get("prompt_token_ids"), values.get("response_token_ids")
            return (
                None if prompt is None else token_array(prompt, "prompt_token_ids"),
                None if response is None else token_array(response, "response_token_ids"),
            )
        tokens, length = token_array(values["token_ids"], "token_ids"), values.get("response_length")
        if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= tokens.size:
            detail = f"{length!r} can't split {tokens.size} token ids; it must be a whole number between 0 and that"
            raise RowProblem("malformed", "response_length", detail)
        split = tokens.size - length
        return tokens[:split], tokens[split:]

    def _text(self, value: Any, name: str) -> tuple[Chat, Any]:
        if value is None:
            raise RowProblem("empty_" + name, name, f"no {name}_token_ids and no {name} text; correct the field map")
        if not isinstance(value, str | list):
            raise RowProblem("malformed", name, f"is a {type(value).__name__}; expected text or a list of messages")
        refuse_written_messages(value, name)
        if isinstance(value, list) and not all(isinstance(message, Mapping) for message in value):
            detail = f"is a list, but not of messages; give token ids as {name}_token_ids, messages as objects"
            raise RowProblem("malformed", name, detail)
        if self.chat is None:
            raise RolloutError(f"{name}: the source has text without token ids; give the base model's tokenizer")
        return self.chat, value


class _Import:
    """One import in progress: the stream of good rollouts, and the account of the others."""

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        output: str | Path,
        settings: ImportSettings,
        fields: Mapping[str, str] | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        opened = open_source(source)
        if opened.fields:
            detail = "of rollouts, fields are mapped by themselves; leave out ?... and map them"
            raise RolloutError(f"{opened.text}: {detail}")
        if tokenizer is None and settings.given:
            detail = "is for the tokenizer's chat template; give the base model's tokenizer"
            raise RolloutError(f"{settings.given[0]}: {detail}")
        self.files, self.settings, self.preset = opened.files, settings, PRESETS[settings.format]
        self.report = ImportReport([str(path) for path in self.files], str(output), settings.format)
        self.report.not_read = [str(path) for path in opened.not_read]
        self.fields = FieldMap.of(self.preset, fields)
        self.vocab_size = None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        chat = None if tokenizer is None else Chat(tokenizer, settings)
        user_message = self.preset.user_message if settings.user_message is None else settings.user_message
        self.builder = _Builder(chat, settings, user_message)
        self.names = SampleNames()
        self.group_prompts: dict[int, int] = {}
        self.group_ids: list[int] = []
        self.rewards: list[float] = []
        self.lengths: list[tuple[int, int]] = []
        self.assumed_lengths: list[int] = []

    def rollouts(self) -> Iterator[Rollout]:
        """Every good rollout of every file; a bad one is counted, or ends the import with its place."""
        for path in self.files:
            for place, row in read_rows(path, self.fields.columns()):
                yield from self._rollouts_of(place, row)
        self.fields.check_found(", ".join(map(str, self.files)))
        if not self.group_ids:
            counts = {**self.report.rejected, **{f"excluded by {m}": n for m, n in self.report.excluded.items()}}
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            first = next(iter(self.report.first_rejected.values()), None)
            raise RolloutError(
                f"{self.files[0]}: no rollout could be accepted ({reasons or 'there are no rows'}"
                + (f"; first {first})" if first else ")")
            )

    def try_rows(self, most: int) -> tuple[int, str]:
        """See `try_rollouts`."""
        longest = (0, "")
        for path in self.files[:_TRIED_FILES]:
            for place, row in islice(read_rows(path, self.fields.columns()), most):
                for rollout in self._rollouts_of(place, row):
                    length = rollout.prompt_token_ids.size + rollout.response_token_ids.size
                    longest = max(longest, (length, place))
        return longest

    def _rollouts_of(self, place: str, row: Mapping[str, Any] | RowProblem) -> Iterator[Rollout]:
        if isinstance(row, RowProblem):
            self._reject(place, row)
            return
        try:
            expanded = list(self.fields.expand(row))
        except RowProblem as problem:
            self._reject(place, problem)
            return
        for number, values in enumerate(expanded):
            where = place if len(expanded) == 1 else f"{place}, entry {number}"
            try:
                built = self.builder.build(values)
                self._admit(built.rollout)
            except _Excluded as mark:
                self.report.exclude(f"{self.fields.fields.get(mark.field, mark.field)} {mark.value}", where)
                continue
            except RecursionError:
                self._reject(where, RowProblem("malformed", "row", "is nested too deeply"))
                continue
            except RowProblem as problem:
                self._reject(where, problem)
                continue
            except RolloutError as error:
                raise RolloutError(f"{where}: {error}") from error
            self._count(built)
            yield built.rollout

    def _admit(self, rollout: Rollout) -> None:
        check_record(rollout, self.vocab_size)
        prompt = group_id_of(token_bytes(rollout.prompt_token_ids))
        if self.group_prompts.get(rollout.group_id, prompt) != prompt:
            detail = f"{rollout.group_id} has rollouts of another prompt; leave the field out to group by prompt"
            raise RowProblem("group_of_other_prompt", "group_id", detail)
        repetitions = self.names.num_repetitions
        rollout.sample_id = self.names.name(rollout)
        if self.names.num_repetitions > repetitions and self.settings.duplicates == "reject":
            detail = "the same tokens occurred before; pass duplicates='number' to keep it as another draw"
            raise RowProblem("duplicate_sample", "response_token_ids", detail)
        self.group_prompts[rollout.group_id] = prompt

    def _reject(self, place: str, problem: RowProblem) -> None:
        path = self.fields.fields.get(problem.field, problem.field)
        field = problem.field if path == problem.field else f"{problem.field} (from {path!r})"
        message = f"{place}: {field}: {problem.detail}"
        if self.settings.on_reject == "error":
            raise RolloutError(f"{message} (nothing was written; on_reject='skip' leaves such rows out)") from problem
        self.report.reject(problem.reason, message)

    def _count(self, built: _Built) -> None:
        rollout = built.rollout
        self.report.encoded_prompts += built.encoded_prompt
        self.report.encoded_responses += built.encoded_response
        self.report.with_behavior_log_probs += rollout.behavior_log_probs is not None
        self.group_ids.append(rollout.group_id)
        self.rewards.append(np.nan if rollout.reward is None else rollout.reward)
        self.lengths.append((rollout.prompt_token_ids.size, rollout.response_token_ids.size))
        if built.assumed_ended:
            self.assumed_lengths.append(rollout.response_token_ids.size)

    def describe(self) -> None:
        """Fills the report's figures about the rollouts as a whole."""
        report, group_ids, rewards = self.report, np.array(self.group_ids), np.array(self.rewards)
        sizes = np.unique(group_ids, return_counts=True)[1]
        lengths = np.array(self.lengths)
        report.accepted = len(group_ids)
        report.unverified = int(np.isnan(rewards).sum())
        report.repetitions = 0 if self.settings.duplicates == "reject" else self.names.num_repetitions
        report.groups, report.zero_variance_groups = len(sizes), constant_groups(group_ids, rewards)
        report.group_size, report.reward = summary(sizes), summary(rewards)
        report.prompt_length, report.response_length = summary(lengths[:, 0]), summary(lengths[:, 1])
        if self.preset.note is not None:
            report.notes.append(self.preset.note)
        if report.encoded_prompts or report.encoded_responses:
            report.notes.append(RE_ENCODED_NOTE)
        if self.builder.chat is not None and self.builder.chat.repeated_openings:
            report.notes.append(
                f"{self.builder.chat.repeated_openings} responses begin with what the chat template had ended the "
                "prompt with (as <think>); it was taken once."
            )
        if self.assumed_lengths:
            report.assumed_ended = len(self.assumed_lengths)
            report.notes.append(_assumed_ended_note(self.assumed_lengths))


def _assumed_ended_note(lengths: Sequence[int]) -> str:
    """What was assumed of responses without a finish reason, and how many the sampler's limit may have cut off."""
    longest = max(lengths)
    close = sum(length >= NEAR_LONGEST * longest for length in lengths)
    return (
        f"{len(lengths)} responses have no finish reason, or an unknown one: they were taken as complete and given the "
        f"end token. {close} of them are within {1 - NEAR_LONGEST:.0%} of the longest ({longest} tokens); if the "
        "sampler stopped at about that length, they were cut off and must not learn to end there: map finish_reason "
        "('length' gets no end token), or pass append_eos false."
    )


def _finish_reason(values: Mapping[str, Any]) -> str | None:
    reason = values.get("finish_reason")
    for name in ("finished", "truncated"):
        if not isinstance(values.get(name), bool | None):
            raise RowProblem("malformed", name, f"{values[name]!r} isn't true or false")
    if reason is None or reason == "":
        return "length" if values.get("finished") is False or values.get("truncated") else None
    if not isinstance(reason, str):
        detail = f"is a {type(reason).__name__}, expected a word; map the field that has it, as in 'finish_reason.type'"
        raise RowProblem("malformed", "finish_reason", detail)
    check_storable(reason, "finish_reason")
    return FINISH_REASONS.get(finish_word(reason), reason)


def _check_marks(values: Mapping[str, Any], finish_reason: str | None) -> None:
    if finish_reason is not None and finish_word(finish_reason) in NO_SAMPLE:
        raise _Excluded("finish_reason", finish_reason)
    for name, leaves_out in (("excluded", True), ("included", False)):
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            detail = f"{value!r} isn't true or false (1 or 0); a sample is left out or kept, it has no weight"
            raise RowProblem("malformed", name, detail)
        if bool(value) is leaves_out:
            raise _Excluded(name, value)


def _check_loss_mask(mask: Any, num_tokens: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, list) or len(mask) != num_tokens:
        size = len(mask) if isinstance(mask, list) else type(mask).__name__
        raise RowProblem("malformed", "loss_mask", f"{size} values for {num_tokens} response tokens; give one each")
    if num_tokens and all(not isinstance(value, str) and value == 0 for value in mask):
        raise _Excluded("loss_mask", "all zero")
    if any(value != 1 for value in mask):
        detail = "masks response tokens out (tool results, other turns); only rollouts of a single turn are supported"
        raise RowProblem("masked_tokens", "loss_mask", detail)


def _sample_id(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowProblem("malformed", "sample_id", f"is a {type(value).__name__}; expected text or a whole number")
    if value == "":
        raise RowProblem("malformed", "sample_id", "is empty; leave the field out to have it derived")
    check_storable(value, "sample_id")
    return str(value)


def _group_id(value: Any, prompt_ids: np.ndarray) -> int:
    """A whole number as it is, other keys by their text, none by the prompt's content."""
    if value is None:
        return group_id_of(token_bytes(prompt_ids))
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise RowProblem("malformed", "group_id", f"{value} doesn't fit 64 bits; use text for long keys")
        return value
    if isinstance(value, str):
        check_storable(value, "group_id")
        return group_id_of(value.encode())
    raise RowProblem("malformed", "group_id", f"{value!r} is neither a whole number nor text")


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    whole = values.get("metadata")
    if whole is not None and not isinstance(whole, Mapping):
        whole = {"metadata": whole}
    single = {name.removeprefix("metadata."): value for name, value in values.items() if name.startswith("metadata.")}
    found = dict(whole or {}) | {name: value for name, value in single.items() if value is not None}
    check_storable(found, "metadata")
    return found
