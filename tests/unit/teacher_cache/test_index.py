"""The index: every row is found, nothing else is, and two ids of one hash are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache import index
from megatron_erpd.teacher_cache.index import Index, hashes, write_index
from tests.unit.teacher_cache.caches import TOKEN_META, contents, make

NAMES = [[f"part {part} row {row}" for row in range(size)] for part, size in enumerate((3, 1, 200))]
FLAT = [name for names in NAMES for name in names]


def test_hashes_are_blake2b() -> None:
    """Against values of `b2sum`-like programs: the digest is read as a little-endian number."""
    assert [hex(value) for value in hashes(["", "a"]).tolist()] == [hex(v) for v in _reference(["", "a"], 0)]
    assert hashes(["a"], 1).tolist() == _reference(["a"], 1) != _reference(["a"], 0)
    assert hashes([]).shape == (0,)


def _reference(names: list[str], salt: int) -> list[int]:
    import hashlib

    def one(name: str) -> int:
        digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8, salt=salt.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")

    return [one(name) for name in names]


def test_every_row_is_found_and_nothing_else(tmp_path: Path) -> None:
    write_index(tmp_path / "index.arrow", NAMES)
    found = Index(tmp_path / "index.arrow", len(FLAT))
    part, row = found.find(FLAT)
    assert part.tolist() == [0] * 3 + [1] + [2] * 200
    assert row.tolist() == [0, 1, 2, 0, *range(200)]
    shuffled = np.random.default_rng(0).permutation(len(FLAT))
    np.testing.assert_array_equal(found.find([FLAT[i] for i in shuffled])[1], row[shuffled])
    assert [values.tolist() for values in found.find(["nobody", FLAT[0], ""])] == [[-1, 0, -1], [-1, 0, -1]]
    assert [path.name for path in tmp_path.iterdir()] == ["index.arrow"]


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = index.hashes
    monkeypatch.setattr(index, "hashes", lambda names, salt=0: whole(names, salt) % np.uint64(3 if salt < 2 else 2**63))
    cache = make(tmp_path, rollouts, TOKEN_META)
    batch = pa.ipc.open_file(str(tmp_path / "log_probs.base" / "index.arrow")).get_batch(0)
    assert batch.schema.metadata[b"salt"] == b"2"
    cache.check(rollouts)
    assert len(contents(cache, rollouts.sample_ids)) == len(rollouts)
    with pytest.raises(CacheError, match="has no row for sample nobody"):
        cache.token_row("base", "nobody")


def test_a_hash_that_is_another_samples(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is compared by name: a stranger of the same hash gets no row of somebody else."""
    cache = make(tmp_path, rollouts, TOKEN_META)
    whole, name = index.hashes, rollouts.sample_ids[4]
    monkeypatch.setattr(index, "hashes", lambda names, salt=0: whole([name] * len(list(names)), salt))
    with pytest.raises(CacheError, match="has no row for sample stranger"):
        cache.token_row("base", "stranger")
    keys = cache.table("log_probs.base").keys(["stranger", name])
    assert keys.part.tolist() == [-1, 0] and keys.num_tokens.tolist() == [0, rollouts.response_lengths[4]]


def test_no_salt_helps(tmp_path: Path) -> None:
    with pytest.raises(
        CacheError, match=r"index.arrow: no salt tells 3 sample ids apart; two of them must be the same"
    ):
        write_index(tmp_path / "index.arrow", [["a", "b"], ["a"]])
    assert not list(tmp_path.iterdir())


def test_damaged_indices(tmp_path: Path) -> None:
    path = tmp_path / "index.arrow"
    write_index(path, NAMES)
    data = path.read_bytes()
    with pytest.raises(CacheError, match=r"index.arrow: is damaged \(204 rows, cache.json says 205\); put back a copy"):
        Index(path, 205)
    for text in (data[:-100], data[:200], b""):
        path.write_bytes(text)
        with pytest.raises(CacheError, match=r"index.arrow: is damaged"):
            Index(path, 204)
    path.unlink()
    with pytest.raises(CacheError, match=r"index.arrow: is damaged .*No such file"):
        Index(path, 204)
    for salt in (b"-1", b"16", b"x", b"99999999999999999999999"):
        path.write_bytes(data)
        _rewrite(path, salt)
        with pytest.raises(CacheError, match=r"index.arrow: is damaged"):
            Index(path, 204)


def _rewrite(path: Path, salt: bytes) -> None:
    batch = pa.ipc.open_file(path.read_bytes()).get_batch(0).replace_schema_metadata({b"salt": salt})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
