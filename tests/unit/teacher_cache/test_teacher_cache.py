import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache import CacheMeta, CacheReader, CacheWriter, finalize, prepare_cache

VOCAB, K = 40, 3
PRINTS = {"base": "b" * 8, "teacher": "t" * 8}
TOKEN_META = CacheMeta("token", ("base", "teacher"), PRINTS, VOCAB, tokenizer_digest="tok")


def topk_meta(dtype: str = "float32") -> CacheMeta:
    projection = {"mode": "per_token", "delta": 0.5, "grid": (0.0, 1.0)}
    return CacheMeta(
        "topk", ("base", "teacher"), PRINTS, VOCAB, signal="strong", projection=projection, k=K, topk_dtype=dtype
    )


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt_token_ids": rng.integers(0, VOCAB, rng.integers(1, 5)),
            "response_token_ids": rng.integers(0, VOCAB, rng.integers(1, 9)),
            "group_id": i // 4,
            "reward": float(i % 2),
        }
        for i in range(12)
    ]
    write_rollouts(tmp_path / "r.parquet", rows, {"tokenizer_digest": "tok"})
    return read_rollouts(tmp_path / "r.parquet")


def token_arrays(rollouts: Rollouts, i: int) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    size = rollouts.response_lengths[i]
    return {"log_probs": {name: -rng.random(size).astype(np.float32) for name in ("base", "teacher")}}


def topk_arrays(rollouts: Rollouts, i: int) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    size = int(rollouts.response_lengths[i])
    logits = rng.normal(size=(size, VOCAB)) * 3
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    indices = np.argsort(-log_q, axis=-1)[:, :K]
    top = np.take_along_axis(log_q, indices, -1)
    tail = np.log1p(-np.exp(top).sum(-1))
    return token_arrays(rollouts, i) | {
        "topk_indices": indices,
        "topk_log_probs": top,
        "tail_log_prob": tail,
        "eta": rng.random(size),
        "target_kl": rng.random(size),
    }


def one_token(**arrays: Any) -> dict[str, Any]:
    return {"log_probs": {name: np.full(1, -1.0) for name in PRINTS}} | arrays


def fill(folder: Path, rollouts: Rollouts, meta: CacheMeta, writers: int = 1, **options: Any) -> None:
    arrays = token_arrays if meta.kind == "token" else topk_arrays
    for rank in range(writers):
        with CacheWriter(folder, meta, rank, **options) as writer:
            for i in range(rank, len(rollouts), writers):
                writer.write(rollouts.sample_ids[i], rollouts.token_crc(i), **arrays(rollouts, i))


