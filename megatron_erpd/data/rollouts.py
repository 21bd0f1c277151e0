"""Files of rollouts: a validated reader (one Parquet file or a folder of parts), an atomic writer, and counts.

The reader memory-maps the Parquet bytes; a column is decoded once, on first use, and kept as Arrow buffers that the
accessors slice. Text columns cost nothing until somebody reads them.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_erpd.data.ragged import Ragged, list_array, row_with_null_element
from megatron_erpd.data.schema import (
    MAX_LOG_PROB,
    METADATA_KEY,
    REWARD_STATUSES,
    ROLLOUT_SCHEMA,
    SCHEMA_VERSION,
    SCORED,
    UNVERIFIED,
    VERSION_KEY,
    Rollout,
    RowProblem,
    check_record,
    log_prob_array,
    reward_value,
    sample_id,
    token_array,
    token_bytes,
)
from megatron_erpd.errors import RolloutError
from megatron_erpd.files import new_file

ROW_GROUP_ROWS = 10_000
# Long responses fill a row group sooner: 16M tokens are 64 MiB of ids, and as much again of log-probs.
ROW_GROUP_TOKENS = 16_000_000
PROMPT, RESPONSE = "prompt_token_ids", "response_token_ids"


class _Parts:
    """The Parquet files of one rollout set as lazily decoded columns over all their rows."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._files = [_open(path) for path in self.paths]
        self._row_starts = np.cumsum([0] + [file.metadata.num_rows for file in self._files])
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._ragged: dict[str, Ragged] = {}
        self.file_metadata = _common_metadata(self.paths, self._files)

    def __len__(self) -> int:
        return int(self._row_starts[-1])

    def location(self, row: int) -> str:
        part = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        return f"{self.paths[part]}: row {row - int(self._row_starts[part])} (counted from 0)"

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            chunks: list[pa.Array] = []
            for path, file in zip(self.paths, self._files, strict=True):
                try:
                    chunks.extend(file.read(columns=[name], use_threads=False).column(0).chunks)
                except (pa.ArrowException, OSError) as error:
                    detail = f"{path}: {name}: can't be read ({error}); the file is damaged, write it again"
                    raise RolloutError(detail) from error
            self._columns[name] = pa.chunked_array(chunks, type=ROLLOUT_SCHEMA.field(name).type)
        return self._columns[name]

    def ragged(self, name: str) -> Ragged:
        if name not in self._ragged:
            column = self.column(name)
            bad = row_with_null_element(column)
            if bad is not None:
                raise RolloutError(f"{self.location(bad)}: {name}: holds a null element; repair or drop the row")
            self._ragged[name] = Ragged(column)
        return self._ragged[name]


