"""How large a teacher cache is, before it is made: bytes per response token and per rollout of each of its tables.

Counted are payload and keys of the Arrow files and their indices, to the byte; not what a part has besides, some
kilobytes of header, footer and padding, nor `cache.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.packing import MAX_VOCAB_SIZE, high_bytes

_ENTRY_BYTES = {"float16": 2, "float32": 4}
"""A top-k entry's log-prob."""
_KEY_BYTES = 48
"""A rollout's keys: `sample_id` (32 characters and an offset), checksum, number of tokens, checksum of the payload."""
_OFFSET_BYTES = 4
"""Of a rollout in each payload column."""
_INDEX_BYTES = 16
"""Of a rollout in a table's index: hash, part, row."""


@dataclass(frozen=True)
class CacheSize:
    """A cache's tables by name: `log_probs.POLICY`, `topk`, `hidden.POLICY`.

    Attributes:
        token_bytes: per response token.
        row_bytes: per rollout, with its entry in the table's index.
    """

    token_bytes: Mapping[str, int]
    row_bytes: Mapping[str, int]

    @property
    def bytes_per_token(self) -> int:
        """Of all tables."""
        return sum(self.token_bytes.values())

    @property
    def bytes_per_row(self) -> int:
        """Of all tables."""
        return sum(self.row_bytes.values())

    def total(self, num_rows: int, num_tokens: int) -> int:
        """Bytes of a cache of so many rollouts with so many response tokens together."""
        return self.bytes_per_row * num_rows + self.bytes_per_token * num_tokens


def cache_size(
    policies: Collection[str],
    kind: str,
    *,
    vocab_size: int,
    k: int = 64,
    topk_dtype: str = "float16",
    keep_hidden: bool = False,
    hidden_size: int | None = None,
) -> CacheSize:
    """The size of a cache.

    | table | bytes per response token |
    |---|---|
    | `log_probs.POLICY` | 4 |
    | `topk` | K log-probs of 2 or 4, K ids, and 8 for the mass of the tail and the normaliser |
    | `hidden.POLICY` | 2 per component of the hidden state |

    An id takes 2 bytes; in vocabularies above 2^16 a digit more, of which a byte holds 8 up to 2^17 entries, 5 up to
    3 x 2^16, 4 up to 2^18 (`packing.high_powers`).

    Args:
        policies: whose log-probs are kept.
        kind: 'token' or 'topk'.
        vocab_size: true size of the vocabulary.
        k: entries per token; a vocabulary smaller than that is kept whole.
        topk_dtype: 'float16' or 'float32'.
        keep_hidden: whether the final hidden states of all policies are kept.
        hidden_size: their width; needed with `keep_hidden`.

    Raises:
        CacheError: a value that no cache can have.
    """
    if kind not in ("token", "topk"):
        raise CacheError(f"kind: {kind!r} isn't one of token, topk")
    if not policies:
        raise CacheError("policies: a cache holds log-probs of at least one; name it")
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise CacheError(f"vocab_size: {vocab_size} must be between 1 and {MAX_VOCAB_SIZE}")
    columns = {f"log_probs.{policy}": [4] for policy in policies}
    if kind == "topk":
        columns["topk"] = _topk_columns(vocab_size, k, topk_dtype)
    if keep_hidden:
        if hidden_size is None:
            raise CacheError("hidden_size: keep_hidden needs the width of the hidden states")
        columns |= {f"hidden.{policy}": [2 * hidden_size] for policy in policies}
    return CacheSize(
        {table: sum(widths) for table, widths in columns.items()},
        {table: _KEY_BYTES + _OFFSET_BYTES * len(widths) + _INDEX_BYTES for table, widths in columns.items()},
    )


def _topk_columns(vocab_size: int, k: int, dtype: str) -> list[int]:
    """Bytes per token of each column of the target."""
    if dtype not in _ENTRY_BYTES:
        raise CacheError(f"topk_dtype: {dtype!r} isn't one of {', '.join(_ENTRY_BYTES)}")
    if k < 1:
        raise CacheError(f"k: {k} must be at least 1")
    k = min(k, vocab_size)
    high = high_bytes(k, vocab_size)
    scores, tail, normalizer = k * _ENTRY_BYTES[dtype], 4, 4
    return [scores, 2 * k, *([high] if high else []), normalizer, tail]