@pytest.mark.parametrize(("writers", "part_bytes"), [(1, 2**20), (3, 2**20), (2, 40)])
def test_token_round_trip_by_any_writers(tmp_path: Path, rollouts: Rollouts, writers: int, part_bytes: int) -> None:
    folder = tmp_path / "cache"
    assert prepare_cache(folder, TOKEN_META) == frozenset()
    fill(folder, rollouts, TOKEN_META, writers, part_bytes=part_bytes)
    index = finalize(folder, rollouts.sample_ids)
    assert index.num_rows == 12 and index.num_tokens == rollouts.response_lengths.sum()
    assert len(index.parts) > writers if part_bytes == 40 else len(index.parts) == writers
    cache = CacheReader(folder)
    cache.check(rollouts)
    assert cache.meta == TOKEN_META and cache.policies == ("base", "teacher") and len(cache) == 12
    for i, name in enumerate(rollouts.sample_ids):
        assert name in cache
        for policy, expected in token_arrays(rollouts, i)["log_probs"].items():
            row = cache.token_row(policy, name)
            assert row.dtype == np.float32
            np.testing.assert_array_equal(row, expected)
    assert "nobody" not in cache


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_topk_round_trip(tmp_path: Path, rollouts: Rollouts, dtype: str) -> None:
    folder, meta = tmp_path / "cache", topk_meta(dtype)
    fill(folder, rollouts, meta, 2)
    index = finalize(folder, rollouts.sample_ids)
    cache = CacheReader(folder)
    assert cache.meta == meta
    etas, kls = [], []
    for i, name in enumerate(rollouts.sample_ids):
        expected, size = topk_arrays(rollouts, i), rollouts.response_lengths[i]
        row = cache.topk_row(name)
        assert row.indices.shape == row.log_probs.shape == (size, K) and row.tail_log_prob.shape == (size,)
        np.testing.assert_array_equal(row.indices, expected["topk_indices"])
        np.testing.assert_array_equal(row.log_probs, expected["topk_log_probs"].astype(dtype))
        np.testing.assert_array_equal(row.tail_log_prob, expected["tail_log_prob"].astype(np.float32))
        np.testing.assert_array_equal(cache.eta_row(name), expected["eta"].astype(np.float32))
        np.testing.assert_array_equal(cache.target_kl_row(name), expected["target_kl"].astype(np.float32))
        for policy, log_probs in token_arrays(rollouts, i)["log_probs"].items():
            np.testing.assert_array_equal(cache.token_row(policy, name), log_probs)
        etas.append(expected["eta"])
        kls.append(expected["target_kl"])
    for name, rows in (("eta", etas), ("target_kl", kls)):
        values = np.concatenate(rows)
        expected_statistics = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        assert cache.statistics[name] == index.statistics[name] == pytest.approx(expected_statistics, rel=1e-6)


def test_empty_tail_is_kept(tmp_path: Path) -> None:
    arrays = one_token(
        topk_indices=np.array([[3, 4, 5]]),
        topk_log_probs=np.log([[0.5, 0.25, 0.25]]),
        tail_log_prob=np.array([-np.inf]),
        eta=np.zeros(1),
        target_kl=np.zeros(1),
    )
    with CacheWriter(tmp_path, topk_meta()) as writer:
        writer.write("one", 1, **arrays)
    finalize(tmp_path)
    assert np.isneginf(CacheReader(tmp_path).topk_row("one").tail_log_prob).all()


