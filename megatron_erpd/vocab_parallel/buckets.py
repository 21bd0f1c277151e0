"""Divergences from a top-k target: both distributions reduced to K tokens and one outcome for all others.

The K tokens are few, so their part is written out on `[n, K]` tensors; only the policy's mass outside of them needs
a pass over the vocabulary. Bounds and approximations of this coarse-graining: see `divergences.divergence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.shard import VocabShard, accumulation_dtype, combine, weighted_sum
from megatron_erpd.vocab_parallel.targets import TopKTarget


class BucketTerms(NamedTuple):
    """What `bucket_terms` finds, the same on every rank: maximum and sum of exponentials of the policy's logits, and of
    those outside of the target's entries; and the token's logit, sum exp(z - maximum) (z - maximum) and the divergence
    in two parts (for `js` the policy's half and the target's). Each [n]."""

    policy: tuple[Tensor, Tensor]
    tail: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor, Tensor, Tensor]


def entry_logits(shard: VocabShard, columns: Tensor, indices: Tensor, scale: float) -> Tensor:
    """The policy's scaled logits at a target's ids `[n, K]`, -inf where an entry is another rank's or empty."""
    owned, _ = shard.locate(indices)
    values = shard.select(columns, indices).to(accumulation_dtype(columns)) * scale
    return values.masked_fill(~owned, -torch.inf)


def bucket_terms(
    shard: VocabShard,
    kind: DivergenceKind,
    target: TopKTarget,
    entries: Tensor,
    statistics: Tensor,
    token_logits: Tensor,
) -> BucketTerms:
    """Normaliser, sums and divergence of n tokens.

    Args:
        entries: [n, K] of `entry_logits`.
        statistics: [n, NUM_STATISTICS] of `passes.statistics`, of all columns but the entries'.
        token_logits: [n], 0 where the token is another rank's.

    Collectives: one all-gather and one SUM, each of four numbers per token.
    """
    tail_maximum, tail_total, tail_weighted = statistics[:, :3].unbind(dim=-1)
    lowest = torch.finfo(entries.dtype).min
    head_maximum = entries.amax(dim=-1).clamp_min(lowest)
    shifted = entries - head_maximum.unsqueeze(-1)
    head_total = shifted.exp().sum(dim=-1)
    head_weighted = (shifted.exp() * shifted.clamp_min(lowest)).sum(dim=-1)
    packed = torch.stack([tail_maximum, tail_total, head_maximum, head_total], dim=-1)
    gathered = shard.all_gather_partials(packed)
    tail = combine(gathered[..., 0], gathered[..., 1])
    maximum, total = combine(
        torch.cat([gathered[..., 0], gathered[..., 2]]), torch.cat([gathered[..., 1], gathered[..., 3]])
    )
    remainder = total.log()
    tail_log_prob = (tail[0] - maximum) + tail[1].log() - remainder
    log_p = (entries - maximum.unsqueeze(-1)) - remainder.unsqueeze(-1)
    owned = shard.locate(target.indices)[0]
    terms = _terms(kind, log_p, target.log_probs.to(log_p.dtype))
    first, second = (torch.where(owned, x, 0.0).sum(dim=-1) for x in terms)
    weighted = weighted_sum(
        torch.stack([tail_maximum, head_maximum]),
        torch.stack([tail_total, head_total]),
        torch.stack([tail_weighted, head_weighted]),
        maximum,
    )
    sums = shard.all_reduce_sum(torch.stack([token_logits, weighted, first, second], dim=-1))
    token_logit, weighted, first, second = sums.unbind(dim=-1)
    on_tail = _terms(kind, tail_log_prob, target.tail_log_prob.to(log_p.dtype))
    return BucketTerms((maximum, total), tail, (token_logit, weighted, first + on_tail[0], second + on_tail[1]))


@dataclass(frozen=True)
class EntryGradient:
    """The gradient at a top-k target's tokens, which replaces what the pass over all columns has written there.

    Attributes:
        columns: int64 [c, K], local; -1 where an entry is another rank's.
        values: [c, K], not yet multiplied by the scale.
        constant, slope: [c], what takes the place of the row's in `passes.gradient` for all other columns, where the
            probabilities are those *within the tail*, p_v / p_tail: p_v itself may underflow where the divergence's
            pull on the tail does not.
    """

    columns: Tensor
    values: Tensor
    constant: Tensor
    slope: Tensor | None

    def write(self, out: Tensor, scale: float) -> None:
        """Overwrites the entries of `out [c, v]`."""
        rows, entries = (self.columns >= 0).nonzero(as_tuple=True)
        out[rows, self.columns[rows, entries]] = (self.values[rows, entries] * scale).to(out.dtype)


