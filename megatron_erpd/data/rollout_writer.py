"""Writing rollouts: checked row by row, in bounded row groups, published by rename when all of it is on disk."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_erpd.data.ragged import list_array
from megatron_erpd.data.schema import (
    METADATA_KEY,
    ROLLOUT_SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    Rollout,
    RowProblem,
    check_record,
    log_prob_array,
    reward_value,
    sample_id,
    token_array,
)
from megatron_erpd.errors import RolloutError
from megatron_erpd.files import new_file

ROW_GROUP_ROWS = 10_000
# Long responses fill a row group sooner: 16M tokens are 64 MiB of ids, and as much again of log-probs.
ROW_GROUP_TOKENS = 16_000_000


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
