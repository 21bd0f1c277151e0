"""Small random caches, and the values that they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megatron_erpd.data.rollouts import Rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.manifest import file_digest
from megatron_erpd.teacher_cache import CacheMeta, CacheReader, CacheWriter, finalize
from megatron_erpd.teacher_cache.parts import payload_crc

VOCAB, K, HIDDEN = 40, 3, 4
PRINTS = {"base": "b" * 8, "teacher": "t" * 8}
TOKEN_META = CacheMeta("token", ("base", "teacher"), PRINTS, VOCAB, tokenizer_digest="tok")
TOPK_META = replace(
    TOKEN_META,
    kind="topk",
    signal="strong",
    projection={"mode": "per_token", "delta": 0.5, "grid": (0.0, 1.0)},
    k=K,
    topk_dtype="float32",
)
HIDDEN_META = replace(TOPK_META, topk_dtype="float16", hidden_size=HIDDEN, hidden_dtype="bfloat16")


def write_random_rollouts(path: Path) -> None:
    """Twelve, of one to eight response tokens."""
    rng = np.random.default_rng(0)
    rows = [
        Rollout(
            prompt_token_ids=rng.integers(0, VOCAB, rng.integers(1, 5)),
            response_token_ids=rng.integers(0, VOCAB, rng.integers(1, 9)),
            group_id=i // 4,
            reward=float(i % 2),
        )
        for i in range(12)
    ]
    write_rollouts(path, rows, {"tokenizer_digest": "tok"})


def log_probs_of(policy: str, i: int, size: int) -> np.ndarray:
    """float32 `[size]` of rollout `i`."""
    return -np.random.default_rng([i, len(policy)]).random(size).astype(np.float32)


def hidden_of(policy: str, i: int, size: int, width: int = HIDDEN) -> torch.Tensor:
    """float32 `[size, width]`."""
    values = np.random.default_rng([i, len(policy), 1]).normal(size=(size, width))
    return torch.from_numpy(values.astype(np.float32))


def target_of(i: int, size: int, vocab_size: int = VOCAB, k: int = K) -> dict[str, np.ndarray]:
    """What `write_topk` takes, float64, for rollout `i`."""
    rng = np.random.default_rng([i, 2])
    logits = rng.normal(size=(size, vocab_size)) * 3
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    indices = np.argsort(-log_q, axis=-1)[:, :k]
    top = np.take_along_axis(log_q, indices, -1)
    return {
        "indices": indices,
        "log_probs": top,
        "tail_log_prob": np.log1p(-np.exp(top).sum(-1)),
        "eta": rng.random(size),
        "target_kl": rng.random(size),
    }


def write_row(writer: CacheWriter, rollouts: Rollouts, i: int, tables: Iterable[str] | None = None) -> None:
    """A rollout's row of some or all tables."""
    key, size = (rollouts.sample_ids[i], rollouts.token_crc(i)), int(rollouts.response_lengths[i])
    for table in tables or writer.meta.tables:
        kind, _, policy = table.partition(".")
        if kind == "log_probs":
            writer.write_log_probs(policy, *key, log_probs_of(policy, i, size))
        elif kind == "hidden":
            writer.write_hidden(policy, *key, hidden_of(policy, i, size), f"layer of {policy}")
        else:
            writer.write_topk(*key, **target_of(i, size))


def fill(folder: Path, rollouts: Rollouts, meta: CacheMeta, writers: int = 1, **options: Any) -> None:
    """Rows of all rollouts, unfinished."""
    for rank in range(writers):
        with CacheWriter(folder, meta, rank, **options) as writer:
            for i in range(rank, len(rollouts), writers):
                write_row(writer, rollouts, i)


def make(folder: Path, rollouts: Rollouts, meta: CacheMeta, writers: int = 1, **options: Any) -> CacheReader:
    """A finished cache."""
    fill(folder, rollouts, meta, writers, **options)
    finalize(folder, meta, rollouts.sample_ids)
    return CacheReader(folder)


def contents(cache: CacheReader, names: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
    """All that a cache says about some rollouts, copied: table -> the stored columns' values, by sample and column."""
    return {
        name: {
            f"{table} {column}": np.array(values)
            for table in cache.meta.tables
            for column, values in cache.table(table).row(name).items()
        }
        for name in names
    }


def assert_same(ours: dict[str, dict[str, np.ndarray]], theirs: dict[str, dict[str, np.ndarray]]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, columns in theirs.items():
        assert ours[name].keys() == columns.keys()
        for column, values in columns.items():
            assert ours[name][column].tobytes() == values.tobytes(), f"{name} {column}"


def rewrite(path: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> None:
    """An Arrow file with another content. No checksum in `cache.json` follows."""
    changed = change(pa.ipc.open_file(path.read_bytes()).get_batch(0))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, changed.schema) as writer:
        writer.write_batch(changed)


def with_row(batch: pa.RecordBatch, row: int, **columns: Any) -> pa.RecordBatch:
    """A part in which one row has other values and the checksum that fits them."""
    values = batch.to_pydict()
    for name, value in columns.items():
        values[name][row] = value
    arrays = [pa.array(values[item.name], type=item.type) for item in batch.schema]
    payload = {
        item.name: array[row].values.to_numpy() for item, array in list(zip(batch.schema, arrays, strict=True))[4:]
    }
    if "payload_crc" not in columns:
        values["payload_crc"][row] = payload_crc(payload)
        arrays[3] = pa.array(values["payload_crc"], type=pa.uint32())
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def update_record(folder: Path, name: str) -> None:
    """`cache.json` follows a part that was changed, as somebody would do who wants to deceive."""
    index = json.loads((folder / "cache.json").read_text())
    for part in index["tables"][name.rpartition("/")[0].rpartition("/")[2]]["parts"]:
        if part["name"] == name:
            part |= {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    (folder / "cache.json").write_text(json.dumps(index))
