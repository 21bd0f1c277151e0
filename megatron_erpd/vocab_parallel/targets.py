"""What a policy is compared with: a distribution per token, known whole, by hidden states, or at its top-k tokens.

For a top-k target both distributions are reduced to K tokens and one outcome for all others. The K tokens are few, so
their part is written out on `[n, K]` tensors (`bucket_terms`, `bucket_gradient`); only the policy's mass outside of
them needs a pass over the vocabulary. Bounds and approximations of this coarse-graining: `divergences.divergence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.divergences import TopKTarget
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.passes import RowGradient, logits_of
from megatron_erpd.vocab_parallel.shard import VocabShard, accumulation_dtype, combine, weighted_sum


class FullTarget(Protocol):
    """A distribution over the whole vocabulary, split as the policy's logits are, for some tokens in order.

    It is asked for a chunk of tokens at a time, in forward and once more in backward, with the same chunks; what it
    computes for a chunk need not outlive it.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def bytes_per_token(self) -> int:
        """What `rows` makes in memory for a token; 0 where it makes nothing."""
        ...

    def rows(self, part: slice) -> Tensor:
        """Logits `[c, v/tp]` of these tokens (normalised log-probs serve as well): the target is
        softmax(logits / temperature). -inf is allowed; what padding columns hold doesn't matter."""
        ...


@dataclass(frozen=True)
class LiveTarget:
    """A distribution given by its logits.

    Attributes:
        logits: [..., v/tp], any floating type; normalised log-probs serve as well.
        temperature: divides these logits; the policy's has its own.
    """

    logits: Tensor
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[:-1].numel()

    @property
    def bytes_per_token(self) -> int:
        return 0

    def rows(self, part: slice) -> Tensor:
        return self.logits.detach().reshape(-1, self.logits.shape[-1])[part]


@dataclass(frozen=True)
class HiddenTarget:
    """A teacher whose logits are made from its final hidden states as they are needed, a chunk at a time.

    Attributes:
        hidden: [..., h], the input of the teacher's output layer, replicated on every tensor-parallel rank.
        weight: [v/tp, h], this rank's shard of that output layer.
        temperature: divides the teacher's logits.
    """

    hidden: Tensor
    weight: Tensor
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[:-1].numel()

    @property
    def bytes_per_token(self) -> int:
        return len(self.weight) * accumulation_dtype(self.weight).itemsize

    def rows(self, part: slice) -> Tensor:
        hidden = self.hidden.detach().reshape(-1, self.hidden.shape[-1])[part]
        return logits_of(hidden.to(self.weight.dtype), self.weight)


Target = FullTarget | TopKTarget

NORMALIZATION_TOLERANCE = 1e-2
"""How far the mass of a cached target may be from 1: half-precision log-probs of 64 tokens may be off by 1e-3."""


def check_target(target: Target, num_tokens: int, shard: VocabShard) -> None:
    """Raises `RecipeError` where shapes don't fit; looks at no values."""
    if isinstance(target, TopKTarget):
        entries = (num_tokens, target.indices.shape[-1])
        found = {
            "indices": (tuple(target.indices.shape), entries),
            "log_probs": (tuple(target.log_probs.shape), entries),
            "tail_log_prob": (tuple(target.tail_log_prob.shape), (num_tokens,)),
        }
    elif isinstance(target, LiveTarget):
        found = {"logits": ((target.num_tokens, target.logits.shape[-1]), (num_tokens, shard.width))}
    elif isinstance(target, HiddenTarget):
        found = {
            "weight": (tuple(target.weight.shape), (shard.width, target.hidden.shape[-1])),
            "tokens": ((target.num_tokens,), (num_tokens,)),
        }
    else:
        found = {"tokens": ((target.num_tokens,), (num_tokens,))}
    for name, (actual, expected) in found.items():
        if actual != expected:
            raise RecipeError(
                f"the target's {name} of shape {actual} don't fit {num_tokens} tokens and {shard.width} columns of the "
                f"policy: expected {expected}"
            )
    if not isinstance(target, TopKTarget) and not target.temperature > 0:
        raise RecipeError(f"the target's temperature must be above 0, not {target.temperature}")


