"""What a rollout is: the columns of a rollout file, one record in memory, and the checks every record passes.

Parquet schema (one row per rollout; `SCHEMA_VERSION` is in the file's key-value metadata):

    sample_id            string, unique          content-derived unless the source had one
    group_id             int64                   rollouts of one prompt share it
    prompt_token_ids     list<int32>, not empty
    response_token_ids   list<int32>, not empty
    behavior_log_probs   list<float32>, nullable natural log; one per response token, as the sampler recorded them
    reward               float32, nullable       null exactly where `reward_status` is 'unverified'
    reward_status        string                  'scored' or 'unverified' (never read as a wrong answer)
    finish_reason        string, nullable        'stop', 'length' or the source's own word
    prompt, response     string, nullable        for people; training reads only token ids
    metadata             string, nullable        a JSON object
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_erpd.errors import RolloutError

SCHEMA_VERSION = 1
VERSION_KEY = b"megatron_erpd.rollouts.schema_version"
METADATA_KEY = b"megatron_erpd.rollouts.metadata"

SCORED = "scored"
UNVERIFIED = "unverified"
REWARD_STATUSES = (SCORED, UNVERIFIED)

# Engines round: a log-prob a hair above zero is noise, anything larger is a probability or a bug.
MAX_LOG_PROB = 1e-3
MAX_TOKEN_ID = 2**31 - 1

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("group_id", pa.int64(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("behavior_log_probs", pa.list_(pa.float32())),
        pa.field("reward", pa.float32()),
        pa.field("reward_status", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("metadata", pa.string()),
    ]
)


class RowProblem(RolloutError):
    """Why one record can't be used: a short `reason` to count by, the `field`, and a sentence saying what to do."""

    def __init__(self, reason: str, field_name: str, detail: str) -> None:
        super().__init__(f"{field_name}: {detail}")
        self.reason = reason
        self.field = field_name
        self.detail = detail


@dataclass(slots=True)
class Rollout:
    """One rollout in memory.

    Attributes:
        prompt_token_ids: int64 `[P]`, P >= 1 (the first response token needs a token to be predicted from).
        response_token_ids: int64 `[R]`, R >= 1.
        group_id: rollouts of one prompt share it.
        reward: None for an unverified rollout.
        behavior_log_probs: float32 `[R]` in nats, or None where the sampler recorded none.
        sample_id: None lets the writer derive it from the content.
        reward_status: None lets it follow from `reward`.
    """

    prompt_token_ids: np.ndarray
    response_token_ids: np.ndarray
    group_id: int
    reward: float | None
    behavior_log_probs: np.ndarray | None = None
    sample_id: str | None = None
    reward_status: str | None = None
    finish_reason: str | None = None
    prompt: str | None = None
    response: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def token_array(values: Any, field_name: str) -> np.ndarray:
    """Token ids as int64 `[n]`; raises `RowProblem` for anything that isn't a flat list of whole numbers."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iu" or values.ndim != 1:
            raise RowProblem(
                "non_integer_token", field_name, f"expected a flat integer array, got {values.dtype} {values.shape}"
            )
        tokens = values.astype(np.int64, copy=False)
    elif isinstance(values, Sequence) and not isinstance(values, str | bytes):
        tokens = _token_list(values, field_name)
    else:
        raise RowProblem("non_integer_token", field_name, f"expected a list of token ids, got {type(values).__name__}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > MAX_TOKEN_ID):
        bad = int(np.flatnonzero((tokens < 0) | (tokens > MAX_TOKEN_ID))[0])
        raise RowProblem(
            "token_beyond_vocabulary", field_name, f"token id {tokens[bad]} at position {bad} isn't in [0, 2^31)"
        )
    return tokens


def _token_list(values: Sequence[Any], field_name: str) -> np.ndarray:
    for position, value in enumerate(values):
        if type(value) is not int and not isinstance(value, np.integer):
            detail = f"{value!r} at position {position} isn't a whole number; give token ids, or text under 'response'"
            raise RowProblem("non_integer_token", field_name, detail)
    try:
        return np.asarray(values, dtype=np.int64)
    except OverflowError:
        raise RowProblem("token_beyond_vocabulary", field_name, "a token id doesn't fit 64 bits") from None


def log_prob_array(values: Any, field_name: str) -> np.ndarray | None:
    """Log-probs as float32 `[n]` (None stays None); raises `RowProblem` for NaN, infinities and values above zero."""
    if values is None:
        return None
    try:
        given = np.asarray(values)
        if given.dtype.kind in "USb":  # NumPy would make numbers of these
            raise TypeError
        with np.errstate(over="ignore"):
            log_probs = given.astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        raise RowProblem("bad_behavior_log_probs", field_name, "expected a list of numbers") from None
    if log_probs.ndim != 1:
        raise RowProblem("bad_behavior_log_probs", field_name, f"expected a flat list, got shape {log_probs.shape}")
    bad = np.flatnonzero(~np.isfinite(log_probs) | (log_probs > MAX_LOG_PROB))
    if bad.size:
        detail = (
            f"{log_probs[bad[0]]} at position {bad[0]} can't be a natural-log probability; "
            "repair the source or leave the field out (the trainer recomputes its own)"
        )
        raise RowProblem("bad_behavior_log_probs", field_name, detail)
    return log_probs


def reward_value(value: Any, field_name: str) -> float | None:
    """A reward as a float (booleans become 1.0 and 0.0; None stays None); `RowProblem` when it isn't finite."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float | Decimal | np.number | np.bool_):
        detail = f"expected a number, got {type(value).__name__}; map the field that holds it, as in 'reward.score'"
        raise RowProblem("bad_reward", field_name, detail)
    try:
        reward = float(value)
    except OverflowError:  # a whole number beyond float64
        reward = math.inf
    if not math.isfinite(reward) or abs(reward) > float(np.finfo(np.float32).max):
        detail = f"{reward} isn't a finite number; use null for a rollout that couldn't be verified"
        raise RowProblem("bad_reward", field_name, detail)
    return reward


