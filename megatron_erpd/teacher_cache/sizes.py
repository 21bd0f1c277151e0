"""How large a teacher cache is, before it is made: bytes per response token and per rollout of each of its tables.

Counted are payload and keys of the Arrow files and their indices, to the byte; not what a part has besides, some
kilobytes of header, footer and padding, nor `cache.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.format import TOPK, CacheMeta

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
        keep_hidden: whether the final hidden states of all policies are kept, in two bytes per component.
        hidden_size: their width; needed with `keep_hidden`.

    Raises:
        CacheError: a value that no cache can have.
    """
    if keep_hidden and hidden_size is None:
        raise CacheError("hidden_size: keep_hidden needs the width of the hidden states")
    meta = CacheMeta(
        kind,
        tuple(policies),
        dict.fromkeys(policies, ""),
        vocab_size,
        k=min(k, vocab_size) if kind == TOPK else None,
        topk_dtype=topk_dtype,
        hidden_size=hidden_size if keep_hidden else None,
        hidden_dtype="bfloat16" if keep_hidden else None,
    )
    columns = {table: meta.columns(table).values() for table in meta.tables}
    return CacheSize(
        {table: sum(column.bytes_per_token for column in found) for table, found in columns.items()},
        {table: _KEY_BYTES + _OFFSET_BYTES * len(found) + _INDEX_BYTES for table, found in columns.items()},
    )
