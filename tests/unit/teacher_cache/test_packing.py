"""Top-k entries: ids bit for bit, log-probs within half precision, and never a mass that isn't 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_erpd.teacher_cache.packing import (
    high_bytes,
    pack_ids,
    pack_log_probs,
    unpack_ids,
    unpack_log_probs,
)
from tests.tolerances import FP32, STORED_MASS

VOCABULARIES = [40, 65_536, 65_537, 131_072, 131_073, 151_936, 262_144, 262_145, 2**20, 2**20 + 1, 2**24]
HALF = 2.0**-11
"""Half a unit in the last place of float16, relative."""
SMALLEST = 2.0**-25
"""Half of float16's smallest number."""


@pytest.mark.parametrize("k", [1, 3, 4, 5, 64])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_ids_survive(vocab_size: int, k: int) -> None:
    rng = np.random.default_rng(k)
    ids = rng.integers(0, vocab_size, (50, k))
    ids[0], ids[1] = vocab_size - 1, 0  # every bit of the largest, and none
    edges = [i for i in (2**16 - 1, 2**16, 2**17, 2**18 - 1, 2**20) if i < vocab_size]
    ids[2, : len(edges)] = edges[:k]
    low, high = pack_ids(ids, vocab_size)
    assert low.dtype == np.uint16 and (high is None or high.dtype == np.uint8)
    assert (0 if high is None else high.shape[1]) == high_bytes(k, vocab_size)
    found = unpack_ids(
        torch.from_numpy(low.view(np.int16)), None if high is None else torch.from_numpy(high), vocab_size
    )
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), ids)


@pytest.mark.parametrize(
    ("vocab_size", "k", "expected"),
    [
        (65_536, 64, 0),
        (65_537, 64, 8),
        (131_073, 64, 13),
        (196_608, 64, 13),
        (196_609, 64, 16),
        (262_144, 64, 16),
        (262_145, 64, 22),
        (2**20, 64, 32),
        (2**20 + 1, 64, 64),
        (2**24, 64, 64),
        (65_537, 1, 1),
        (151_936, 5, 1),
        (151_936, 6, 2),
    ],
)
def test_bytes_for_what_is_above_sixteen_bits(vocab_size: int, k: int, expected: int) -> None:
    assert high_bytes(k, vocab_size) == expected


def test_digits_of_several_ids_are_a_byte() -> None:
    """Entry 0 is the lowest digit, as docs/teacher-cache.md says."""
    ids = np.array([[0x10001, 0x20002, 0x00003, 0x10004, 0x2FFFF, 0x20006]])
    low, high = pack_ids(ids, 151_936)
    assert low.tolist() == [[1, 2, 3, 4, 0xFFFF, 6]]
    assert high is not None and high.tolist() == [[1 + 3 * 2 + 9 * 0 + 27 * 1 + 81 * 2, 2]]
    _, high = pack_ids(np.array([[0x10001, 0x20002, 0x30003, 0x00004, 0x3FFFF]]), 2**18)
    assert high is not None and high.tolist() == [[0b00_11_10_01, 0b11]]  # in the base 4 digits are pairs of bits


def test_ids_unpack_whatever_stands_before_them() -> None:
    """A batch `[b, s, K]` as well as rows `[R, K]`."""
    ids = np.random.default_rng(0).integers(0, 151_936, (6, 5))
    low, high = pack_ids(ids, 151_936)
    assert high is not None
    found = unpack_ids(
        torch.from_numpy(low.view(np.int16)).view(2, 3, 5), torch.from_numpy(high).view(2, 3, -1), 151_936
    )
    np.testing.assert_array_equal(found.numpy(), ids.reshape(2, 3, 5))


def top_entries(num_tokens: int, k: int, tail: np.ndarray, scale: float = 3.0) -> np.ndarray:
    """Log-probs `[num_tokens, k]`, float64, largest first, with a mass of 1 - tail."""
    logits = np.sort(np.random.default_rng(k).normal(size=(num_tokens, k)) * scale)[:, ::-1]
    entries = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return entries + np.log1p(-tail)[:, None]


def stored(log_probs: np.ndarray, dtype: str) -> np.ndarray:
    """Through the stored form and back, float64."""
    packed = pack_log_probs(log_probs, np.dtype(dtype))
    assert packed.scores.dtype == dtype and packed.log_normalizer.dtype == np.float32
    found = unpack_log_probs(torch.from_numpy(packed.scores), torch.from_numpy(packed.log_normalizer))
    assert found.dtype == torch.float32
    return found.double().numpy()


TAILS = np.array([0.0, 1e-12, 1e-4, 0.1, 0.5, 0.99, 1 - 1e-9])


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 3, 64])
def test_half_precision_counts_from_the_largest(k: int, scale: float) -> None:
    """An entry is off by half precision of its distance from the largest, and by what the normaliser makes up for."""
    exact = top_entries(len(TAILS), k, TAILS, scale)
    distance = exact.max(-1, keepdims=True) - exact
    shares = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    normalizer = (shares * (HALF * distance + SMALLEST)).sum(-1, keepdims=True)
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(1, np.abs(exact))
    bound = HALF * distance + SMALLEST + 1.1 * normalizer + rounding
    assert (np.abs(stored(exact, "float16") - exact) <= bound).all()


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 3, 64])
def test_float32_is_exact(k: int, scale: float) -> None:
    exact = top_entries(len(TAILS), k, TAILS, scale)
    found = stored(exact, "float32")
    assert (np.abs(found - exact) <= 1e-6 * np.maximum(1, np.abs(exact))).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("k", [1, 3, 64])
def test_entries_and_tail_add_up_to_one(k: int, dtype: str) -> None:
    for scale in (0.01, 3.0, 30.0):
        exact = top_entries(len(TAILS), k, TAILS, scale)
        mass = np.exp(stored(exact, dtype)).sum(-1) + TAILS
        STORED_MASS.assert_close(mass.tolist(), [1.0] * len(TAILS), f"scale {scale}")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rare_entries(dtype: str) -> None:
    """One-hot, entries of no mass, entries beyond half precision's range, and a token whose whole mass is the tail."""
    nothing = -np.inf
    found = stored(
        np.array(
            [
                [0.0, nothing, nothing],
                [np.log(0.5), np.log(0.5), nothing],
                [0.0, -70_000.0, nothing],
                [nothing, nothing, nothing],
            ]
        ),
        dtype,
    )
    np.testing.assert_array_equal(found[0], [0.0, nothing, nothing])
    FP32.assert_close(found[1, :2].tolist(), [np.log(0.5)] * 2)
    assert np.isneginf(found[1, 2])
    # exp(-70,000) is 0 in every precision; half precision may say so.
    assert found[2, 0] == 0 and found[2, 1] in (-70_000.0, nothing) and np.isneginf(found[2, 2])
    assert np.isneginf(found[3]).all()


def test_the_normaliser_of_nothing_is_zero() -> None:
    packed = pack_log_probs(np.full((2, 4), -np.inf), np.float16)
    assert packed.log_normalizer.tolist() == [0, 0]


def test_equal_entries_stay_equal_and_ordered() -> None:
    exact = top_entries(20, 64, np.full(20, 0.3))
    exact[:, 10] = exact[:, 9]
    found = stored(exact, "float16")
    assert (np.diff(found, axis=-1) <= 0).all() and (found[:, 10] == found[:, 9]).all()
