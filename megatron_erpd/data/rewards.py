"""Rewards apart from the rollouts that they are of: Parquet files with a row for each rollout, by its name.

Rollouts carry the rewards that they got when they were sampled. Rewards of a verifier that has changed since are stored
here, so that tokens and log-probs, and what was computed from them, stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.data.schema import SCORED, UNVERIFIED
from megatron_erpd.errors import RolloutError, StageError
from megatron_erpd.files import new_file, write_json
from megatron_erpd.manifest import CONTENT, input_digest, read_manifest

STAGE = "score"
"""The command that makes them, as their manifest names it."""
_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("reward", pa.float32()),
        pa.field("reward_status", pa.string(), nullable=False),
        pa.field("verifier_error", pa.string()),
    ]
)


def write_rewards(
    path: Path, names: Sequence[str], rewards: Sequence[float | None], errors: Sequence[str | None]
) -> None:
    """Writes the rewards of some rollouts, by their names; the file appears under its name only when it is complete.

    Args:
        rewards: None for unverified.
        errors: with what the verifier failed, where it did.
    """
    status = [UNVERIFIED if reward is None else SCORED for reward in rewards]
    columns = [list(names), list(rewards), status, list(errors)]
    table = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rewards(files: Iterable[Path]) -> tuple[list[str], np.ndarray, list[str | None]]:
    """Names, rewards (float32, NaN for unverified) and errors of all rows of the files, in their order.

    Raises:
        RolloutError: a file can't be read; names it.
    """
    tables = []
    for path in files:
        try:
            tables.append(pq.read_table(path, schema=_SCHEMA))
        except (pa.ArrowException, OSError) as error:
            raise RolloutError(f"{path}: can't be read as rewards ({error}); score the rollouts again") from None
    table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
    rewards = table.column("reward").to_numpy().astype(np.float32, copy=False)
    return table.column("sample_id").to_pylist(), rewards, table.column("verifier_error").to_pylist()


def reward_files(folder: Path) -> list[Path]:
    """The files of an artifact of rewards, in the order of the rollouts' files."""
    return sorted(folder.glob("rewards*.parquet"))


def write_content(folder: Path, rollouts: Rollouts) -> int:
    """Says what the rewards in `folder`, of all `rollouts`, are as an input of what trains on them: a digest of the
    reward of every rollout, or nothing where they are the rollouts' own.

    Returns:
        How many rewards are other than the rollouts' own.
    """
    names, rewards, _ = read_rewards(reward_files(folder))
    own = dict(zip(rollouts.sample_ids, rollouts.rewards, strict=True))
    pairs = sorted(zip(names, rewards, strict=True), key=lambda pair: pair[0])
    changed = sum(not _same(own[name], reward) for name, reward in pairs)
    digest = hashlib.sha256(b"megatron_erpd.rewards.v1")
    for name, reward in pairs:
        digest.update(f"{name}\0{'' if np.isnan(reward) else np.float32(reward).tobytes().hex()}\n".encode())
    write_json(folder / CONTENT, {"digest": digest.hexdigest() if changed else None})
    return changed


def with_rewards(rollouts: Rollouts, path: Path, rewards: Path) -> Rollouts:
    """The rollouts with the rewards of an artifact of `megatron-erpd score` in place of their own.

    Args:
        path: where the rollouts are from.
        rewards: the artifact.

    Raises:
        StageError: the folder holds no finished rewards, or they are of other rollouts.
        RolloutError: a rollout has no reward among them.
    """
    manifest = read_manifest(rewards)
    if manifest.stage != STAGE:
        raise StageError(f"{rewards}: was written by `{manifest.stage}`; give what `megatron-erpd score` wrote")
    if manifest.inputs.get("rollouts") != input_digest(path):
        raise StageError(f"{rewards}: holds the rewards of other rollouts than {path}; score these")
    names, values, _ = read_rewards(reward_files(rewards))
    found = dict(zip(names, values, strict=True))
    missing = [name for name in rollouts.sample_ids if name not in found]
    if missing:
        raise RolloutError(
            f"{rewards}: holds no reward of {len(missing)} of {len(rollouts)} rollouts of {path}, the first is "
            f"{missing[0]}; score them again"
        )
    return rollouts.rescored(np.array([found[name] for name in rollouts.sample_ids], dtype=np.float32))


def is_of(rewards: Path, rollouts: Path) -> bool:
    """Whether a folder holds finished rewards of exactly these rollouts."""
    try:
        manifest = read_manifest(rewards)
    except StageError:
        return False
    return manifest.stage == STAGE and manifest.inputs.get("rollouts") == input_digest(rollouts)


def content_digest(folder: Path) -> str | None:
    """What `write_content` said of an artifact of rewards.

    Raises:
        StageError: the artifact is not finished, or is not one of rewards.
    """
    read_manifest(folder)
    try:
        digest: str | None = json.loads((folder / CONTENT).read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{folder / CONTENT}: can't be read ({error}); score the rollouts again") from None
    return digest


def _same(one: np.float32, other: np.float32) -> bool:
    return bool(one == other or (np.isnan(one) and np.isnan(other)))
