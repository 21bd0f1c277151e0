"""A rank's shard of the vocabulary, the collectives over the shards, and sums of exponentials that they join.

Megatron splits the vocabulary, padded to a multiple of the tensor-parallel size, into equal contiguous ranges.
The columns past the true vocabulary are padding: they hold logits of rows that no token uses, and every function of
this package ignores them, also where a whole shard is padding.

Gradients follow one convention, Megatron's: every rank computes the **same, replicated** loss, and the gradient
of a rank's own shard of the logits is exactly that slice of the dense gradient. There is no factor of the
tensor-parallel size, because the sums over ranks are inside functions whose backward is written out by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_erpd.errors import LayoutError


@dataclass(frozen=True)
class VocabShard:
    """The columns `[start, end)` of a vocabulary padded to equal ranges, and the group that holds the others.

    Attributes:
        start, end: the global columns of this rank, padding included.
        vocab_size: the true size; columns `>= vocab_size` are padding.
        group: the tensor-parallel group, its ranks holding equal ranges in order; None for one process.

    Raises:
        LayoutError: the range isn't the one that this rank of the group must have, or the ranges of all ranks
            don't cover the vocabulary.
    """

    start: int
    end: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        rank = 0 if self.group is None else dist.get_rank(self.group)
        if self.vocab_size < 1 or self.width < 1 or self.start != rank * self.width:
            raise LayoutError(
                f"vocabulary range [{self.start}, {self.end}) isn't the range of rank {rank} of {self.size}; "
                "ranks hold equal, contiguous ranges in order"
            )
        if self.size * self.width < self.vocab_size:
            raise LayoutError(
                f"{self.size} ranges of {self.width} columns don't cover a vocabulary of {self.vocab_size}; "
                "pad the vocabulary to a multiple of the tensor-parallel size"
            )

    @classmethod
    def dense(cls, vocab_size: int, padded_vocab_size: int | None = None) -> VocabShard:
        """The whole vocabulary in one process."""
        return cls(0, vocab_size if padded_vocab_size is None else padded_vocab_size, vocab_size)

    @classmethod
    def of_rank(cls, vocab_size: int, padded_vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The calling rank's range of a vocabulary padded to `padded_vocab_size` columns in all."""
        size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if padded_vocab_size % size:
            raise LayoutError(f"padded vocabulary of {padded_vocab_size} isn't a multiple of the {size} ranks")
        width = padded_vocab_size // size
        return cls(rank * width, (rank + 1) * width, vocab_size, group)

    @property
    def size(self) -> int:
        """The number of ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def width(self) -> int:
        """The number of columns of this rank, padding included: the last dimension of its tensors."""
        return self.end - self.start

    @property
    def valid_columns(self) -> int:
        """How many of this rank's columns, from the first on, belong to the true vocabulary; may be 0."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    def values(self, tensor: Tensor, temperature: float = 1.0) -> Tensor:
        """The valid columns of `tensor [..., v/tp]` divided by `temperature`, in float32 (float64 stays).

        A view where neither the type nor the temperature asks for a copy.
        """
        if tensor.shape[-1] != self.width:
            raise LayoutError(
                f"tensor of shape {tuple(tensor.shape)} has {tensor.shape[-1]} columns, "
                f"the vocabulary range [{self.start}, {self.end}) has {self.width}"
            )
        columns = tensor[..., : self.valid_columns].to(accumulation_dtype(tensor))
        return columns if temperature == 1.0 else columns / temperature

    def with_padding(self, columns: Tensor, like: Tensor, fill: float = 0.0) -> Tensor:
        """`columns [..., valid_columns]` as `[..., v/tp]` in the type of `like`, padding columns set to `fill`."""
        columns = columns.to(like.dtype)
        padding = self.width - self.valid_columns
        return torch.nn.functional.pad(columns, (0, padding), value=fill) if padding else columns

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the global ids `tokens` are valid columns of this rank (bool), and their local column (else 0)."""
        owned = (tokens >= self.start) & (tokens < self.start + self.valid_columns)
        return owned, torch.where(owned, tokens.long() - self.start, 0)

    def select(self, columns: Tensor, tokens: Tensor) -> Tensor:
        """`columns [..., valid_columns]` at the global ids `tokens [..., k]`, 0 for those of other ranks."""
        owned, local = self.locate(tokens)
        if not self.valid_columns:
            return torch.zeros_like(tokens, dtype=columns.dtype)
        return torch.where(owned, columns.gather(-1, local), 0.0)

    def local_max(self, columns: Tensor) -> Tensor:
        """The maximum of `columns [..., valid_columns]` over this rank, `[...]`.

        The lowest finite number stands for minus infinity (no column, or none above minus infinity), so that
        differences of maxima stay finite.
        """
        lowest = torch.finfo(columns.dtype).min
        if not self.valid_columns:
            return columns.new_full(columns.shape[:-1], lowest)
        return columns.amax(dim=-1).clamp_min(lowest)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks; one collective, none for one rank. May overwrite `tensor`. No gradient."""
        if self.size > 1 and tensor.numel():
            # Sums over a transposed view of the logits are laid out as the view is; collectives want row-major.
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`tensor [..., n]` of all ranks beside each other, `[..., size * n]`; one collective. No gradient."""
        if self.group is None or self.size == 1:
            return tensor
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return torch.cat(gathered, dim=-1)

    def all_gather_partials(self, tensor: Tensor) -> Tensor:
        """`tensor [...]` of all ranks in order, `[size, ...]`; one collective. No gradient."""
        if self.group is None or self.size == 1:
            return tensor.unsqueeze(0)
        if not tensor.numel():
            return tensor.expand(self.size, *tensor.shape)
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return torch.stack(gathered)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The type that `tensor` is computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def normalizer(values: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The log of the sum of `exp(values)` over the whole vocabulary as a maximum and a remainder, both `[...]`.

    `values` is `[..., valid_columns]` as from `VocabShard.values`. No gradient. Collectives: one all-gather of two
    numbers per token.
    """
    return joined(local_sums(values, shard), shard)


