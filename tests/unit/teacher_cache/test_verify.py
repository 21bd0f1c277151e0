"""Offline verification: a whole cache has no problem, and each kind of damage is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.teacher_cache import CacheMeta, CacheWriter, finalize, verify
from megatron_erpd.teacher_cache.index import write_index
from megatron_erpd.teacher_cache.verify import SHOWN, verify_cache
from tests.unit.teacher_cache.caches import (
    HIDDEN,
    HIDDEN_META,
    TOKEN_META,
    TOPK_META,
    fill,
    make,
    rewrite,
    update_record,
    with_row,
    write_row,
)

BASE, TARGET, STATES = "log_probs.base", "topk", "hidden.base"
PART = "part-00000-00000.arrow"


@pytest.mark.parametrize(
    "meta",
    [TOKEN_META, TOPK_META, *(replace(HIDDEN_META, hidden_dtype=t) for t in ("bfloat16", "float16", "float32"))],
    ids=["token", "topk", "bfloat16", "float16", "float32"],
)
@pytest.mark.parametrize("part_bytes", [40, 2**20])
def test_a_whole_cache_has_no_problem(tmp_path: Path, rollouts: Rollouts, meta: CacheMeta, part_bytes: int) -> None:
    make(tmp_path, rollouts, meta, writers=2, part_bytes=part_bytes)
    seen: list[tuple[int, int]] = []
    assert verify_cache(tmp_path, rollouts, lambda done, total: seen.append((done, total))) == []
    size = sum(path.stat().st_size for path in tmp_path.rglob("part-*"))
    assert seen[-1] == (size, size) and seen == sorted(seen)
    assert verify_cache(str(tmp_path)) == []


def test_slices_have_no_problem(tmp_path: Path, rollouts: Rollouts) -> None:
    folders = [tmp_path / f"slice-000{number}-of-0002" for number in (1, 2)]
    for number, folder in enumerate(folders):
        with CacheWriter(folder, HIDDEN_META) as writer:
            for i in range(number, 12, 2):
                write_row(writer, rollouts, i)
    finalize(tmp_path, HIDDEN_META, rollouts.sample_ids, slices=folders)
    assert verify_cache(tmp_path, rollouts) == []


def test_no_part_stays_open(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of a part or two, however many there are."""
    import weakref

    from megatron_erpd.teacher_cache import reader
    from megatron_erpd.teacher_cache.parts import Part

    make(tmp_path, rollouts, HIDDEN_META, part_bytes=8)
    most, opened = [0], weakref.WeakSet[Part]()

    class Counted(Part):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.add(self)
            most[0] = max(most[0], len(opened))

    monkeypatch.setattr(verify, "Part", Counted)
    monkeypatch.setattr(reader, "Part", Counted)
    monkeypatch.setattr(verify, "_CHUNK", 1)
    assert verify_cache(tmp_path, rollouts) == []
    assert len(list((tmp_path / STATES).glob("part-*"))) >= 8 and 1 <= most[0] <= 3


Damage = Callable[[Path, Rollouts], object]


def flip(name: str) -> Damage:
    def damage(folder: Path, rollouts: Rollouts) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(bytes(data))

    return damage


def rows(name: str, change: Callable[[pa.RecordBatch], pa.RecordBatch], follows: bool = False) -> Damage:
    def damage(folder: Path, rollouts: Rollouts) -> None:
        rewrite(folder / name, change)
        if follows:
            update_record(folder, name)

    return damage


def row(name: str, **columns: Any) -> Damage:
    """Other values in row 2 of a part that otherwise fits its checksums."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        size = batch.column("num_tokens")[2].as_py()
        return with_row(batch, 2, **{k: v(batch, size) if callable(v) else v for k, v in columns.items()})

    return rows(name, change, follows=True)


def described(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path, rollouts: Rollouts) -> None:
        values = json.loads((folder / "cache.json").read_text())
        change(values)
        (folder / "cache.json").write_text(json.dumps(values))

    return damage


def set_at(*where: Any) -> Damage:
    *keys, last, value = where

    def change(values: dict[str, Any]) -> None:
        for key in keys:
            values = values[key]
        values[last] = value

    return described(change)


def facts(table: str, **changed: Any) -> Damage:
    """Other facts in a part."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        key = b"megatron_erpd.cache.part"
        about = json.loads(batch.schema.metadata[key])
        about["facts"] |= changed
        return batch.replace_schema_metadata({key: json.dumps(about).encode()})

    return rows(f"{table}/{PART}", change, follows=True)


