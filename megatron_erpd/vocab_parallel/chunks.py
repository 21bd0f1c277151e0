"""Work over a vocabulary in chunks of tokens, so that temporaries stay within a budget whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from megatron_erpd.errors import LayoutError

CHUNK_BYTES = 256 * 2**20
"""What the temporaries of a chunk may take: small beside a model, large enough to keep a GPU busy."""


CPU_CACHE_BYTES = 6 * 2**20
"""What the temporaries of a block may take on a CPU: those in use at the same time stay in the cache of a core."""


def set_chunk_bytes(size: int) -> None:
    """Sets the budget of this process.

    Raises:
        LayoutError: not above 0.
    """
    global CHUNK_BYTES
    if size < 1:
        raise LayoutError(f"a chunk of {size} bytes holds nothing; give a number above 0")
    CHUNK_BYTES = size


def token_chunks(num_tokens: int, bytes_per_token: int) -> Iterator[slice]:
    """Slices that cover `num_tokens` rows, each of as many as `CHUNK_BYTES` allows and of at least one (no rows: an
    empty slice).

    The same on every rank that has the same number of tokens and columns, so that a chunk may hold collectives.
    """
    step = max(1, CHUNK_BYTES // bytes_per_token)
    for start in range(0, max(num_tokens, 1), step):
        yield slice(start, min(start + step, num_tokens))


def local_blocks(rows: Tensor, bytes_per_token: int) -> Iterator[slice]:
    """Slices that cover the rows of `[n, v]`, for work without collectives: on a CPU of as many as stay in the cache of
    a core, elsewhere as `token_chunks`."""
    budget = min(CHUNK_BYTES, CPU_CACHE_BYTES) if rows.device.type == "cpu" else CHUNK_BYTES
    step = max(1, budget // max(1, bytes_per_token))
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def check_memory(device: torch.device, num_tokens: int, bytes_per_token: int) -> None:
    """Raises `LayoutError` where a chunk is larger than the memory that is left on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    needed = max(bytes_per_token, min(CHUNK_BYTES, num_tokens * bytes_per_token))
    if free < needed:
        raise LayoutError(
            f"a chunk of {needed / 2**20:.0f} MiB doesn't fit into the {free / 2**20:.0f} MiB left on {device}; "
            "set a smaller one with --head-chunk-mib"
        )
