"""Writers: nothing is lost, repeated or let through that can't be right."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache import CacheReader, CacheWriter, finalize, prepare_cache, writer
from megatron_erpd.teacher_cache.format import parts_in
from tests.unit.teacher_cache.caches import (
    HIDDEN_META,
    PRINTS,
    TOKEN_META,
    TOPK_META,
    VOCAB,
    K,
    assert_same,
    contents,
    fill,
    log_probs_of,
    make,
    target_of,
    write_row,
)

LOG_PROBS = "log_probs.base"


@pytest.mark.parametrize(("writers", "part_bytes"), [(1, 2**20), (3, 2**20), (2, 40)])
def test_any_writers_and_parts_make_the_same_cache(
    tmp_path: Path, rollouts: Rollouts, writers: int, part_bytes: int
) -> None:
    cache = make(tmp_path / "cache", rollouts, HIDDEN_META, writers, part_bytes=part_bytes)
    one = make(tmp_path / "one", rollouts, HIDDEN_META)
    assert_same(contents(cache, rollouts.sample_ids), contents(one, rollouts.sample_ids))
    for table in HIDDEN_META.tables:
        count = len(parts_in(tmp_path / "cache" / table))
        assert count > writers if part_bytes == 40 else count == writers
    for name, values in one.statistics.items():
        assert cache.statistics[name] == pytest.approx(values)


def test_statistics_are_of_all_tokens(tmp_path: Path, rollouts: Rollouts) -> None:
    """Over parts, writers and a resumption."""
    fill_some(tmp_path, rollouts, 0, range(0, 7), part_bytes=40)
    prepare_cache(tmp_path, TOPK_META)
    fill_some(tmp_path, rollouts, 0, range(7, 9))
    fill_some(tmp_path, rollouts, 1, range(9, 12))
    index = finalize(tmp_path, TOPK_META, rollouts.sample_ids)
    rows = [target_of(i, int(rollouts.response_lengths[i])) for i in range(12)]
    for name in ("eta", "target_kl"):
        values = np.concatenate([row[name] for row in rows])
        expected = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        assert CacheReader(tmp_path).statistics[name] == index.statistics[name] == pytest.approx(expected, rel=1e-12)


def fill_some(folder: Path, rollouts: Rollouts, rank: int, rows: range, **options: Any) -> None:
    with CacheWriter(folder, TOPK_META, rank, **options) as target:
        for i in rows:
            write_row(target, rollouts, i)


def test_an_interrupted_run_resumes_without_losing_or_repeating(tmp_path: Path, rollouts: Rollouts) -> None:
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, TOKEN_META, 0, part_bytes=60) as first:
        for i in range(12):
            if i == 5:
                first.flush()  # what was given may still wait for the thread
            if i == 8:
                raise KeyboardInterrupt
            write_row(first, rollouts, i)
    leftover = tmp_path / LOG_PROBS / ".part-00000-00099.arrow.ab12.tmp"
    leftover.write_bytes(b"cut")
    with pytest.raises(CacheError, match="samples are missing, the first is .*run the precompute stage again"):
        finalize(tmp_path, TOKEN_META, rollouts.sample_ids)

    done = prepare_cache(tmp_path, TOKEN_META)
    assert done.keys() == set(TOKEN_META.tables) and not leftover.exists()
    assert all(5 <= len(done[table]) <= 8 for table in done)
    before = {path: path.read_bytes() for table in done for path in parts_in(tmp_path / table)}
    for rank in range(2):  # two writers now
        with CacheWriter(tmp_path, TOKEN_META, rank) as second:
            for table in TOKEN_META.tables:
                lacking = [i for i, name in enumerate(rollouts.sample_ids) if name not in done[table]]
                for i in lacking[rank::2]:
                    write_row(second, rollouts, i, [table])
    finalize(tmp_path, TOKEN_META, rollouts.sample_ids)
    assert {path: path.read_bytes() for path in before} == before
    whole = make(tmp_path / "whole", rollouts, TOKEN_META)
    assert_same(contents(CacheReader(tmp_path), rollouts.sample_ids), contents(whole, rollouts.sample_ids))
    with pytest.raises(CacheError, match="is a complete cache already"):
        prepare_cache(tmp_path, TOKEN_META)


def test_flush_puts_all_rows_on_disk(tmp_path: Path, rollouts: Rollouts) -> None:
    with CacheWriter(tmp_path, TOKEN_META) as target:
        for i in range(5):
            write_row(target, rollouts, i, [LOG_PROBS])
        target.flush()
        assert prepare_cache(tmp_path, TOKEN_META)[LOG_PROBS] == set(rollouts.sample_ids[:5])
        target.flush()  # nothing new: no empty part
        write_row(target, rollouts, 5, [LOG_PROBS])
    assert len(parts_in(tmp_path / LOG_PROBS)) == 2


def test_resuming_under_other_settings_is_refused(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    other = replace(TOKEN_META, fingerprints=PRINTS | {"teacher": "new"})
    message = r"log_probs\.teacher/part-00000-00000\.arrow: was written with other .*fingerprints is .*tttttttt.*new"
    with pytest.raises(CacheError, match=message):
        prepare_cache(tmp_path, other)
    with pytest.raises(CacheError, match=message):
        finalize(tmp_path, other)


def test_finalize_refuses_duplicates_extras_and_nothing(tmp_path: Path, rollouts: Rollouts) -> None:
    with pytest.raises(CacheError, match="holds no parts"):
        finalize(tmp_path, TOKEN_META)
    fill(tmp_path, rollouts, TOKEN_META)
    with pytest.raises(CacheError, match="1 samples aren't among the rollouts, one is"):
        finalize(tmp_path, TOKEN_META, rollouts.sample_ids[1:])
    with CacheWriter(tmp_path, TOKEN_META, 1) as target:
        write_row(target, rollouts, 3)
    message = f"sample {rollouts.sample_ids[3]} is in part-00000-00000.arrow and in part-00001-00000.arrow"
    with pytest.raises(CacheError, match=message):
        finalize(tmp_path, TOKEN_META)
    assert not (tmp_path / "cache.json").exists()


def test_tables_must_hold_the_same_samples(tmp_path: Path, rollouts: Rollouts) -> None:
    with CacheWriter(tmp_path, TOKEN_META) as target:
        for i in range(3):
            write_row(target, rollouts, i, TOKEN_META.tables if i else [LOG_PROBS])
    with pytest.raises(CacheError, match=f"1 of 3 samples are missing, the first is {rollouts.sample_ids[0]}"):
        finalize(tmp_path, TOKEN_META)


def test_one_output_layer_per_table(tmp_path: Path, rollouts: Rollouts) -> None:
    for rank, layer in enumerate(("one", "two")):
        with CacheWriter(tmp_path, HIDDEN_META, rank) as target:
            write_row(target, rollouts, rank, HIDDEN_META.tables[:3])
            for policy in PRINTS:
                target.write_hidden(policy, rollouts.sample_ids[rank], 1, torch.zeros(2, 4), layer)
    with pytest.raises(CacheError, match=r"says \{'output_layer': 'two'\}, part-00000.* of different policies"):
        finalize(tmp_path, HIDDEN_META)


# Errors come out of the thread


@pytest.mark.parametrize("surfaces", ["on the next write", "on close"])
def test_an_error_of_a_row_comes_out(tmp_path: Path, surfaces: str) -> None:
    target = CacheWriter(tmp_path, TOKEN_META)
    target.write_log_probs("base", "good", 0, np.array([-1.0]))
    target.write_log_probs("base", "bad", 0, np.array([-1.0, np.nan]))
    message = "sample bad: log_probs is nan at response token 1; has the policy diverged"
    with pytest.raises(CacheError, match=message):
        if surfaces == "on close":
            target.close()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            target.write_log_probs("base", "another", 0, np.array([-1.0]))
    target.abort()
    assert not parts_in(tmp_path / LOG_PROBS)


def test_an_error_of_the_caller_drops_parts_in_progress(tmp_path: Path, rollouts: Rollouts) -> None:
    with pytest.raises(RuntimeError, match="mine"), CacheWriter(tmp_path, TOKEN_META) as target:
        write_row(target, rollouts, 0)
        raise RuntimeError("mine")
    assert prepare_cache(tmp_path, TOKEN_META) == dict.fromkeys(TOKEN_META.tables, frozenset())
    assert not any(thread.name.startswith("teacher-cache") for thread in threading.enumerate())


def test_no_more_than_a_queue_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is slower than the model makes the model wait, not the memory grow."""
    row, written, released = np.full(10, -1.0, np.float32), [], threading.Event()
    whole = writer._log_probs_row

    def slow(values: np.ndarray) -> dict[str, np.ndarray]:
        released.wait(30)
        return whole(values)

    monkeypatch.setattr(writer, "_log_probs_row", slow)
    monkeypatch.setattr(writer, "QUEUE_BYTES", 3 * row.nbytes)
    target = CacheWriter(tmp_path, replace(TOKEN_META, policies=("base",), fingerprints={"base": "b"}))

    def work() -> None:
        for i in range(8):
            target.write_log_probs("base", f"s{i}", 0, row)
            written.append(i)
        target.write_log_probs("base", "large", 0, np.tile(row, 9))  # more than the queue: it waits alone
        target.close()

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 20
    while len(written) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    assert written == [0, 1, 2]
    released.set()
    thread.join(30)
    assert written == list(range(8))
    assert finalize(tmp_path, target.meta).num_rows == 9


