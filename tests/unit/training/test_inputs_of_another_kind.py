"""What a training reads must be of its own model and precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.errors import CacheError
from megatron_erpd.manifest import input_digest, write_manifest
from megatron_erpd.model.compatible import SOURCE_POLICY, check_data
from megatron_erpd.teacher_cache.finalize import finalize
from megatron_erpd.teacher_cache.format import CacheMeta
from megatron_erpd.teacher_cache.rows import open_cache
from megatron_erpd.teacher_cache.writer import CacheWriter
from tests.integration.tiny import VOCAB_SIZE, write_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model(tmp_path / "base" / "hf")
    write_manifest(tmp_path / "base", "import", {}, {}, {SOURCE_POLICY: "abc"})
    return tmp_path / "base"


def rollouts_with(path: Path, **metadata: str) -> Rollouts:
    write_rollouts(path, [Rollout(np.array([1, 2]), np.array([3, 4]), 0, reward=1.0)], metadata)
    return read_rollouts(path)


@pytest.mark.parametrize(
    ("metadata", "notes"),
    [
        ({}, ["records no tokenizer"]),
        ({"tokenizer_digest": "1"}, ["holds no tokenizer"]),
        ({"policy": "abc"}, ["records no tokenizer"]),
        ({"policy": "other"}, ["records no tokenizer", "was sampled from another model than"]),
    ],
)
def test_notes_on_rollouts(metadata: dict[str, str], notes: list[str], base: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    found = check_data(rollouts_with(path, **metadata), path, base)
    assert len(found) == len(notes) and all(words in note for words, note in zip(notes, found, strict=True))


@pytest.mark.parametrize("recorded", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["manifest", "cache"])
def test_log_probs_of_another_precision(recorded: str, where: str, base: Path, tmp_path: Path) -> None:
    """`where` it is recorded: caches of before have it in their settings alone."""
    rollouts = rollouts_with(tmp_path / "r.parquet")
    meta = CacheMeta(
        "token", ("base",), {"base": input_digest(base)}, VOCAB_SIZE, precision=recorded if where == "cache" else "fp32"
    )
    cache = tmp_path / "cache"
    with CacheWriter(cache, meta) as writer:
        writer.write_log_probs("base", rollouts.sample_ids[0], rollouts.token_crc(0), np.zeros(2, np.float32))
    finalize(cache, meta, rollouts.sample_ids)
    write_manifest(cache, "precompute", {"precision": recorded} if where == "manifest" else {}, {})
    assert open_cache(cache, rollouts, {"base": base}, recorded).num_rows == 1
    other = {"fp32": "bf16", "bf16": "fp32"}[recorded]
    words = f"computed in {recorded}, this training computes in {other}.*--precision {other}.*--precision {recorded}"
    with pytest.raises(CacheError, match=words):
        open_cache(cache, rollouts, {"base": base}, other)