def unnormalized_tokens(target: TopKTarget) -> Tensor:
    """Bool [n]: tokens whose entries and tail don't add up to 1, or whose entries of some mass name no token."""
    probs = target.log_probs.float().exp()
    mass = probs.sum(dim=-1) + target.tail_log_prob.float().exp()
    nameless = ((target.indices < 0) & (probs > 0)).any(dim=-1)
    return ~((mass - 1.0).abs() <= NORMALIZATION_TOLERANCE) | nameless


def why_unnormalized(target: TopKTarget, position: int) -> str:
    """What is wrong with one of `unnormalized_tokens`, for a message."""
    indices, log_probs, tail = target.indices[position], target.log_probs[position], target.tail_log_prob[position]
    if bool(((indices < 0) & (log_probs > -torch.inf)).any()):
        return f"gives mass to no token: an index is below 0 in {indices.tolist()}"
    mass = float(log_probs.double().exp().sum() + tail.double().exp())
    return f"isn't a distribution: its {len(indices)} entries and its tail add up to {mass:.6g}"


def flatten_topk(target: TopKTarget) -> TopKTarget:
    """The same with one leading dimension."""
    k = target.indices.shape[-1]
    return TopKTarget(
        target.indices.reshape(-1, k).long(), target.log_probs.reshape(-1, k), target.tail_log_prob.reshape(-1)
    )


def topk_rows(target: TopKTarget, part: slice) -> TopKTarget:
    """Some tokens of a flat target."""
    return TopKTarget(target.indices[part], target.log_probs[part], target.tail_log_prob[part])


# A top-k target's outcomes


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
        if not out.shape[-1]:
            return
        owned = self.columns >= 0
        values = (self.values * scale).to(out.dtype)
        # How many are this rank's only the device knows. Those of other ranks write column 0, what it holds in the end.
        is_first = self.columns == 0
        own_first = torch.where(is_first, values, 0.0).sum(dim=-1)
        first = torch.where(is_first.any(dim=-1), own_first, out[:, 0]).unsqueeze(-1)
        out.scatter_(-1, torch.where(owned, self.columns, 0), torch.where(owned, values, first))


def bucket_gradient(
    shard: VocabShard,
    kind: DivergenceKind,
    target: TopKTarget,
    entries: Tensor,
    number: Tensor,
    tail_log_prob: Tensor,
    rows: RowGradient,
    weight: Tensor,
) -> EntryGradient:
    """The gradient with respect to the logits, at the entries and for all other columns.

    With p and q the policy's and the target's outcomes, D the divergence and c = 1/2 log(p/m), the divergence's
    derivative with respect to the logit of an outcome (an entry, or the tail, which shares its among its columns) is

        forward_kl  Q p - q, Q = sum of all q        reverse_kl  p (log(p/q) - D)        js  p (c - sum p c)

    Args:
        entries: [c, K], the policy's log-probs at the target's ids; -inf where they are another rank's.
        number: [c], D for `reverse_kl`, sum p c for `js`.
        tail_log_prob: [c], the policy's.
        rows, weight: [c], upstream of log-prob and entropy, and of the divergence.
    """
    owned, local = shard.locate(target.indices)
    columns = torch.where(owned, local, -1)
    tail_q = target.tail_log_prob.to(entries.dtype)
    mass = target.log_probs.to(entries.dtype).exp().sum(dim=-1) + tail_q.exp()
    subtracted = mass if kind == "forward_kl" else number
    on_entries = _outcome_gradient(
        kind, entries, target.log_probs.to(entries.dtype), subtracted.unsqueeze(-1), weight.unsqueeze(-1)
    )
    on_tail = _outcome_gradient(kind, tail_log_prob, tail_q, subtracted, weight)
    lowest = torch.finfo(entries.dtype).min
    probs, tail_prob = entries.exp(), tail_log_prob.exp()
    on_entries = on_entries + rows.constant.unsqueeze(-1) * probs
    constant, slope = on_tail + rows.constant * tail_prob, None
    if rows.slope is not None:
        on_entries = on_entries + rows.slope.unsqueeze(-1) * probs * entries.clamp_min(lowest)
        slope = rows.slope * tail_prob
        constant = constant + slope * tail_log_prob.clamp_min(lowest)
    on_entries = on_entries + torch.where(columns == rows.tokens.unsqueeze(-1), rows.on_token.unsqueeze(-1), 0.0)
    return EntryGradient(columns, on_entries, constant, slope)


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