def another_index(table: str, sample_ids: Callable[[list[str]], list[list[str]]]) -> Damage:
    def damage(folder: Path, rollouts: Rollouts) -> None:
        names = pa.ipc.open_file((folder / table / PART).read_bytes()).get_batch(0).column("sample_id").to_pylist()
        write_index(folder / table / "index.arrow", sample_ids(names))

    return damage


def nan_at_first(batch: pa.RecordBatch, size: int) -> list[float]:
    return [float("nan")] + [-1.0] * (size - 1)


DAMAGE: dict[str, tuple[Damage, str]] = {
    "nothing there": (lambda folder, _: shutil.rmtree(folder), "isn't a teacher cache"),
    "unfinished": (lambda folder, _: (folder / "cache.json").unlink(), "is unfinished .*run the precompute stage"),
    "no description": (lambda folder, _: (folder / "cache.json").write_text("{"), "cache.json: is damaged"),
    "rows of all": (set_at("tables", TARGET, "num_rows", 13), "num_rows of topk is 13, its parts have 12"),
    "tokens of all": (set_at("tables", BASE, "num_tokens", 3), "num_tokens of log_probs.base is 3, its parts have"),
    "rows of a part": (set_at("tables", BASE, "parts", 0, "num_rows", 11), "12 rows, cache.json says 11"),
    "tokens of a part": (
        set_at("tables", BASE, "parts", 0, "num_tokens", 3),
        f"{BASE}/{PART}: has .* response tokens, cache.json says 3",
    ),
    "bytes": (set_at("tables", BASE, "parts", 0, "bytes", 5), "bytes, cache.json says 5"),
    "sha256": (set_at("tables", BASE, "parts", 0, "sha256", "0" * 64), "its SHA-256 is .*, cache.json says 000"),
    "statistics": (set_at("statistics", "eta", "mean", 7.0), "cache.json: mean of eta is 7.0, its parts say 0"),
    "no statistics": (set_at("statistics", {}), "mean of target_kl is nan"),
    "statistics of a part": (facts(TARGET, statistics={"eta": 3}), f"{TARGET}/{PART}: is damaged .statistics"),
    "output layer": (facts(STATES, output_layer="of another"), "says {'output_layer': 'of another'} of its table"),
    "no output layer": (
        set_at("tables", STATES, "facts", {}),
        "says {'output_layer': 'layer of base'} of its table, cache.json says {}",
    ),
    "fingerprint": (set_at("fingerprints", "teacher", "new"), "fingerprints is .*tttttttt.*, expected .*new"),
    "bit of a payload": (flip(f"{BASE}/{PART}"), f"{BASE}/{PART}: "),
    "truncated": (lambda f, _: (f / TARGET / PART).write_bytes((f / TARGET / PART).read_bytes()[:-50]), "is damaged"),
    "missing": (lambda f, _: (f / TARGET / PART).unlink(), f"{TARGET}/{PART}: is listed in cache.json but missing"),
    "not listed": (
        lambda f, _: shutil.copy(f / TARGET / PART, f / TARGET / "part-00007-00000.arrow"),
        "part-00007-00000.arrow: isn't listed in cache.json and is never read; delete it",
    ),
    "index missing": (lambda f, _: (f / BASE / "index.arrow").unlink(), "index.arrow: is damaged"),
    "index of others": (another_index(BASE, lambda n: [["x", *n[1:]]]), "index.arrow: doesn't lead to sample"),
    "index reordered": (another_index(BASE, lambda n: [[n[1], n[0], *n[2:]]]), "index.arrow: doesn't lead to sample"),
    "index of other parts": (another_index(BASE, lambda n: [[], n]), "index.arrow: doesn't lead to sample"),
    "log-prob above 0": (
        row(f"{BASE}/{PART}", log_probs=lambda batch, size: [0.1] * size),
        r"sample \w+ \(row 2\): a log-prob that isn't finite or above 0 at response token 0; delete",
    ),
    "log-prob not finite": (row(f"{BASE}/{PART}", log_probs=nan_at_first), "a log-prob that isn't finite"),
    "id beyond": (
        row(f"{TARGET}/{PART}", topk_ids_low=lambda batch, size: [0, 1, 40] * size),
        "an id beyond the vocabulary of 40 at response token 0",
    ),
    "id twice": (row(f"{TARGET}/{PART}", topk_ids_low=lambda batch, size: [5, 1, 5] * size), "an id twice"),
    "mass": (row(f"{TARGET}/{PART}", tail_log_prob=lambda batch, size: [-0.01] * size), "don't add up to 1"),
    "mass not a number": (row(f"{TARGET}/{PART}", log_normalizer=nan_at_first), "don't add up to 1"),
    "hidden states": (
        row(f"{STATES}/{PART}", hidden=lambda batch, size: [0] * (size * HIDDEN - 1) + [0x7F80]),
        "hidden states that aren't finite",
    ),
    "payload": (row(f"{BASE}/{PART}", payload_crc=1), r"the payload of sample \w+ \(row 2\) isn't what was written"),
    "other tokens in a table": (row(f"{BASE}/{PART}", crc=1), "is for other tokens than that in"),
    "a row's length": (
        row(f"{BASE}/{PART}", num_tokens=lambda batch, size: size + 1),
        "its rows aren't as long as num_tokens says",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path / "cache", rollouts, HIDDEN_META)
    damage, message = DAMAGE[kind]
    damage(tmp_path / "cache", rollouts)
    problems = verify_cache(tmp_path / "cache")
    assert problems and all(str(tmp_path / "cache") in text for text in problems)
    assert any(re.search(message, text) for text in problems), problems
    assert all("; " in text for text in problems), "each says what to do"
    verify_cache(tmp_path / "cache", rollouts)  # no traceback either


def test_a_sample_twice(tmp_path: Path, rollouts: Rollouts) -> None:
    """And another one missing: as many rows as before."""
    make(tmp_path, rollouts, TOKEN_META, writers=2)
    name = f"{BASE}/part-00001-00000.arrow"
    rewrite(tmp_path / name, lambda batch: with_row(batch, 0, sample_id=rollouts.sample_ids[0]))
    update_record(tmp_path, name)
    twice = (
        f"{tmp_path / name} (row 0): sample {rollouts.sample_ids[0]} is there and in {tmp_path / BASE / PART} (row 0)"
    )
    problems = verify_cache(tmp_path)
    assert any(text.startswith(twice) for text in problems), problems


@pytest.mark.parametrize("short", [BASE, "log_probs.teacher"])
def test_tables_of_other_samples(tmp_path: Path, rollouts: Rollouts, short: str) -> None:
    make(tmp_path / "cache", rollouts, TOKEN_META)
    make(tmp_path / "fewer", rollouts.select(np.arange(11)), TOKEN_META)
    shutil.rmtree(tmp_path / "cache" / short)
    shutil.copytree(tmp_path / "fewer" / short, tmp_path / "cache" / short)
    entry = json.loads((tmp_path / "fewer" / "cache.json").read_text())["tables"][short]
    set_at("tables", short, entry)(tmp_path / "cache", rollouts)
    problems = verify_cache(tmp_path / "cache")
    last = rollouts.sample_ids[11]
    assert any(f"{short}: has no row for sample {last}" in text for text in problems), problems
    assert any(re.search(r"num_rows of log_probs.teacher is \d+, of log_probs.base \d+", text) for text in problems)


def test_other_rollouts(tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path / "cache", rollouts, TOKEN_META)
    fewer = rollouts.select(np.arange(10))
    problems = verify_cache(tmp_path / "cache", fewer)
    for name in rollouts.sample_ids[10:]:
        assert any(f"{PART}: sample {name}" in text and "isn't among the rollouts" in text for text in problems)
    make(tmp_path / "fewer", fewer, TOKEN_META)
    problems = verify_cache(tmp_path / "fewer", rollouts)
    assert len(problems) == 4
    assert f"has no row for sample {rollouts.sample_ids[10]} ({rollouts.location(10)}); precompute again" in problems[0]


def test_edited_rollouts(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, rollouts, TOKEN_META)
    whole = Rollouts.token_crc
    monkeypatch.setattr(Rollouts, "token_crc", lambda self, i: whole(self, i) ^ (i == 3))
    problems = verify_cache(tmp_path, rollouts)
    assert len(problems) == 2, "one of each table"
    assert f"holds other tokens than the rollouts for sample {rollouts.sample_ids[3]}" in problems[0]


def test_another_tokenizer(tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path, rollouts, replace(TOKEN_META, tokenizer_digest="other"))
    problems = verify_cache(tmp_path, rollouts)
    assert len(problems) == 1 and "tokenizer_digest is other, the rollouts' is tok" in problems[0]


def test_many_problems_are_counted(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, rollouts, TOKEN_META)
    monkeypatch.setattr(verify, "SHOWN", 5)
    monkeypatch.setattr(verify, "row_problem", lambda *_: "wrong")
    problems = verify_cache(tmp_path)
    assert len(problems) == 2 * 6
    assert problems[5] == f"{tmp_path / BASE}: and 7 more problems; repair these first"
    assert SHOWN == 20


def test_unfinished_parts_are_no_cache(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    assert len(verify_cache(tmp_path)) == 1