def log_softmax_of(values: Tensor, maximum: Tensor, remainder: Tensor) -> Tensor:
    """`values [..., n]` less their `normalizer`; a new tensor. No collective."""
    return (values - maximum.unsqueeze(-1)).sub_(remainder.unsqueeze(-1))


@torch.no_grad()
def vocab_parallel_log_softmax(logits: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` over the whole vocabulary, `[..., v/tp]`; padding columns are -inf.

    float32 (float64 for float64 logits). No gradient: `token_terms` has one. Collectives: as `normalizer`.
    """
    values = shard.values(logits, temperature)
    log_probs = log_softmax_of(values, *normalizer(values, shard))
    return shard.with_padding(log_probs, like=log_probs, fill=-torch.inf)


def local_sums(values: Tensor, shard: VocabShard) -> Tensor:
    """This rank's maximum m and sum exp(z - m), `[..., 2]`. No collective."""
    flat = values.reshape(values.shape[:-1].numel(), values.shape[-1])
    sums = values.new_empty((len(flat), 2))
    for rows in local_blocks(flat, 2 * flat.element_size() * flat.shape[-1]):
        maximum = shard.local_max(flat[rows])
        sums[rows, 0] = maximum
        sums[rows, 1] = (flat[rows] - maximum.unsqueeze(-1)).exp_().sum(dim=-1)
    return sums.reshape(*values.shape[:-1], 2)


def joined(sums: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """`normalizer` from each rank's `local_sums`."""
    gathered = shard.all_gather_partials(sums)
    maximum, total = combine(gathered[..., 0], gathered[..., 1])
    return maximum, total.log_()


def combine(maxima: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum exp(z - maximum) over all shards, from each shard's maximum m and sum exp(z - m), `[shards, n]`.

    The two are kept apart because `(z - maximum) - log(total)` is exact to the last bits for large z and
    `z - logsumexp` is not.
    """
    maximum = maxima.amax(dim=0)
    return maximum, rescaled(maxima - maximum, totals).sum(dim=0)


def weighted_sum(maxima: Tensor, totals: Tensor, weighted: Tensor, maximum: Tensor) -> Tensor:
    """sum exp(z - maximum) (z - maximum) over all shards, from each shard's sum exp(z - m) (z - m), `[shards, n]`."""
    lead = maxima - maximum
    return rescaled(lead, weighted + lead * totals).sum(dim=0)


def rescaled(lead: Tensor, value: Tensor) -> Tensor:
    """value * exp(lead), and 0 where exp(lead) is 0, even for an infinite value: a shard without mass adds nothing."""
    factor = lead.exp()
    return torch.where(factor == 0, 0.0, value * factor)


# Work over a vocabulary in chunks of tokens, so that temporaries stay within a budget whatever the batch

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
