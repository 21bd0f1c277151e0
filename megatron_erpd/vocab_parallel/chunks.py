"""Work over a vocabulary in chunks of tokens, so that temporaries stay within a budget whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 256 * 2**20
"""What the temporaries of a chunk may take: small beside a model, large enough to keep a GPU busy."""


def token_chunks(num_tokens: int, bytes_per_token: int) -> Iterator[slice]:
    """Slices that cover `num_tokens` rows, each of as many as `CHUNK_BYTES` allows and of at least one (no rows: an
    empty slice).

    The same on every rank that has the same number of tokens and columns, so that a chunk may hold collectives.
    """
    step = max(1, CHUNK_BYTES // bytes_per_token)
    for start in range(0, max(num_tokens, 1), step):
        yield slice(start, min(start + step, num_tokens))
