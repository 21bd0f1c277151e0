"""Joining sums of exponentials that were taken relative to different maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_erpd.vocab_parallel.shard import VocabShard


def normalizer(values: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The log of the sum of `exp(values)` over the whole vocabulary as a maximum and a remainder, both `[...]`.

    `values` is `[..., valid_columns]` as from `VocabShard.values`. No gradient. Collectives: one all-gather of two
    numbers per token.
    """
    maximum = shard.local_max(values)
    total = (values - maximum.unsqueeze(-1)).exp_().sum(dim=-1)
    parts = shard.all_gather_partials(torch.stack([maximum, total], dim=-1))
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