class RowGradient(NamedTuple):
    """What a token's gradient is made of, each [c]: upstream of the divergence (`weight`) and of the token's log-prob
    (`on_token`), and the factors of p_v and p_v log p_v that log-prob and entropy give every column."""

    constant: Tensor
    slope: Tensor | None
    on_token: Tensor
    weight: Tensor


def bucket_gradient(
    shard: VocabShard,
    kind: DivergenceKind,
    target: TopKTarget,
    entries: Tensor,
    tokens: Tensor,
    number: Tensor,
    tail_log_prob: Tensor,
    rows: RowGradient,
) -> EntryGradient:
    """The gradient with respect to the logits, at the entries and for all other columns.

    With p and q the policy's and the target's outcomes, D the divergence and c = 1/2 log(p/m), the divergence's
    derivative with respect to the logit of an outcome (an entry, or the tail, which shares its among its columns) is

        forward_kl  Q p - q, Q = sum of all q        reverse_kl  p (log(p/q) - D)        js  p (c - sum p c)

    Args:
        entries: [c, K], the policy's log-probs at the target's ids; -inf where they are another rank's.
        tokens: [c], global ids.
        number: [c], D for `reverse_kl`, sum p c for `js`.
        tail_log_prob: [c], the policy's.
    """
    owned, local = shard.locate(target.indices)
    tail_q = target.tail_log_prob.to(entries.dtype)
    mass = target.log_probs.to(entries.dtype).exp().sum(dim=-1) + tail_q.exp()
    subtracted = mass if kind == "forward_kl" else number
    on_entries = _outcome_gradient(
        kind, entries, target.log_probs.to(entries.dtype), subtracted.unsqueeze(-1), rows.weight.unsqueeze(-1)
    )
    on_tail = _outcome_gradient(kind, tail_log_prob, tail_q, subtracted, rows.weight)
    lowest = torch.finfo(entries.dtype).min
    probs, tail_prob = entries.exp(), tail_log_prob.exp()
    on_entries = on_entries + rows.constant.unsqueeze(-1) * probs
    constant, slope = on_tail + rows.constant * tail_prob, None
    if rows.slope is not None:
        on_entries = on_entries + rows.slope.unsqueeze(-1) * probs * entries.clamp_min(lowest)
        slope = rows.slope * tail_prob
        constant = constant + slope * tail_log_prob.clamp_min(lowest)
    on_entries = on_entries + torch.where(target.indices == tokens.unsqueeze(-1), rows.on_token.unsqueeze(-1), 0.0)
    return EntryGradient(torch.where(owned, local, -1), on_entries, constant, slope)


def _outcome_gradient(kind: DivergenceKind, log_p: Tensor, log_q: Tensor, number: Tensor, weight: Tensor) -> Tensor:
    """`weight` times the divergence's derivative with respect to an outcome's logit, 0 without a weight."""
    probs = log_p.exp()
    if kind == "forward_kl":
        value = number * probs - log_q.exp()
    else:
        value = torch.where(probs == 0, 0.0, probs * (_factor(kind, log_p, log_q) - number))
    return torch.where(weight == 0, 0.0, weight * value)


def _terms(kind: DivergenceKind, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """An outcome's part of the divergence; for `js` the policy's half and the target's."""
    probs, mass = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return torch.where(mass == 0, 0.0, mass * (log_q - log_p)), torch.zeros_like(mass)
    if kind == "reverse_kl":
        return torch.where(probs == 0, 0.0, probs * (log_p - log_q)), torch.zeros_like(mass)
    policy_half = torch.where(probs == 0, 0.0, probs * _factor("js", log_p, log_q))
    return policy_half, torch.where(mass == 0, 0.0, mass * _factor("js", log_q, log_p))


def _factor(kind: DivergenceKind, log_self: Tensor, log_other: Tensor) -> Tensor:
    """log(p/q), or for `js` 1/2 log(p/m)."""
    if kind == "reverse_kl":
        return log_self - log_other
    difference = log_other - log_self
    return 0.5 * (math.log(2.0) - torch.logaddexp(difference, torch.zeros_like(difference)))