def check_storable(value: Any, field_name: str) -> None:
    """Raises `RowProblem` for what no file could give back, at any depth of lists and objects: text that UTF-8 can't
    hold (half of a surrogate pair, as JSON of JavaScript and of UTF-16 programs has it), numbers beyond float64."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            detail = f"has half of a surrogate pair ({half} at {error.start}), which is no character; repair the source"
            raise RowProblem("unencodable_text", field_name, detail) from None
    elif isinstance(value, float) and math.isinf(value):
        raise RowProblem("malformed", field_name, "has a number beyond the range of float64; write it as text")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_storable(key, field_name)
            check_storable(item, f"{field_name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_storable(item, field_name)


def check_record(record: Rollout, vocab_size: int | None = None) -> None:
    """Everything a single rollout must satisfy before it is written. Raises `RowProblem`; fills `reward_status`."""
    if record.prompt_token_ids.size == 0:
        detail = "empty; the first response token needs a prompt (at least a BOS token) to be predicted from"
        raise RowProblem("empty_prompt", "prompt_token_ids", detail)
    if record.response_token_ids.size == 0:
        raise RowProblem("empty_response", "response_token_ids", "empty; there is nothing to train on")
    if vocab_size is not None:
        for name in ("prompt_token_ids", "response_token_ids"):
            largest = int(getattr(record, name).max())
            if largest >= vocab_size:
                detail = f"token id {largest} is beyond the vocabulary of {vocab_size}; was another tokenizer used?"
                raise RowProblem("token_beyond_vocabulary", name, detail)
    log_probs, length = record.behavior_log_probs, record.response_token_ids.size
    if log_probs is not None and log_probs.size != length:
        detail = f"{log_probs.size} values for {length} response tokens; they must be one to one"
        raise RowProblem("behavior_length", "behavior_log_probs", detail)
    if record.reward_status is None:
        record.reward_status = UNVERIFIED if record.reward is None else SCORED
    if record.reward_status not in REWARD_STATUSES:
        detail = f"{record.reward_status!r} isn't one of {', '.join(REWARD_STATUSES)}"
        raise RowProblem("bad_reward", "reward_status", detail)
    if (record.reward is None) != (record.reward_status == UNVERIFIED):
        detail = f"reward is {record.reward} but reward_status is {record.reward_status!r}; null goes with 'unverified'"
        raise RowProblem("bad_reward", "reward", detail)


def token_bytes(tokens: np.ndarray) -> bytes:
    """Token ids as little-endian int32, the form every digest and checksum of the project is taken over."""
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def sample_id(prompt_ids: np.ndarray | Sequence[int], response_ids: np.ndarray | Sequence[int], k: int = 0) -> str:
    """The stable name of a rollout: 32 hex digits of its content.

    Args:
        prompt_ids: token ids `[P]`.
        response_ids: token ids `[R]`.
        k: how many rollouts with exactly these tokens came before it. Sampling the same short answer twice is
            ordinary, and both draws belong to the group.
    """
    prompt, response = np.asarray(prompt_ids), np.asarray(response_ids)
    digest = hashlib.blake2b(digest_size=16, person=b"erpd-sample")
    # The prompt's length fixes where the response begins, so (ab, c) and (a, bc) differ.
    digest.update(np.array([prompt.size, k], dtype="<i8").tobytes())
    digest.update(token_bytes(prompt))
    digest.update(token_bytes(response))
    return digest.hexdigest()


def group_id_of(content: bytes) -> int:
    """A non-negative int64 group id from content (a prompt's token bytes, or a source's text key)."""
    digest = hashlib.blake2b(content, digest_size=8, person=b"erpd-group").digest()
    return int.from_bytes(digest, "little") >> 1
