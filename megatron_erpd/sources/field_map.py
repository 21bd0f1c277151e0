"""Where a source keeps what we need: field maps, dotted paths, and presets for the formats people have.

A field map is `{our name: path in the source}`. A path is a field, or nested fields joined by dots
(`reward_model.ground_truth`). A list followed by `[]` holds one entry per rollout (`generations[]`,
`samples[].text`): the row then yields as many rollouts as the list is long.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_erpd.data.schema import RowProblem
from megatron_erpd.errors import RolloutError
from megatron_erpd.sources.rows import TextRow, parsed

# Our names: the columns of a rollout, and what they can be derived from.
TARGETS = (
    "sample_id",
    "group_id",
    "prompt_token_ids",
    "response_token_ids",
    "token_ids",  # prompt and response in one list, split by response_length
    "response_length",
    "loss_mask",  # of the response; must be all ones
    "behavior_log_probs",
    "reward",
    "finish_reason",
    "finished",  # false where a response without a finish reason was cut off
    "truncated",  # true where it was
    "excluded",  # true for a sample that the other framework leaves out
    "included",  # false or 0 for one; 1 and true for the others
    "prompt",
    "response",
    "metadata",  # an object; 'metadata.NAME' adds a single entry
)
TEXTS = ("sample_id", "group_id", "finish_reason", "prompt", "response")
"""Those that are text where a format has text alone; the others are parsed."""

# Under whatever format: slime's `Sample.remove_sample`, NeMo RL's `loss_multiplier` (0 also after its overlong filter),
# and the `is_truncated` of verifiers and prime-rl.
MARKS = {"excluded": "remove_sample", "included": "loss_multiplier", "truncated": "is_truncated"}


@dataclass(frozen=True)
class Preset:
    """A known format.

    Attributes:
        fields: its field map.
        user_message: a plain-text prompt is the content of a user message, to be put into the chat template.
        note: what a user of this format should know; it goes into the report.
    """

    fields: Mapping[str, str]
    user_message: bool = False
    note: str | None = None


PRESETS: dict[str, Preset] = {
    # Our own column names.
    "plain": Preset({name: name for name in TARGETS if name not in MARKS}),
    # verl: trainer.rollout_data_dir
    "verl": Preset(
        {
            "prompt": "input",
            "response": "output",
            "reward": "score",
            "metadata.ground_truth": "gts",
            "metadata.step": "step",
        },
        note="verl dumps are decoded without special tokens: chat markers and EOS are lost, and the re-encoded prompt "
        "isn't the one that was sampled from. Prefer a dump with token ids.",
    ),
    # slime: Sample.to_dict()
    "slime": Preset(
        {
            "token_ids": "tokens",
            "response_length": "response_length",
            "reward": "reward",
            "loss_mask": "loss_mask",
            "behavior_log_probs": "rollout_log_probs",
            "group_id": "group_index",
            "finish_reason": "status",
            "prompt": "prompt",
            "response": "response",
            "metadata.label": "label",
        }
    ),
    # TRL: prompt-completion data sets and logged completions; texts or lists of messages
    "trl": Preset(
        {"prompt": "prompt", "response": "completion", "reward": "reward", "metadata.step": "step"},
        note="TRL names a reward column after each reward function; map it, as in {'reward': 'accuracy_reward'}.",
    ),
    "openr1": Preset(
        {
            "prompt": "problem",
            "response": "generations[]",
            "reward": "correctness_math_verify[]",
            "finish_reason": "finish_reasons[]",
            "finished": "is_reasoning_complete[]",
            "metadata.answer": "answer",
            "metadata.uuid": "uuid",
        },
        user_message=True,
        note="OpenR1 generations come from another model; their log-probs under this base may be very low.",
    ),
}

_STOP = ("stop", "stopped", "completed", "eos", "eos_token", "stop_sequence", "end_turn")
_LENGTH = (
    *("length", "truncated", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "length_capped"),
    "incomplete",
)
FINISH_REASONS = dict.fromkeys(_STOP, "stop") | dict.fromkeys(_LENGTH, "length")
"""What engines and frameworks call the two ends of a response, as `finish_word` has it."""
NO_SAMPLE = ("aborted", "abort", "failed", "pending", "error", "cancelled", "canceled")
"""Finish reasons of what is no draw from the policy: slime's states beside completed and truncated, and the word of
SGLang and vLLM for a request that was given up."""


def finish_word(reason: str) -> str:
    """A finish reason in small letters, without what enumerations are printed with (`Status.ABORTED`, `FINISH_LENGTH`,
    `FinishReason.STOP`)."""
    return re.sub("^finish(ed)?_", "", reason.strip().rpartition(".")[2].lower())


MISSING = object()
"""What `lookup` finds where nothing is, as null is a value."""


@dataclass
class FieldMap:
    """Paths into a source's rows, and which of them were ever met.

    Attributes:
        fields: our name -> path.
        explicit: names the user mapped himself; a path of those that no row has is an error.
    """

    fields: dict[str, str]
    explicit: frozenset[str]
    found: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, preset: Preset, overrides: Mapping[str, str] | None) -> "FieldMap":
        """A preset's map with a user's entries laid over it. Raises `RolloutError` for an unknown name of ours."""
        given = dict(overrides or {})
        for name in given:
            if name not in TARGETS and not name.startswith("metadata."):
                known = ", ".join(TARGETS)
                raise RolloutError(f"field_map: {name!r} isn't one of {known}, or 'metadata.NAME'")
        return cls(MARKS | dict(preset.fields) | given, frozenset(given))

    def columns(self) -> set[str]:
        """The top-level fields that the paths can begin with (the whole path too, as a field's name may hold dots)."""
        paths = [path.replace("[]", "") for path in self.fields.values()]
        return set(paths) | {path.split(".", 1)[0] for path in paths}

    def expand(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The rollouts of one source row, each as our name -> value (None where the source has none or null).

        Raises `RowProblem` when lists that run in parallel differ in length, or text is no JSON where it should be.
        """
        is_text = isinstance(row, TextRow)
        single: dict[str, Any] = {}
        lists: dict[str, list[Any]] = {}
        for name, path in self.fields.items():
            before, bracket, after = path.partition("[]")
            value = lookup(row, before)
            if value is not MISSING:
                self.found.add(name)
            value = None if value is MISSING else value
            if is_text and (bracket or name not in TEXTS):
                value = value if name.startswith("metadata.") else parsed(value, name)
            elif is_text and value == "":
                value = None
            if not bracket or value is None:
                single[name] = value
            elif not isinstance(value, list):
                raise RowProblem("malformed", before, f"is a {type(value).__name__}; '{path}' needs a list")
            else:
                lists[name] = [self._entry(entry, after) for entry in value]
        if not lists:
            # A preset with lists whose row has none of them still yields a rollout, to be refused by name.
            yield single
            return
        lengths = {self.fields[name]: len(values) for name, values in lists.items()}
        if len(set(lengths.values())) > 1:
            detail = f"lists of one row differ in length: {lengths}; entries can't be matched"
            raise RowProblem("malformed", next(iter(lengths)), detail)
        for values in zip(*lists.values(), strict=True):
            yield single | dict(zip(lists, values, strict=True))

    def check_found(self, source: str) -> None:
        """Raises `RolloutError` for a path the user gave that no row of the source had: likely a typing error."""
        for name in sorted(self.explicit - self.found):
            path = self.fields[name]
            raise RolloutError(f"{source}: field_map maps {name!r} to {path!r}, which no row has; correct it")

    @staticmethod
    def _entry(entry: Any, rest: str) -> Any:
        value = lookup(entry, rest.removeprefix(".")) if rest else entry
        return None if value is MISSING else value


def lookup(row: Any, path: str) -> Any:
    """The value at a dotted path; a field whose name is the whole path comes first. `MISSING` where there is none."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for key in path.split("."):
        if not isinstance(row, Mapping) or key not in row:
            return MISSING
        row = row[key]
    return row
