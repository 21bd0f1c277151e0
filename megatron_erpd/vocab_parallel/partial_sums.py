"""Joining sums of exponentials that were taken relative to different maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_erpd.vocab_parallel.chunks import local_blocks
from megatron_erpd.vocab_parallel.shard import VocabShard


def normalizer(values: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The log of the sum of `exp(values)` over the whole vocabulary as a maximum and a remainder, both `[...]`.

    `values` is `[..., valid_columns]` as from `VocabShard.values`. No gradient. Collectives: one all-gather of two
    numbers per token.
    """
    return joined(local_sums(values, shard), shard)


def local_sums(values: Tensor, shard: VocabShard) -> Tensor:
    """This rank's maximum m and sum exp(z - m), `[..., 2]`. No collective."""
    rows = values.reshape(values.shape[:-1].numel(), values.shape[-1])
    sums = values.new_empty((len(rows), 2))
    for part in local_blocks(rows, 2 * rows.element_size() * rows.shape[-1]):
        maximum = shard.local_max(rows[part])
        sums[part, 0] = maximum
        sums[part, 1] = (rows[part] - maximum.unsqueeze(-1)).exp_().sum(dim=-1)
    return sums.reshape(*values.shape[:-1], 2)


def joined(sums: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """`normalizer` from each rank's `local_sums`."""
    parts = shard.all_gather_partials(sums)
    maximum, total = combine(parts[..., 0], parts[..., 1])
    return maximum, total.log_()


def combine(maxima: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum exp(z - maximum) of all parts, from each part's maximum m and sum exp(z - m), `[parts, n]`.

    The two are kept apart because `(z - maximum) - log(total)` is exact to the last bits for large z and
    `z - logsumexp` is not.
    """
    maximum = maxima.amax(dim=0)
    return maximum, rescaled(maxima - maximum, totals).sum(dim=0)


def weighted_sum(maxima: Tensor, totals: Tensor, weighted: Tensor, maximum: Tensor) -> Tensor:
    """sum exp(z - maximum) (z - maximum) of all parts, from each part's sum exp(z - m) (z - m), `[parts, n]`."""
    lead = maxima - maximum
    return rescaled(lead, weighted + lead * totals).sum(dim=0)


def rescaled(lead: Tensor, value: Tensor) -> Tensor:
    """value * exp(lead), and 0 where exp(lead) is, whatever the value: a part without mass counts for nothing."""
    factor = lead.exp()
    return torch.where(factor == 0, 0.0, value * factor)
