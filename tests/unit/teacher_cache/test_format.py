"""What is on disk: as it is documented, and refused where it isn't."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache import CacheMeta, CacheReader, CacheWriter, finalize
from megatron_erpd.teacher_cache.format import FORMAT_VERSION, read_index
from tests.tolerances import FP32
from tests.unit.teacher_cache import foreign_reader
from tests.unit.teacher_cache.caches import (
    HIDDEN_META,
    TOKEN_META,
    TOPK_META,
    fill,
    hidden_of,
    log_probs_of,
    make,
    target_of,
)


def test_the_foreign_reader_is_foreign() -> None:
    tree = ast.parse(Path(foreign_reader.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {
        *("__future__", "hashlib", "json", "zlib", "pathlib", "typing"),
        *("numpy", "pyarrow"),
    }


def test_another_program_reads_it(tmp_path: Path, rollouts: Rollouts) -> None:
    """With pyarrow, numpy and the format's description alone."""
    meta = replace(HIDDEN_META, topk_dtype="float32")
    make(tmp_path, rollouts, meta, writers=2)
    foreign_reader.verify_files(tmp_path)
    about = foreign_reader.description(tmp_path)
    assert about["format_version"] == FORMAT_VERSION and about["num_rows"] == len(rollouts)
    assert about["num_tokens"] == rollouts.response_lengths.sum()
    for i, name in enumerate(rollouts.sample_ids):
        size = int(rollouts.response_lengths[i])
        for policy in meta.policies:
            row = foreign_reader.row_of(tmp_path, f"log_probs.{policy}", name)
            assert row["crc"] == foreign_reader.token_crc(rollouts.prompt_tokens(i), rollouts.response_tokens(i))
            assert row["num_tokens"] == size
            np.testing.assert_array_equal(row["log_probs"], log_probs_of(policy, i, size))
            rounded = hidden_of(policy, i, size).to(torch.bfloat16).float().numpy()
            np.testing.assert_array_equal(foreign_reader.hidden(tmp_path, policy, name), rounded)
        ids, log_probs, tail = foreign_reader.target(tmp_path, name)
        expected = target_of(i, size)
        np.testing.assert_array_equal(ids, expected["indices"])
        FP32.assert_close(log_probs.tolist(), expected["log_probs"].tolist())
        FP32.assert_close(tail.tolist(), expected["tail_log_prob"].tolist())


@pytest.mark.parametrize("vocab_size", [40, 70_000, 300_000])
def test_another_program_reads_ids_of_any_width(tmp_path: Path, vocab_size: int) -> None:
    meta = replace(TOPK_META, policies=("base",), fingerprints={"base": "b"}, vocab_size=vocab_size, k=7)
    row = target_of(0, 5, vocab_size, 7)
    with CacheWriter(tmp_path, meta) as writer:
        writer.write_log_probs("base", "one", 1, log_probs_of("base", 0, 5))
        writer.write_topk("one", 1, **row)
    finalize(tmp_path, meta)
    np.testing.assert_array_equal(foreign_reader.target(tmp_path, "one")[0], row["indices"])
    np.testing.assert_array_equal(CacheReader(tmp_path).topk_row("one").indices, row["indices"])


def test_folders_and_columns(tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path / "cache", rollouts, HIDDEN_META, writers=2)
    payload = {
        "log_probs.base": {"log_probs": "float"},
        "log_probs.teacher": {"log_probs": "float"},
        "topk": {
            "topk_scores": "halffloat",
            "topk_ids_low": "uint16",
            "log_normalizer": "float",
            "tail_log_prob": "float",
        },
        "hidden.base": {"hidden": "uint16"},
        "hidden.teacher": {"hidden": "uint16"},
    }
    files = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    parts = ("part-00000-00000.arrow", "part-00001-00000.arrow")
    assert files == {"cache.json", *(f"{table}/{name}" for table in payload for name in ("index.arrow", *parts))}
    keys = {"sample_id": "string", "crc": "uint32", "num_tokens": "int32", "payload_crc": "uint32"}
    for table, columns in payload.items():
        schema = pa.ipc.open_file(str(tmp_path / "cache" / table / parts[1])).schema
        names = {item.name: str(item.type) for item in schema}
        assert names == keys | {name: f"list<item: {kind}>" for name, kind in columns.items()}
        assert not any(item.nullable for item in schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hidden"}, "kind: 'hidden'"),
        ({"policies": ()}, "policies"),
        ({"policies": ("base", "base")}, "policies"),
        ({"fingerprints": {"base": "x"}}, "fingerprints"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 2**24 + 1}, "vocab_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"topk_dtype": "bfloat16"}, "topk_dtype"),
        ({"k": 0}, "k: 0"),
        ({"k": 41}, "k: 41"),
        ({"k": None}, "k: None"),
        ({"kind": "token"}, "k: only kind 'topk'"),
        ({"hidden_size": 8}, "hidden_size and hidden_dtype go together"),
        ({"hidden_size": 8, "hidden_dtype": "int8"}, "hidden_dtype: 'int8'"),
    ],
)
def test_meta_is_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheMeta.from_json(TOPK_META.to_json() | change)