def test_rows_are_views_of_the_mapped_file(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    finalize(tmp_path)
    before = pa.total_allocated_bytes()
    cache = CacheReader(tmp_path)
    row = cache.token_row("base", rollouts.sample_ids[0])
    assert pa.total_allocated_bytes() - before < 1024  # the payload isn't in Arrow's heap
    assert not row.flags.writeable and not row.flags.owndata


def test_layout_is_as_documented(tmp_path: Path, rollouts: Rollouts) -> None:
    """Reads a cache with nothing but pyarrow and the format's description."""
    fill(tmp_path, rollouts, topk_meta(), 2)
    finalize(tmp_path)
    index = json.loads((tmp_path / "cache.json").read_text())
    assert index["format_version"] == 1 and index["kind"] == "topk" and index["k"] == K and index["num_rows"] == 12
    assert [part["name"] for part in index["parts"]] == ["part-00000-00000.arrow", "part-00001-00000.arrow"]
    rows = {}
    for part in index["parts"]:
        assert (tmp_path / part["name"]).stat().st_size == part["bytes"]
        table = pa.ipc.open_file(pa.memory_map(str(tmp_path / part["name"]))).read_all()
        rows |= {row["sample_id"]: row for row in table.to_pylist()}
    for i, name in enumerate(rollouts.sample_ids):
        row, expected = rows[name], topk_arrays(rollouts, i)
        tokens = np.concatenate([rollouts.prompt_tokens(i), rollouts.response_tokens(i)]).astype("<i4")
        assert row["crc"] == zlib.crc32(tokens.tobytes()) and row["num_tokens"] == rollouts.response_lengths[i]
        assert row["topk_indices"] == expected["topk_indices"].reshape(-1).tolist()
        assert len(row["tail_log_prob"]) == len(row["eta"]) == len(row["target_kl"]) == row["num_tokens"]


def test_written_arrays_are_copied(tmp_path: Path) -> None:
    buffer = np.array([-1.0, -2.0], np.float32)
    with CacheWriter(tmp_path, CacheMeta("token", ("p",), {"p": "x"}, VOCAB)) as writer:
        writer.write("one", 1, log_probs={"p": buffer})
        buffer[:] = -7
    finalize(tmp_path)
    assert CacheReader(tmp_path).token_row("p", "one").tolist() == [-1, -2]


def test_unfinished_and_absent_caches_are_refused(tmp_path: Path, rollouts: Rollouts) -> None:
    with pytest.raises(CacheError, match="isn't a teacher cache"):
        CacheReader(tmp_path / "none")
    fill(tmp_path, rollouts, TOKEN_META)
    with pytest.raises(CacheError, match=r"is unfinished \(no cache.json\)"):
        CacheReader(tmp_path)


def test_killed_run_resumes_without_losing_or_repeating(tmp_path: Path, rollouts: Rollouts) -> None:
    def half(i: int) -> dict[str, Any]:
        if i == 8:
            raise KeyboardInterrupt
        return token_arrays(rollouts, i)

    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, TOKEN_META, 0, part_bytes=60) as writer:
        for i in range(12):
            arrays = half(i)
            writer.write(rollouts.sample_ids[i], rollouts.token_crc(i), **arrays)
    (tmp_path / ".part-00000-00099.arrow.1.tmp").write_bytes(b"cut")
    with pytest.raises(CacheError, match="samples are missing, the first is"):
        finalize(tmp_path, rollouts.sample_ids)
    with pytest.raises(CacheError, match="resume"):
        prepare_cache(tmp_path, TOKEN_META)
    with pytest.raises(CacheError, match="resume=True"):
        CacheWriter(tmp_path, TOKEN_META, 0)

    done = prepare_cache(tmp_path, TOKEN_META, resume=True)
    assert 0 < len(done) <= 8 and not list(tmp_path.glob(".*"))
    remaining = [i for i, name in enumerate(rollouts.sample_ids) if name not in done]
    for rank in range(2):  # two writers now
        with CacheWriter(tmp_path, TOKEN_META, rank, resume=True) as writer:
            for i in remaining[rank::2]:
                writer.write(rollouts.sample_ids[i], rollouts.token_crc(i), **token_arrays(rollouts, i))
    finalize(tmp_path, rollouts.sample_ids)
    cache = CacheReader(tmp_path)
    cache.check(rollouts)
    for i, name in enumerate(rollouts.sample_ids):
        np.testing.assert_array_equal(cache.token_row("base", name), token_arrays(rollouts, i)["log_probs"]["base"])
    with pytest.raises(CacheError, match="is a complete cache already"):
        prepare_cache(tmp_path, TOKEN_META, resume=True)