def test_a_part_of_more_elements_than_arrow_counts(
    tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_erpd.teacher_cache import parts

    monkeypatch.setattr(parts, "MAX_ELEMENTS", 8)
    target = CacheWriter(tmp_path, TOKEN_META)
    target.write_log_probs("base", "long", 0, np.full(6, -1.0))
    target.write_log_probs("base", "short", 0, np.full(3, -1.0))
    with pytest.raises(CacheError, match="sample long and 1 others have more than 8 elements in a column"):
        target.close()


# Rows that can't be right


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-1.0, np.nan], "log_probs is nan at response token 1; has the policy diverged"),
        ([-1.0, -np.inf], "log_probs is -inf at response token 1"),
        ([[-1.0]], "log_probs must be flat"),
        ([], "at least one token"),
    ],
)
def test_log_probs_that_can_not_be_right(tmp_path: Path, values: list[float], message: str) -> None:
    with pytest.raises(CacheError, match=f"sample s: .*{message}"), CacheWriter(tmp_path, TOKEN_META) as target:
        target.write_log_probs("base", "s", 0, np.array(values))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.full((2, K), VOCAB)}, "integer ids in"),
        ({"indices": np.full((2, K), -1)}, "integer ids in"),
        ({"indices": np.zeros((2, K))}, "integer ids in"),
        ({"indices": np.array([[0, 1, 2], [3, 5, 3]])}, "a vocabulary entry twice at token 1"),
        ({"indices": np.zeros((2, K + 1), int)}, "indices has shape"),
        ({"log_probs": np.zeros((3, K))}, "log_probs has shape"),
        ({"tail_log_prob": np.array([-np.inf, -np.inf])}, "have mass 0.75.* at token 0, expected 1"),
        ({"tail_log_prob": np.array([np.log(0.25), np.nan])}, "have mass nan at token 1"),
        ({"log_probs": np.full((2, K), np.nan)}, "have mass nan"),
        ({"eta": np.array([0.0, np.nan])}, "eta is nan at response token 1"),
        ({"eta": np.zeros(3)}, "eta has shape"),
        ({"target_kl": np.array([np.inf, 0.0])}, "target_kl is inf at response token 0"),
    ],
)
def test_targets_that_can_not_be_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {
        "indices": np.array([[0, 1, 2], [3, 4, 5]]),
        "log_probs": np.full((2, K), np.log(0.25)),
        "tail_log_prob": np.full(2, np.log(0.25)),
        "eta": np.zeros(2),
        "target_kl": np.zeros(2),
    }
    target = CacheWriter(tmp_path, TOPK_META)
    target.write_topk("good", 0, **good)
    target.write_topk("s", 0, **(good | change))
    with pytest.raises(CacheError, match=f"sample s: .*{message}"):
        target.close()


