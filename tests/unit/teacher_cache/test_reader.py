"""Reading: any order, only what is needed, and never a row of something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache import CacheReader, CacheWriter, finalize, prepare_cache, reader
from megatron_erpd.teacher_cache.packing import high_bytes
from megatron_erpd.teacher_cache.reader import UnfinishedHidden
from tests.tolerances import FP32, HALF_PRECISION
from tests.unit.teacher_cache.caches import (
    HIDDEN_META,
    PRINTS,
    TOKEN_META,
    TOPK_META,
    K,
    fill,
    hidden_of,
    log_probs_of,
    make,
    target_of,
    write_row,
)


def test_log_probs_are_what_was_written(tmp_path: Path, rollouts: Rollouts) -> None:
    assert prepare_cache(tmp_path, TOKEN_META) == dict.fromkeys(TOKEN_META.tables, frozenset())
    cache = make(tmp_path, rollouts, TOKEN_META, writers=3)
    cache.check(rollouts)
    assert cache.meta == TOKEN_META and cache.num_rows == 12
    assert cache.num_tokens == rollouts.response_lengths.sum()
    assert sorted(cache.sample_ids()) == sorted(rollouts.sample_ids)
    for i in np.random.default_rng(0).permutation(12):
        for policy in TOKEN_META.policies:
            row = cache.token_row(policy, rollouts.sample_ids[i])
            assert row.dtype == np.float32
            np.testing.assert_array_equal(row, log_probs_of(policy, i, rollouts.response_lengths[i]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_targets_are_what_was_written(tmp_path: Path, rollouts: Rollouts, dtype: str) -> None:
    cache = make(tmp_path, rollouts, replace(TOPK_META, topk_dtype=dtype), writers=2)
    close = FP32 if dtype == "float32" else HALF_PRECISION
    for i, name in enumerate(rollouts.sample_ids):
        size = int(rollouts.response_lengths[i])
        expected, row = target_of(i, size), cache.topk_row(name)
        assert row.indices.dtype == np.int32 and row.log_probs.dtype == row.tail_log_prob.dtype == np.float32
        assert row.indices.shape == row.log_probs.shape == (size, K) and row.tail_log_prob.shape == (size,)
        np.testing.assert_array_equal(row.indices, expected["indices"])
        np.testing.assert_array_equal(row.tail_log_prob, expected["tail_log_prob"].astype(np.float32))
        close.assert_close(row.log_probs.tolist(), expected["log_probs"].tolist())


@pytest.mark.parametrize("k", [1, 3, 4, 5])
@pytest.mark.parametrize("vocab_size", [40, 70_000, 300_000])
def test_targets_of_few_entries(tmp_path: Path, vocab_size: int, k: int) -> None:
    """Shapes too: a column one wide is still `[R, 1]`."""
    meta = replace(TOPK_META, policies=("base",), fingerprints={"base": "b"}, vocab_size=vocab_size, k=k)
    expected = target_of(0, 6, vocab_size, k)
    with CacheWriter(tmp_path, meta) as writer:
        writer.write_log_probs("base", "one", 1, log_probs_of("base", 0, 6))
        writer.write_topk("one", 1, **expected)
    finalize(tmp_path, meta)
    cache = CacheReader(tmp_path)
    row = cache.topk_row("one")
    np.testing.assert_array_equal(row.indices, expected["indices"])
    FP32.assert_close(row.log_probs.tolist(), expected["log_probs"].tolist())
    shapes = {name: values.shape for name, values in cache.packed_topk_row("one").items()}
    high = high_bytes(k, vocab_size)
    assert shapes == {
        "topk_scores": (6, k),
        "topk_ids_low": (6, k),
        **({"topk_ids_high": (6, high)} if high else {}),
        "log_normalizer": (6,),
        "tail_log_prob": (6,),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hidden_states_are_what_was_written(tmp_path: Path, rollouts: Rollouts, dtype: str) -> None:
    cache = make(tmp_path, rollouts, replace(HIDDEN_META, hidden_dtype=dtype))
    for i, name in enumerate(rollouts.sample_ids):
        row = cache.hidden_row("teacher", name)
        expected = hidden_of("teacher", i, int(rollouts.response_lengths[i])).to(getattr(torch, dtype))
        assert row.dtype == expected.dtype and torch.equal(row, expected)
    assert cache.table("hidden.teacher").facts == {"output_layer": "layer of teacher"}


def test_hidden_states_of_a_cache_in_the_making(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, HIDDEN_META, 2)
    stored = UnfinishedHidden(tmp_path, HIDDEN_META)
    cache = make(tmp_path / "whole", rollouts, HIDDEN_META)
    for name in rollouts.sample_ids:
        assert torch.equal(stored.hidden_row("base", name), cache.hidden_row("base", name))


def test_rows_are_views_of_the_mapped_file(tmp_path: Path, rollouts: Rollouts) -> None:
    cache = make(tmp_path, rollouts, TOKEN_META)
    before = pa.total_allocated_bytes()
    row = cache.token_row("base", rollouts.sample_ids[0])
    assert pa.total_allocated_bytes() - before < 1024  # the payload isn't in Arrow's heap
    assert not row.flags.writeable and not row.flags.owndata


def test_parts_are_opened_when_they_are_needed(
    tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, rollouts, TOKEN_META, part_bytes=8)  # about a part per rollout
    opened, part = [], reader.Part

    def counted(path: Path, *arguments: Any) -> Any:
        opened.append(path)
        return part(path, *arguments)

    monkeypatch.setattr(reader, "Part", counted)
    cache = CacheReader(tmp_path)
    table = cache.table("log_probs.base")
    assert table.num_parts >= 8 and not opened
    for _ in range(3):
        cache.token_row("base", rollouts.sample_ids[6])
    assert len(opened) == 1, "once, and of one table"
    cache.token_row("base", rollouts.sample_ids[0])
    assert len(opened) == 2
    cache.check(rollouts.select([0, 6]), ["log_probs.base"])
    assert len(opened) == 2
    number = next(n for n in range(table.num_parts) if table._parts[n] is not None)
    table.close_part(number)
    table.part(number)
    assert len(opened) == 3


def test_check_names_the_sample_and_what_to_do(tmp_path: Path, rollouts: Rollouts) -> None:
    name = rollouts.sample_ids[5]

    def cache_with(folder: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> CacheReader:
        with CacheWriter(tmp_path / folder, TOKEN_META) as writer:
            for i in range(len(rollouts)):
                for policy in PRINTS:
                    values = log_probs_of(policy, i, int(rollouts.response_lengths[i]))
                    row = {"sample_id": rollouts.sample_ids[i], "crc": rollouts.token_crc(i), "log_probs": values}
                    changed = change(row) if i == 5 else row
                    if changed is not None:
                        writer.write_log_probs(policy, **changed)
        finalize(tmp_path / folder, TOKEN_META)
        return CacheReader(tmp_path / folder)

    longer = lambda row: row | {"log_probs": np.tile(row["log_probs"], 2)}  # noqa: E731
    for number, (change, message) in enumerate(
        [
            (lambda row: None, f"log_probs.base has no row for sample {name} .*row 5.*precompute the cache again"),
            (lambda row: row | {"crc": row["crc"] ^ 1}, f"sample {name} .* for other token ids .*precompute"),
            (longer, f"sample {name} .* response tokens, the rollout has"),
        ]
    ):
        cache = cache_with(str(number), change)
        with pytest.raises(CacheError, match=message):
            cache.check(rollouts)
        cache.check(rollouts.select([0, 1, 2]))  # other rows may be there too


def test_another_tokenizer(tmp_path: Path, rollouts: Rollouts) -> None:
    cache = make(tmp_path, rollouts, replace(TOKEN_META, tokenizer_digest="other"))
    with pytest.raises(
        CacheError, match="tokenizer_digest is other, the rollouts' is tok: made with another tokenizer"
    ):
        cache.check(rollouts)
    make(tmp_path / "unknown", rollouts, replace(TOKEN_META, tokenizer_digest=None)).check(rollouts)


def test_another_teacher(tmp_path: Path, rollouts: Rollouts) -> None:
    cache = make(tmp_path, rollouts, TOKEN_META)
    cache.require_policies({"base": PRINTS["base"]})
    cache.require_policies(PRINTS)
    with pytest.raises(CacheError, match="made from another teacher: policy 'teacher' has fingerprint tttttttt"):
        cache.require_policies({"base": PRINTS["base"], "teacher": "new"})
    with pytest.raises(CacheError, match="has no policy 'unlearned', only base, teacher"):
        cache.require_policies({"unlearned": "u"})


def test_asking_for_what_is_not_there(tmp_path: Path, rollouts: Rollouts) -> None:
    cache = make(tmp_path, rollouts, TOKEN_META)
    name = rollouts.sample_ids[0]
    for ask, message in (
        (lambda: cache.token_row("base", "nobody"), "log_probs.base: has no row for sample nobody; precompute"),
        (lambda: cache.token_row("unlearned", name), "has no policy 'unlearned'"),
        (lambda: cache.topk_row(name), "holds no target; precompute with --kind topk"),
        (lambda: cache.hidden_row("base", name), "holds no hidden states of 'base'; precompute with --keep-hidden"),
        (lambda: cache.table("x"), r"has no table 'x' \(its tables are log_probs.base, log_probs.teacher\)"),
    ):
        with pytest.raises(CacheError, match=message):
            ask()


def test_slices_are_read_where_they_lie(tmp_path: Path, rollouts: Rollouts) -> None:
    """Parts in folders of independent jobs, one index over all."""
    folders = [tmp_path / f"slice-{number:04d}-of-0002" for number in (1, 2)]
    for number, folder in enumerate(folders):
        with CacheWriter(folder, TOPK_META) as writer:
            for i in range(number, 12, 2):
                write_row(writer, rollouts, i)
    index = finalize(tmp_path, TOPK_META, rollouts.sample_ids, slices=folders)
    cache = CacheReader(tmp_path)
    cache.check(rollouts)
    names = [part["name"] for part in index.tables["topk"].parts]
    assert names == [f"{folder.name}/topk/part-00000-00000.arrow" for folder in folders]
    whole = make(tmp_path / "whole", rollouts, TOPK_META)
    for figure, values in whole.statistics.items():
        assert cache.statistics[figure] == pytest.approx(values)
    for name in rollouts.sample_ids:
        np.testing.assert_array_equal(cache.topk_row(name).log_probs, whole.topk_row(name).log_probs)
