"""How many rollouts and tokens Parquet files hold, read from their footers alone, and how long the longest is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_erpd.errors import RolloutError

PROMPT, RESPONSE = "prompt_token_ids", "response_token_ids"


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


def longest_rollout(path: Path | Sequence[Path], prompt: str = PROMPT, response: str = RESPONSE) -> int:
    """Tokens of the longest rollout, prompt and response. Reads the two columns, a batch of rows at a time.

    Args:
        path, prompt, response: as in `count_rollouts`, which has found something there.
    """
    longest = 0
    for file in _parquet_files(path):
        for batch in pq.ParquetFile(file).iter_batches(columns=[prompt, response]):
            lengths = pc.add(*(pc.fill_null(pc.list_value_length(batch[name]), 0) for name in (prompt, response)))
            longest = max(longest, pc.max(lengths).as_py() or 0)
    return longest


def _parquet_files(path: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(path, Path):
        return list(path) if all(file.suffix.lower() == ".parquet" for file in path) else []
    names = path.glob("*.parquet") if path.is_dir() else [path] if path.suffix == ".parquet" and path.is_file() else []
    return sorted(p for p in names if not p.name.startswith((".", "_")))


def _num_values(footer: Any, name: str) -> int | None:
    """Values of a list column in all row groups."""
    columns = [i for i in range(footer.num_columns) if footer.schema.column(i).path.startswith(name + ".")]
    if len(columns) != 1:
        return None
    return sum(footer.row_group(i).column(columns[0]).num_values for i in range(footer.num_row_groups))