@pytest.mark.parametrize("meta", [TOKEN_META, TOPK_META, HIDDEN_META])
def test_meta_survives_json(meta: CacheMeta) -> None:
    assert CacheMeta.from_json(json.loads(json.dumps(meta.to_json()))) == meta


def test_a_table_depends_on_no_more_than_it_must() -> None:
    """Log-probs of the base policy are the same in caches of other teachers, targets and kinds; a target isn't."""
    other = replace(TOPK_META, fingerprints={"base": "b" * 8, "teacher": "new"}, signal="weak", k=2)
    base, teacher = "log_probs.base", "log_probs.teacher"
    assert TOKEN_META.of_table(base) == HIDDEN_META.of_table(base) == other.of_table(base)
    assert TOKEN_META.of_table(teacher) != other.of_table(teacher)
    for change in (
        {"signal": "weak"},
        {"projection": {"delta": 0.1}},
        {"k": 2},
        {"topk_dtype": "float16"},
        {"fingerprints": other.fingerprints},
        {"temperature": 0.7},
        {"precision": "bf16"},
        {"vocab_size": 41},
        {"tokenizer_digest": "x"},
        {"chat_template_digest": "x"},
        {"hidden_size": 4, "hidden_dtype": "float16"},
    ):
        assert replace(TOPK_META, **change).of_table("topk") != TOPK_META.of_table("topk"), change


def test_what_is_no_cache_and_what_is_unfinished(tmp_path: Path, rollouts: Rollouts) -> None:
    with pytest.raises(CacheError, match="isn't a teacher cache"):
        CacheReader(tmp_path / "none")
    fill(tmp_path / "cache", rollouts, TOKEN_META)
    with pytest.raises(CacheError, match=r"is unfinished \(no cache.json\); run the precompute stage, which resumes"):
        CacheReader(tmp_path / "cache")


DAMAGE: list[tuple[tuple[Any, ...], Any]] = [
    (("format_version",), "3"),
    (("policies",), 7),
    (("policies",), [["base"]]),
    (("fingerprints",), ["abc"]),
    (("vocab_size",), "40"),
    (("temperature",), None),
    (("statistics",), []),
    (("statistics",), {"eta": {"mean": "0"}}),
    (("tables",), []),
    (("tables",), {}),
    (("tables", "topk"), 3),
    (("tables", "topk", "num_rows"), "12"),
    (("tables", "topk", "num_rows"), -1),
    (("tables", "topk", "facts"), []),
    (("tables", "topk", "parts"), []),
    (("tables", "topk", "parts"), {"a": 1}),
    (("tables", "topk", "parts", 0), []),
    (("tables", "topk", "parts", 0, "name"), "../../topk/part-00000-00000.arrow"),
    (("tables", "topk", "parts", 0, "name"), "log_probs.base/part-00000-00000.arrow"),
    (("tables", "topk", "parts", 0, "name"), None),
    (("tables", "topk", "parts", 0, "bytes"), 1.5),
    (("tables", "topk", "parts", 0, "sha256"), "0"),
    (("tables", "topk", "parts", 0), {"name": "topk/part-00000-00000.arrow"}),
]


@pytest.mark.parametrize(("where", "value"), DAMAGE, ids=str)
def test_a_damaged_description_is_an_error_that_names_it(
    where: tuple[Any, ...], value: Any, tmp_path: Path, rollouts: Rollouts
) -> None:
    make(tmp_path, rollouts, TOPK_META)
    path = tmp_path / "cache.json"
    values = json.loads(path.read_text())
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CacheError, match=r"cache\.json: (is damaged .*; put back a copy|format_version 3, this)"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": 3}', b"[" * 100_000])
def test_no_description_at_all(text: bytes, tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path, rollouts, TOKEN_META)
    (tmp_path / "cache.json").write_bytes(text)
    with pytest.raises(CacheError, match=r"cache\.json: is damaged"):
        CacheReader(tmp_path)


@pytest.mark.parametrize(
    ("version", "message"), [(4, "read it with the program that wrote it or a newer one"), (2, "precompute again")]
)
def test_other_versions(version: int, message: str, tmp_path: Path, rollouts: Rollouts) -> None:
    make(tmp_path, rollouts, TOKEN_META)
    path = tmp_path / "cache.json"
    path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', f'"format_version": {version}'))
    with pytest.raises(CacheError, match=f"format_version {version}, this program reads {FORMAT_VERSION}; {message}"):
        CacheReader(tmp_path)
