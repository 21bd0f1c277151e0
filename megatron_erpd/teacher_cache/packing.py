"""Top-k entries in few bytes: half-precision scores with an exact normaliser, ids of 16 bits and a digit.

Scores are log-probs relative to the token's largest, so that half precision spends its digits where the mass is. The
normaliser is chosen after rounding: entries as they are read and the tail add up to 1 again.

    log q[token_k] = topk_scores[k] - log_normalizer

An id's low 16 bits are in one column. What is above them is a digit in the base ceil(vocabulary / 2^16), 3 for 151,936
entries: another column, that small vocabularies don't need, has as many of them in a byte as fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # what opens or writes a cache needs no torch
    from torch import Tensor

LOW_BITS = 16
MAX_VOCAB_SIZE = 2**24


def high_powers(vocab_size: int) -> list[int]:
    """What each digit in a byte of `topk_ids_high` counts, the lowest first: as many powers of the base as a byte holds
    digits. None where all ids have 16 bits."""
    base = high_base(vocab_size)
    return [] if base == 1 else [base**i for i in range(8) if base ** (i + 1) <= 256]


def high_base(vocab_size: int) -> int:
    """How many values the part of an id above its low bits has."""
    return -(-vocab_size // 2**LOW_BITS)


def high_bytes(k: int, vocab_size: int) -> int:
    """Bytes per token of `topk_ids_high`."""
    digits = len(high_powers(vocab_size))
    return -(-k // digits) if digits else 0


def pack_ids(ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Vocabulary ids `[R, K]` as uint16 `[R, K]` and uint8 `[R, high_bytes]` (None where it is 0)."""
    low = (ids & 0xFFFF).astype(np.uint16)
    width = high_bytes(ids.shape[-1], vocab_size)
    if width == 0:
        return low, None
    powers = np.array(high_powers(vocab_size), dtype=np.uint8)
    digits = np.zeros((len(ids), width * len(powers)), dtype=np.uint8)
    digits[:, : ids.shape[-1]] = ids >> LOW_BITS
    return low, (digits.reshape(len(ids), width, len(powers)) * powers).sum(axis=-1, dtype=np.uint8)


def unpack_ids(low: Tensor, high: Tensor | None, vocab_size: int) -> Tensor:
    """The inverse, on any device.

    Args:
        low: int16 `[..., K]`, the bits of uint16 (torch computes little with uint16 itself).
        high: uint8 `[..., high_bytes]` or None.

    Returns:
        int64 `[..., K]`.
    """
    import torch

    ids = low.long() & 0xFFFF
    if high is None:
        return ids
    base, packed = high_base(vocab_size), high.long()
    digits = torch.stack([packed // power % base for power in high_powers(vocab_size)], dim=-1).flatten(-2)
    digits = digits[..., : low.shape[-1]]
    return ids | (digits << LOW_BITS)


class PackedScores(NamedTuple):
    """Scores `[R, K]` in the stored type, and the fp32 normaliser `[R]` that makes log-probs of them."""

    scores: np.ndarray
    log_normalizer: np.ndarray


def pack_log_probs(log_probs: np.ndarray, dtype: np.dtype | type) -> PackedScores:
    """Log-probs `[R, K]` as scores relative to the largest, and what their normaliser is after rounding."""
    exact = log_probs.astype(np.float64)
    largest = exact.max(axis=-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)  # a token whose whole mass is in the tail
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scores = (exact - largest).astype(dtype)
        normalizer = _logsumexp(scores.astype(np.float64)) - _logsumexp(exact)
    # Without any mass in the entries every normaliser is right.
    return PackedScores(scores, np.nan_to_num(normalizer, nan=0.0).astype(np.float32))


def unpack_log_probs(scores: Tensor, log_normalizer: Tensor) -> Tensor:
    """fp32 `[..., K]` log-probs, nats."""
    return scores.float() - log_normalizer.float().unsqueeze(-1)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    largest = values.max(axis=-1)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    return shift + np.log(np.exp(values - shift[..., None]).sum(axis=-1))