class Rollouts:
    """A set of rollouts, read-only, addressed by row number 0..len-1.

    Made by `read_rollouts`. Arrays that concern one rollout come from the methods taking `i`; arrays over all
    rollouts are attributes. A `select`ed set shares the decoded columns with its parent.
    """

    def __init__(self, parts: _Parts, rows: np.ndarray | None = None, rewards: np.ndarray | None = None) -> None:
        self._parts = parts
        self._rows = np.arange(len(parts), dtype=np.int64) if rows is None else rows
        self._rescored = rewards

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def file_metadata(self) -> dict[str, Any]:
        """What the writer said about the whole set: `tokenizer_digest`, sampling settings and the like."""
        return dict(self._parts.file_metadata)

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the tokenizer that made the token ids, where the writer knew it."""
        return self._parts.file_metadata.get("tokenizer_digest")

    @cached_property
    def sample_ids(self) -> list[str]:
        """Names of the rollouts, unique."""
        return self._take("sample_id").to_pylist()

    @cached_property
    def group_ids(self) -> np.ndarray:
        """int64 `[N]`; rollouts of one prompt share it."""
        return self._take("group_id").to_numpy()

    @cached_property
    def rewards(self) -> np.ndarray:
        """float32 `[N]`, NaN where the rollout is unverified."""
        if self._rescored is not None:
            return self._rescored
        return self._take("reward").to_numpy().astype(np.float32, copy=False)

    @cached_property
    def reward_status(self) -> list[str]:
        """'scored' or 'unverified' per rollout."""
        if self._rescored is not None:
            return [UNVERIFIED if missing else SCORED for missing in np.isnan(self._rescored)]
        return self._take("reward_status").to_pylist()

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """int64 `[N]`, P in tokens."""
        return self._parts.ragged("prompt_token_ids").lengths[self._rows]

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """int64 `[N]`, R in tokens."""
        return self._parts.ragged("response_token_ids").lengths[self._rows]

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[N]`, P + R in tokens (the model's input is one shorter)."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def has_behavior_log_probs(self) -> np.ndarray:
        """bool `[N]`: the sampler's log-probs were recorded."""
        return self._parts.ragged("behavior_log_probs").valid[self._rows]

    def prompt_tokens(self, i: int) -> np.ndarray:
        """int64 `[P]`."""
        return self._parts.ragged("prompt_token_ids").row(self._rows[i]).astype(np.int64)

    def response_tokens(self, i: int) -> np.ndarray:
        """int64 `[R]`."""
        return self._parts.ragged("response_token_ids").row(self._rows[i]).astype(np.int64)

    def behavior_log_probs(self, i: int) -> np.ndarray | None:
        """float32 `[R]` in nats as the sampler recorded them (a read-only view), or None."""
        column = self._parts.ragged("behavior_log_probs")
        return column.row(self._rows[i]) if column.valid[self._rows[i]] else None

    def finish_reason(self, i: int) -> str | None:
        """'stop', 'length', the source's own word, or None."""
        return self._scalar("finish_reason", i)

    @cached_property
    def finish_reasons(self) -> list[str | None]:
        """`finish_reason` of every rollout."""
        return self._take("finish_reason").to_pylist()

    def prompt_text(self, i: int) -> str | None:
        """The prompt for people to read, where recorded."""
        return self._scalar("prompt", i)

    def response_text(self, i: int) -> str | None:
        """The response for people to read, where recorded."""
        return self._scalar("response", i)

    def metadata(self, i: int) -> dict[str, Any]:
        """The row's JSON object; empty where there is none. `RolloutError` when it isn't a JSON object."""
        text = self._scalar("metadata", i)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise RolloutError(f"{self.location(i)}: metadata: isn't JSON ({error}); write it again") from error
        if not isinstance(value, dict):
            raise RolloutError(f"{self.location(i)}: metadata: is a {type(value).__name__}, expected a JSON object")
        return value

    def location(self, i: int) -> str:
        """Where rollout `i` came from, as 'file: row n', for error messages."""
        return self._parts.location(int(self._rows[i]))

    def token_crc(self, i: int) -> int:
        """CRC-32 of prompt and response token ids as little-endian int32: what a cache row is checked by."""
        row = self._rows[i]
        crc = zlib.crc32(token_bytes(self._parts.ragged("prompt_token_ids").row(row)))
        return zlib.crc32(token_bytes(self._parts.ragged("response_token_ids").row(row)), crc)

    def record(self, i: int) -> Rollout:
        """Rollout `i` whole, as `write_rollouts` takes it."""
        status, log_probs = self.reward_status[i], self.behavior_log_probs(i)
        return Rollout(
            prompt_token_ids=self.prompt_tokens(i),
            response_token_ids=self.response_tokens(i),
            group_id=int(self.group_ids[i]),
            reward=float(self.rewards[i]) if status == SCORED else None,
            behavior_log_probs=log_probs,
            sample_id=self.sample_ids[i],
            reward_status=status,
            finish_reason=self.finish_reason(i),
            prompt=self.prompt_text(i),
            response=self.response_text(i),
            metadata=self.metadata(i),
        )

    def select(self, indices: np.ndarray | Sequence[int]) -> "Rollouts":
        """These rows (integers, or a bool mask over all) as a set of its own, sharing the decoded columns.

        Dropping groups without signal is `rollouts.select(~zero_variance_rows)`.
        """
        chosen = np.asarray(indices)
        return Rollouts(self._parts, self._rows[chosen], None if self._rescored is None else self._rescored[chosen])

    def rescored(self, rewards: np.ndarray) -> "Rollouts":
        """The same rollouts with other rewards: float32 `[N]`, NaN where unverified."""
        assert rewards.shape == (len(self),)
        return Rollouts(self._parts, self._rows, rewards.astype(np.float32))

    def digest(self) -> str:
        """SHA-256 of everything training reads, in row order: names, groups, tokens, behaviour log-probs, rewards.

        It doesn't depend on how the rows are spread over files and row groups, nor on text and metadata.
        """
        digest = hashlib.sha256(b"megatron_erpd.rollouts.v1")
        for array in (self.group_ids, self.rewards, self.prompt_lengths, self.response_lengths):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
        digest.update("\n".join(self.sample_ids).encode())
        for i, row in enumerate(self._rows):
            digest.update(token_bytes(self._parts.ragged("prompt_token_ids").row(row)))
            digest.update(token_bytes(self._parts.ragged("response_token_ids").row(row)))
            log_probs = self.behavior_log_probs(i)
            digest.update(b"-" if log_probs is None else b"+" + log_probs.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def _take(self, name: str) -> pa.ChunkedArray:
        return self._parts.column(name).take(pa.array(self._rows))

    def _scalar(self, name: str, i: int) -> Any:
        return self._parts.column(name)[int(self._rows[i])].as_py()


def rollout_files(folder: Path) -> list[Path]:
    """The files of a folder of rollouts, in name order. Writers keep unfinished ones under a leading dot."""
    return sorted(p for p in folder.glob("*.parquet") if not p.name.startswith((".", "_")))


def read_rollouts(path: str | Path) -> Rollouts:
    """Opens and validates a rollout file, or a folder of `*.parquet` parts (in name order).

    Raises:
        RolloutError: nothing there, another schema, or a row that breaks a rule of `schema.py`; the message names
            file, row and field.
    """
    root = Path(path)
    if root.is_dir():
        paths = rollout_files(root)
        if not paths:
            raise RolloutError(f"{root}: holds no *.parquet file; give a rollout file or a folder of them")
    elif root.is_file():
        paths = [root]
    else:
        raise RolloutError(f"{root}: no such file or folder; make rollouts with 'sample' or 'import-rollouts' first")
    parts = _Parts(paths)
    if len(parts) == 0:
        raise RolloutError(f"{root}: holds no rollouts")
    _check_names(parts)
    _check_tokens(parts)
    _check_behavior_log_probs(parts)
    _check_rewards(parts)
    return Rollouts(parts)


def validate_against_vocabulary(rollouts: Rollouts, vocab_size: int) -> None:
    """Raises `RolloutError` naming the first row that holds a token id >= `vocab_size`."""
    for i in range(len(rollouts)):
        largest = max(int(rollouts.prompt_tokens(i).max()), int(rollouts.response_tokens(i).max()))
        if largest >= vocab_size:
            in_response = largest in rollouts.response_tokens(i)
            raise RolloutError(
                f"{rollouts.location(i)}: {'response' if in_response else 'prompt'}_token_ids: token id {largest} is "
                f"beyond the model's vocabulary of {vocab_size}; these rollouts were made with another tokenizer"
            )


def write_rollouts(
    path: str | Path,
    rows: Iterable[Rollout | Mapping[str, Any]],
    file_metadata: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> int:
    """Writes rollouts as one Parquet file (zstd), streaming; the file appears under its name only when complete.

    Args:
        path: the file; its folder is made if need be, an existing file is replaced at the end.
        rows: `Rollout` records, or mappings with the same names. A missing `sample_id` is derived from the content
            (exact repetitions are told apart by their order), a missing `reward_status` from the reward.
        file_metadata: JSON-serialisable facts about all rows: `tokenizer_digest`, sampling settings.
        vocab_size: when given, token ids at or above it are refused.
        row_group_rows: rows per row group at most.

    Returns:
        The number of rows written.

    Raises:
        RolloutError: a row breaks a rule (named by its number in `rows`), a name occurs twice, or there are no rows.
            Nothing is left behind; the same goes for any error raised by `rows` itself.
    """
    target = Path(path)
    schema = ROLLOUT_SCHEMA.with_metadata(
        {VERSION_KEY: str(SCHEMA_VERSION), METADATA_KEY: json.dumps(dict(file_metadata or {}), sort_keys=True)}
    )
    with new_file(target) as temporary:
        num_rows = _write_table(temporary, target, schema, rows, vocab_size, row_group_rows)
        if num_rows == 0:
            raise RolloutError(f"{target}: there are no rollouts to write")
    return num_rows


class SampleNames:
    """Gives every rollout its name, and refuses a name given twice."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._repetitions: dict[str, int] = {}

    @property
    def num_repetitions(self) -> int:
        """How many derived names belong to rollouts whose tokens had occurred before."""
        return sum(self._repetitions.values())

    def name(self, record: Rollout) -> str:
        """The record's own name, or the one of its content. Raises `RowProblem` for a name already given."""
        name = record.sample_id
        if name is None:
            content = sample_id(record.prompt_token_ids, record.response_token_ids)
            name = content
            if content in self._seen:
                k = self._repetitions[content] = self._repetitions.get(content, 0) + 1
                name = sample_id(record.prompt_token_ids, record.response_token_ids, k)
        if not name or name in self._seen:
            detail = f"{name!r} occurs twice; names must be unique (leave the field out to have them derived)"
            raise RowProblem("duplicate_sample", "sample_id", detail)
        self._seen.add(name)
        return name


def as_rollout(row: Rollout | Mapping[str, Any]) -> Rollout:
    """A record whose arrays have the types of `Rollout`, from a record or a mapping. Raises `RowProblem`."""
    if isinstance(row, Rollout):
        fields = {name: getattr(row, name) for name in Rollout.__slots__}
    else:
        fields = dict(row)
        unknown = sorted(fields.keys() - set(Rollout.__slots__))
        if unknown:
            detail = f"isn't a column of rollouts; the columns are {', '.join(Rollout.__slots__)}"
            raise RowProblem("unknown_field", unknown[0], detail)
        for name in ("prompt_token_ids", "response_token_ids", "group_id"):
            if fields.get(name) is None:
                raise RowProblem("missing_field", name, "is missing; every rollout needs it")
    group = fields["group_id"]
    if isinstance(group, bool) or not isinstance(group, int | np.integer):
        raise RowProblem("bad_group", "group_id", f"{group!r} isn't a whole number")
    return Rollout(
        prompt_token_ids=token_array(fields["prompt_token_ids"], "prompt_token_ids"),
        response_token_ids=token_array(fields["response_token_ids"], "response_token_ids"),
        group_id=int(group),
        reward=reward_value(fields.get("reward"), "reward"),
        behavior_log_probs=log_prob_array(fields.get("behavior_log_probs"), "behavior_log_probs"),
        sample_id=fields.get("sample_id"),
        reward_status=fields.get("reward_status"),
        finish_reason=fields.get("finish_reason"),
        prompt=fields.get("prompt"),
        response=fields.get("response"),
        metadata=fields.get("metadata") or {},
    )


@dataclass(frozen=True)
class RolloutCount:
    """Rollouts, and the tokens of all their prompts and responses."""

    num_rollouts: int
    prompt_tokens: int
    response_tokens: int


def count_rollouts(path: Path | Sequence[Path], prompt: str = PROMPT, response: str = RESPONSE) -> RolloutCount | None:
    """Counts a file's rollouts, those of a folder of `*.parquet` parts, or of several files.

    Args:
        path: rollouts of this project's format, or of another with lists of token ids.
        prompt, response: the columns with the token ids (an empty list counts as one token).

    Returns:
        None where there is no Parquet file, or one without these columns, or where another file is given too.

    Raises:
        RolloutError: a file that ends in `.parquet` is none.
    """
    paths = _parquet_files(path)
    rollouts = tokens = answers = 0
    for file in paths:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise RolloutError(f"{file}: isn't a readable Parquet file ({error}); is it complete?") from error
        found = [_num_values(footer, name) for name in (prompt, response)]
        if found[0] is None or found[1] is None:
            return None
        rollouts, tokens, answers = rollouts + footer.num_rows, tokens + found[0], answers + found[1]
    return RolloutCount(rollouts, tokens, answers) if paths else None


def rollout_lengths(
    path: Path | Sequence[Path], prompt: str = PROMPT, response: str = RESPONSE
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each prompt and of each response, int64 `[N]`. Reads the two columns, a batch of rows at a time.

    Args:
        path, prompt, response: as in `count_rollouts`, which has found something there.
    """
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([np.empty(0, np.int64)], [np.empty(0, np.int64)])
    for file in _parquet_files(path):
        for batch in pq.ParquetFile(file).iter_batches(columns=[prompt, response]):
            for name, lengths in zip((prompt, response), found, strict=True):
                of_rows = pc.fill_null(pc.list_value_length(batch[name]), 0)
                lengths.append(of_rows.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(found[0]), np.concatenate(found[1])


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise RolloutError(f"{path}: isn't a readable Parquet file ({error}); is it complete?") from error
    schema = file.schema_arrow
    hint = "bring foreign files in with 'import-rollouts'"
    version = (schema.metadata or {}).get(VERSION_KEY)
    if version is None:
        raise RolloutError(f"{path}: wasn't written as a rollout file (no schema version); {hint}")
    if version != str(SCHEMA_VERSION).encode():
        detail = f"schema version {version.decode()}, this program reads {SCHEMA_VERSION}"
        raise RolloutError(f"{path}: {detail}; write it again with the same version of the program")
    for field in ROLLOUT_SCHEMA:
        position = schema.get_field_index(field.name)
        if position < 0:
            raise RolloutError(f"{path}: column {field.name!r} is missing; {hint}")
        if schema.field(position).type != field.type:
            detail = f"column {field.name!r} is {schema.field(position).type}, expected {field.type}"
            raise RolloutError(f"{path}: {detail}; {hint}")
    return file


def _common_metadata(paths: Sequence[Path], files: Sequence[pq.ParquetFile]) -> dict[str, Any]:
    """The first part's metadata, after checking that all parts come from one tokenizer."""
    all_metadata = [json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}")) for file in files]
    first: dict[str, Any] = all_metadata[0]
    for path, metadata in zip(paths, all_metadata, strict=True):
        if metadata.get("tokenizer_digest") != first.get("tokenizer_digest"):
            detail = f"{path}: tokenizer_digest differs from that of {paths[0]}"
            raise RolloutError(f"{detail}; rollouts of different tokenizers can't be mixed")
    return first


def _first(mask: np.ndarray) -> int | None:
    hits = np.flatnonzero(mask)
    return int(hits[0]) if hits.size else None


def _refuse(parts: _Parts, row: int | None, field: str, detail: str) -> None:
    if row is not None:
        raise RolloutError(f"{parts.location(row)}: {field}: {detail}")


def _null_row(column: pa.ChunkedArray) -> int | None:
    return _first(column.is_null().to_numpy()) if column.null_count else None


def _check_names(parts: _Parts) -> None:
    for name in ("sample_id", "group_id", "prompt_token_ids", "response_token_ids", "reward_status"):
        _refuse(parts, _null_row(parts.column(name)), name, "is null; every rollout needs one")
    seen: dict[str, int] = {}
    for row, name in enumerate(parts.column("sample_id").to_pylist()):
        if not name:
            _refuse(parts, row, "sample_id", "is empty; every rollout needs a name")
        if name in seen:
            _refuse(parts, row, "sample_id", f"{name!r} is already the name of {parts.location(seen[name])}")
        seen[name] = row


def _check_tokens(parts: _Parts) -> None:
    for name in ("prompt_token_ids", "response_token_ids"):
        column = parts.ragged(name)
        _refuse(parts, _first(column.lengths == 0), name, "is empty; prompt and response need at least one token each")
        _refuse(parts, column.first_row_where(lambda ids: ids < 0), name, "holds a negative token id")


def _check_behavior_log_probs(parts: _Parts) -> None:
    column, name = parts.ragged("behavior_log_probs"), "behavior_log_probs"
    row = _first(column.valid & (column.lengths != parts.ragged("response_token_ids").lengths))
    if row is not None:
        num_tokens = parts.ragged("response_token_ids").lengths[row]
        _refuse(parts, row, name, f"{column.lengths[row]} values for {num_tokens} response tokens; one each is needed")
    row = column.first_row_where(lambda values: ~np.isfinite(values) | (values > MAX_LOG_PROB))
    _refuse(parts, row, name, "holds a value that can't be a natural-log probability (NaN, infinite or above 0)")


def _check_rewards(parts: _Parts) -> None:
    status = np.array(parts.column("reward_status").to_pylist(), dtype=object)
    row = _first(~np.isin(status.astype(str), REWARD_STATUSES))
    if row is not None:
        _refuse(parts, row, "reward_status", f"{status[row]!r} isn't one of {', '.join(REWARD_STATUSES)}")
    rewards = parts.column("reward")
    missing = rewards.is_null().to_numpy()
    row = _first(missing != (status != SCORED))
    _refuse(parts, row, "reward", "is null exactly where reward_status is 'unverified'; here the two disagree")
    row = _first(~missing & ~np.isfinite(rewards.to_numpy()))
    _refuse(parts, row, "reward", "isn't finite; use null with reward_status 'unverified' for an unscored rollout")


def _write_table(
    temporary: Path,
    target: Path,
    schema: pa.Schema,
    rows: Iterable[Rollout | Mapping[str, Any]],
    vocab_size: int | None,
    row_group_rows: int,
) -> int:
    names, pending, pending_tokens, num_rows = SampleNames(), [], 0, 0
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for row in rows:
            try:
                record = as_rollout(row)
                check_record(record, vocab_size)
                record.sample_id = names.name(record)
            except RowProblem as problem:
                raise RolloutError(f"{target}: row {num_rows} (counted from 0): {problem}") from problem
            pending.append(record)
            pending_tokens += record.prompt_token_ids.size + record.response_token_ids.size
            num_rows += 1
            if len(pending) >= row_group_rows or pending_tokens >= ROW_GROUP_TOKENS:
                writer.write_table(_table(pending, schema), row_group_size=len(pending))
                pending, pending_tokens = [], 0
        if pending:
            writer.write_table(_table(pending, schema), row_group_size=len(pending))
    return num_rows


def _table(records: list[Rollout], schema: pa.Schema) -> pa.Table:
    columns = {
        "sample_id": [r.sample_id for r in records],
        "group_id": [r.group_id for r in records],
        "prompt_token_ids": list_array([r.prompt_token_ids for r in records], pa.int32()),
        "response_token_ids": list_array([r.response_token_ids for r in records], pa.int32()),
        "behavior_log_probs": list_array([r.behavior_log_probs for r in records], pa.float32()),
        "reward": [r.reward for r in records],
        "reward_status": [r.reward_status for r in records],
        "finish_reason": [r.finish_reason for r in records],
        "prompt": [r.prompt for r in records],
        "response": [r.response for r in records],
        "metadata": [json.dumps(dict(r.metadata), default=str) if r.metadata else None for r in records],
    }
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, type=schema.field(name).type)
        for name, value in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _parquet_files(path: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(path, Path):
        return list(path) if all(file.suffix.lower() == ".parquet" for file in path) else []
    if path.is_dir():
        return rollout_files(path)
    return [path] if path.suffix == ".parquet" and path.is_file() else []


def _num_values(footer: Any, name: str) -> int | None:
    """Values of a list column in all row groups."""
    columns = [i for i in range(footer.num_columns) if footer.schema.column(i).path.startswith(name + ".")]
    if len(columns) != 1:
        return None
    return sum(footer.row_group(i).column(columns[0]).num_values for i in range(footer.num_row_groups))