@pytest.mark.parametrize(
    ("hidden", "dtype", "message"),
    [
        (torch.zeros(2, 5), "bfloat16", r"expected \[R, 4\]"),
        (torch.zeros(0, 4), "bfloat16", r"expected \[R, 4\]"),
        (torch.tensor([[0.0] * 4, [0.0, torch.nan, 0.0, 0.0]]), "float32", "aren't finite at response token 1"),
        (torch.full((1, 4), 7e4), "float16", "aren't finite at response token 0 in float16"),
    ],
)
def test_hidden_states_that_can_not_be_right(tmp_path: Path, hidden: torch.Tensor, dtype: str, message: str) -> None:
    meta = replace(HIDDEN_META, hidden_dtype=dtype)
    with pytest.raises(CacheError, match=f"sample s: .*{message}"), CacheWriter(tmp_path, meta) as target:
        target.write_hidden("base", "s", 0, hidden, "layer")


def test_an_empty_tail_is_kept(tmp_path: Path) -> None:
    row = {
        "indices": np.array([[3, 4, 5]]),
        "log_probs": np.log([[0.5, 0.25, 0.25]]),
        "tail_log_prob": np.array([-np.inf]),
        "eta": np.zeros(1),
        "target_kl": np.zeros(1),
    }
    with CacheWriter(tmp_path, TOPK_META) as target:
        for policy in PRINTS:
            target.write_log_probs(policy, "one", 1, log_probs_of(policy, 0, 1))
        target.write_topk("one", 1, **row)
    finalize(tmp_path, TOPK_META)
    assert np.isneginf(CacheReader(tmp_path).topk_row("one").tail_log_prob).all()


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(CacheError, match="sample s: this cache has no table 'hidden.base', only"),
        CacheWriter(tmp_path, TOKEN_META) as target,
    ):
        target.write_hidden("base", "s", 0, torch.zeros(1, 4), "layer")