def test_resume_under_other_settings_is_refused(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    other = CacheMeta("token", ("base", "teacher"), PRINTS | {"teacher": "new"}, VOCAB, tokenizer_digest="tok")
    with pytest.raises(CacheError, match="was written with other settings"):
        prepare_cache(tmp_path, other, resume=True)
    with CacheWriter(tmp_path, other, 1) as writer:
        writer.write("x", 1, **token_arrays(rollouts, 0))
    with pytest.raises(CacheError, match="part-00001-00000.arrow: was written with other settings"):
        finalize(tmp_path)


def test_finalize_refuses_duplicates_extras_and_nothing(tmp_path: Path, rollouts: Rollouts) -> None:
    with pytest.raises(CacheError, match="holds no parts"):
        finalize(tmp_path)
    fill(tmp_path, rollouts, TOKEN_META)
    with pytest.raises(CacheError, match="1 samples aren't among the rollouts"):
        finalize(tmp_path, rollouts.sample_ids[1:])
    with CacheWriter(tmp_path, TOKEN_META, 1) as writer:
        writer.write(rollouts.sample_ids[3], rollouts.token_crc(3), **token_arrays(rollouts, 3))
    with pytest.raises(CacheError, match=f"sample {rollouts.sample_ids[3]} is in part-00000"):
        finalize(tmp_path)
    assert not (tmp_path / "cache.json").exists()


def test_check_names_the_sample_and_what_to_do(tmp_path: Path, rollouts: Rollouts) -> None:
    def cache_with(**changed: Any) -> CacheReader:
        folder = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        with CacheWriter(folder, changed.get("meta", TOKEN_META)) as writer:
            for i, name in enumerate(rollouts.sample_ids):
                arrays, crc = token_arrays(rollouts, i), rollouts.token_crc(i)
                if i == 5:
                    if changed.get("drop"):
                        continue
                    crc ^= changed.get("crc", 0)
                    if changed.get("shorten"):
                        arrays["log_probs"] = {k: np.append(v, v) for k, v in arrays["log_probs"].items()}
                writer.write(name, crc, **arrays)
        finalize(folder)
        return CacheReader(folder)

    name = rollouts.sample_ids[5]
    for change, message in (
        ({"drop": True}, f"has no row for sample {name} .*row 5.*precompute the cache again with these rollouts"),
        ({"crc": 1}, f"sample {name} .* for other token ids .*precompute the cache again"),
        ({"shorten": True}, f"sample {name} .* response tokens, the rollout has"),
    ):
        cache = cache_with(**change)
        with pytest.raises(CacheError, match=message):
            cache.check(rollouts)
        cache.check(rollouts.select([0, 1, 2]))  # other rows may be there too
    with pytest.raises(CacheError, match="another tokenizer"):
        cache_with(meta=CacheMeta("token", ("base", "teacher"), PRINTS, VOCAB, tokenizer_digest="other")).check(
            rollouts
        )


def test_require_policies(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    finalize(tmp_path)
    cache = CacheReader(tmp_path)
    cache.require_policies({"base": PRINTS["base"]})
    cache.require_policies(PRINTS)
    with pytest.raises(CacheError, match="made from another teacher: policy 'teacher' has fingerprint tttttttt"):
        cache.require_policies({"base": PRINTS["base"], "teacher": "new"})
    with pytest.raises(CacheError, match="has no policy 'unlearned', only base, teacher"):
        cache.require_policies({"unlearned": "u"})


def test_asking_for_what_is_not_there(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    finalize(tmp_path)
    cache = CacheReader(tmp_path)
    with pytest.raises(CacheError, match="has no row for sample nobody"):
        cache.token_row("base", "nobody")
    with pytest.raises(CacheError, match="has no policy 'unlearned'"):
        cache.token_row("unlearned", rollouts.sample_ids[0])
    for method in (cache.topk_row, cache.eta_row, cache.target_kl_row):
        with pytest.raises(CacheError, match="is a 'token' cache and holds no target"):
            method(rollouts.sample_ids[0])


def test_damaged_files_are_refused_by_name(tmp_path: Path, rollouts: Rollouts) -> None:
    fill(tmp_path, rollouts, TOKEN_META)
    finalize(tmp_path)
    part, index = tmp_path / "part-00000-00000.arrow", tmp_path / "cache.json"
    whole, text = part.read_bytes(), index.read_text()
    part.write_bytes(whole[:-40])
    with pytest.raises(CacheError, match="part-00000-00000.arrow: can't be read"):
        CacheReader(tmp_path)
    part.unlink()
    with pytest.raises(CacheError, match="listed in cache.json but missing"):
        CacheReader(tmp_path)
    part.write_bytes(whole)
    for broken, message in (
        (text[:-30], "is damaged"),
        (text.replace('"format_version": 1', '"format_version": 2'), "format_version 2"),
        (text.replace(PRINTS["teacher"], "other"), "isn't the part that cache.json was written for"),
        (text.replace('"parts"', '"pieces"'), "is damaged"),
    ):
        index.write_text(broken)
        with pytest.raises(CacheError, match=message):
            CacheReader(tmp_path)
    index.write_text(text)
    CacheReader(tmp_path).check(rollouts)


BAD_TOKEN = [
    ({"log_probs": {"base": [-1.0], "teacher": [np.nan]}}, "log_probs.teacher is nan at response token 0"),
    ({"log_probs": {"base": [-1.0, -np.inf], "teacher": [-1.0, -1.0]}}, "log_probs.base is -inf at response token 1"),
    ({"log_probs": {"base": [-1.0], "teacher": [-1.0, -1.0]}}, "flat and equally long"),
    ({"log_probs": {"base": [[-1.0]], "teacher": [[-1.0]]}}, "flat and equally long"),
    ({"log_probs": {"base": [], "teacher": []}}, "no response tokens"),
    ({"log_probs": {"base": [-1.0]}}, "missing .'log_probs.teacher'"),
    ({"log_probs": {"base": [-1.0], "teacher": [-1.0], "x": [-1.0]}}, "unknown .'log_probs.x'"),
    ({}, "missing"),
    (
        {"log_probs": {"base": [-1.0], "teacher": [-1.0]}, "tail_log_prob": [-1.0]},
        "unknown .'tail_log_prob'.; a 'token' cache takes",
    ),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_TOKEN)
def test_token_rows_that_can_not_be_right(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=f"sample s: .*{message}"), CacheWriter(tmp_path, TOKEN_META) as writer:
        writer.write("s", 0, **arrays)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_indices": np.full((2, K), VOCAB)}, "integer ids in"),
        ({"topk_indices": np.zeros((2, K))}, "integer ids in"),
        ({"topk_indices": np.zeros((2, K + 1), int)}, "topk_indices has shape"),
        ({"tail_log_prob": np.array([-np.inf, -np.inf])}, "have mass .* at token 0, expected 1"),
        ({"topk_log_probs": np.full((2, K), np.nan)}, "have mass nan"),
        ({"eta": np.array([0.0, np.nan])}, "eta is nan at response token 1"),
        ({"eta": np.zeros(3)}, "eta has shape"),
        ({"eta": None}, "missing .'eta'"),
        ({"log_probs": None}, "missing .'log_probs.base', 'log_probs.teacher'"),
        ({"log_probs": {"base": [-1.0], "teacher": [-1.0]}}, "topk_indices has shape"),
    ],
)
def test_topk_rows_that_can_not_be_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {
        "log_probs": {name: np.array([-1.0, -2.0]) for name in PRINTS},
        "topk_indices": np.array([[0, 1, 2], [3, 4, 5]]),
        "topk_log_probs": np.full((2, K), np.log(0.25)),
        "tail_log_prob": np.full(2, np.log(0.25)),
        "eta": np.zeros(2),
        "target_kl": np.zeros(2),
    }
    writer = CacheWriter(tmp_path, topk_meta())
    writer.write("good", 0, **good)
    with pytest.raises(CacheError, match=f"sample s: .*{message}"):
        writer.write("s", 0, **(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hidden"}, "kind: 'hidden'"),
        ({"policies": ()}, "policies"),
        ({"policies": ("base", "base")}, "policies"),
        ({"fingerprints": {"base": "x"}}, "fingerprints"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"topk_dtype": "bfloat16"}, "topk_dtype"),
        ({"k": 0}, "k: 0"),
        ({"k": VOCAB + 1}, "k: 41"),
        ({"k": None}, "k: None"),
        ({"kind": "token"}, "k: only kind 'topk'"),
    ],
)
def test_meta_is_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheMeta.from_json(topk_meta().to_json() | change)


def test_meta_survives_json() -> None:
    for meta in (TOKEN_META, topk_meta("float16")):
        assert CacheMeta.from_json(json.loads(meta.canonical())) == meta
