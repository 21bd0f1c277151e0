"""Divergences between a fixed target and a policy whose logits are split over the vocabulary.

With q the target and p = softmax(logits / temperature), in nats per token:

    forward_kl  KL(q || p)
    reverse_kl  KL(p || q)
    js          1/2 KL(p || m) + 1/2 KL(q || m), the mixture m = (p + q) / 2; between 0 and log 2

Only the policy's logits have a gradient. It is given in closed form, so that backward needs no collective and keeps no
vocabulary tensor besides the logits and the target as they are given.

*Temperature* divides the policy's logits alone. A target is a distribution: whoever makes it from a teacher's logits
divides those by the same temperature first. No factor of temperature squared is applied (Hinton et al., 2015, arXiv
1503.02531, scale by it so that the gradient keeps its size when it is mixed with a hard-label loss; here the
divergence itself is the measured quantity and its weight is the caller's).

*Infinity.* Where one side excludes what the other allows the divergence is infinite, is returned so, and its gradient
isn't finite. Tokens whose incoming gradient is zero (those that a loss mask leaves out) always get the gradient zero.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.divergences import DIVERGENCES
from megatron_erpd.objectives.divergences import divergence as dense_divergence
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.log_probs import gather_log_probs, log_softmax_of, normalizer
from megatron_erpd.vocab_parallel.shard import VocabShard, zero_where_unused
from megatron_erpd.vocab_parallel.topk import TopKTarget, exclude


class LiveTarget(NamedTuple):
    """A distribution over the full vocabulary, split as the logits are.

    Attributes:
        log_probs: [..., v/tp] normalised log-probabilities, any floating type, -inf allowed (what padding
            columns hold doesn't matter).
    """

    log_probs: Tensor


def divergence(
    kind: DivergenceKind,
    logits: Tensor,
    target: LiveTarget | TopKTarget,
    shard: VocabShard,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence between target and policy per token, `[...]`, the same on every rank.

    Against a `TopKTarget` both distributions are reduced to K + 1 outcomes, the K tokens and one for all others, whose
    probability is exact on both sides (the policy's is the logsumexp of its other columns). Such a coarse-graining
    bounds each of the three divergences from below (data-processing inequality). For `forward_kl` the gap is q's
    tail mass times a KL within the tail, small where that mass is. For `reverse_kl` and `js` the gap is weighted by the
    *policy's* tail mass too: from a fixed top-k of the target they are approximations, good where the policy keeps
    to those tokens.

    Args:
        logits: [..., v/tp] of the policy, any floating type, finite or -inf; padding columns don't matter.
        target: its leading dimensions are those of the logits. No gradient flows into it. It isn't normalised again.

    Returns:
        float32 (float64 for float64 logits). Gradient: into the logits, in their type, zero in padding columns.
        Collectives, forward: one MAX and one SUM, of `[...]` to `[..., 3]`, for a `LiveTarget` (`js`: a second SUM);
        one MAX of `[...]` and one SUM of `[..., K + 1]` for a `TopKTarget`. Backward: none.

    Raises:
        RecipeError: the kind is unknown or the shapes don't fit.
    """
    _check(kind, logits, target)
    if isinstance(target, LiveTarget):
        return _Divergence.apply(logits, target.log_probs, kind, shard, temperature)
    bucket_logits = _BucketLogits.apply(logits, target.indices, shard, temperature)
    bucket_log_probs = torch.cat([target.log_probs, target.tail_log_prob.unsqueeze(-1)], dim=-1)
    buckets = VocabShard.dense(bucket_logits.shape[-1])
    return _Divergence.apply(bucket_logits, bucket_log_probs, kind, buckets, 1.0)


def gathered_divergence(
    kind: DivergenceKind, logits: Tensor, target: LiveTarget, shard: VocabShard, temperature: float = 1.0
) -> Tensor:
    """`divergence` for a `LiveTarget` with the whole vocabulary gathered on every rank.

    The same number and gradient by another way: rows of logits and target are gathered and the dense formulas of
    `objectives.divergences` differentiated by autograd. It needs several float32 tensors `[..., vocab_size]` per
    rank; it is there to check `divergence` against on a real run.
    Collectives: two all-gathers forward, none backward.
    """
    _check(kind, logits, target)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    policy = torch.log_softmax(gather_log_probs(logits, shard).to(dtype) / temperature, dim=-1)
    wanted = gather_log_probs(target.log_probs.detach(), shard).to(dtype)
    return dense_divergence(kind, wanted, policy)


def _check(kind: str, logits: Tensor, target: LiveTarget | TopKTarget) -> None:
    if kind not in DIVERGENCES:
        raise RecipeError(f"divergence {kind!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    tokens = tuple(logits.shape[:-1])
    if isinstance(target, LiveTarget):
        expected = [("log_probs", target.log_probs, tuple(logits.shape))]
    else:
        entries = (*tokens, target.indices.shape[-1])
        expected = [
            ("indices", target.indices, entries),
            ("log_probs", target.log_probs, entries),
            ("tail_log_prob", target.tail_log_prob, tokens),
        ]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise RecipeError(
                f"the target's {name} of shape {tuple(tensor.shape)} don't fit logits of shape {tuple(logits.shape)}: "
                f"expected {shape}"
            )


class _Divergence(torch.autograd.Function):
    """Divergence of the full vocabulary, with z = logits / temperature, p = softmax(z), Q = sum_v q_v (nearly 1).

    forward_kl  D = sum q (log q - z) + Q log sum exp z             dD/dz_v = Q p_v - q_v
    reverse_kl  D = sum p (log p - log q)                           dD/dz_v = p_v (log(p_v/q_v) - D)
    js          D = 1/2 sum p log(p/m) + 1/2 sum q log(q/m)         dD/dz_v = p_v (c_v - sum_u p_u c_u)

    where c = 1/2 log(p/m).
    The per-token number in the gradient (Q, D, sum p c) is kept from forward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, kind: DivergenceKind, shard: VocabShard, temperature: float
    ) -> Tensor:
        values = shard.values(logits, temperature)
        wanted = shard.values(target).to(values.dtype)
        if kind == "js":
            maximum, remainder = normalizer(values, shard)
            log_probs = log_softmax_of(values, maximum, remainder)
            terms = _js_terms(log_probs, wanted)
            halves = shard.all_reduce_sum(torch.stack([term.sum(dim=-1) for term in terms], dim=-1))
            result, number = halves.sum(dim=-1), halves[..., 0]
        else:
            maximum = shard.all_reduce_max(shard.local_max(values))
            shifted = values - maximum.unsqueeze(-1)
            sums = _forward_sums(shifted, wanted) if kind == "forward_kl" else _reverse_sums(shifted, wanted)
            packed = shard.all_reduce_sum(torch.stack(sums, dim=-1))
            remainder = packed[..., 0].log()
            if kind == "forward_kl":
                number = packed[..., 2]
                result = packed[..., 1] + number * remainder
            else:
                result = number = packed[..., 1] / packed[..., 0] - remainder
        ctx.kind, ctx.shard, ctx.temperature = kind, shard, temperature
        ctx.save_for_backward(logits, target, maximum, remainder, number)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, maximum, remainder, number = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        log_probs = log_softmax_of(shard.values(logits, ctx.temperature), maximum, remainder)
        wanted = shard.values(target).to(log_probs.dtype)
        probs = log_probs.exp()
        number = number.unsqueeze(-1)
        if ctx.kind == "forward_kl":
            gradient = probs.mul_(number).sub_(wanted.exp())
        else:
            if ctx.kind == "reverse_kl":
                factor = log_probs.sub_(wanted).sub_(number)
            else:
                factor = _log_ratio_to_mixture(wanted.sub(log_probs)).mul_(0.5).sub_(number)
            gradient = factor.mul_(probs).masked_fill_(probs == 0, 0.0)
        gradient = zero_where_unused(gradient.mul_(upstream.unsqueeze(-1) / ctx.temperature), upstream)
        return shard.with_padding(gradient, like=logits), None, None, None, None


def _forward_sums(shifted: Tensor, wanted: Tensor) -> list[Tensor]:
    """This rank's part of sum exp z, sum q (log q - z) and sum q, for logits z less their maximum."""
    mass = wanted.exp()
    total = shifted.exp().sum(dim=-1)
    cross = (wanted - shifted).mul_(mass).masked_fill_(mass == 0, 0.0)
    return [total, cross.sum(dim=-1), mass.sum(dim=-1)]


def _reverse_sums(shifted: Tensor, wanted: Tensor) -> list[Tensor]:
    """This rank's part of sum exp z and sum exp z (z - log q), for logits z less their maximum."""
    weights = shifted.exp()
    cross = (shifted - wanted).mul_(weights).masked_fill_(weights == 0, 0.0)
    return [weights.sum(dim=-1), cross.sum(dim=-1)]


def _js_terms(log_probs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 p log(p/m) and 1/2 q log(q/m), column by column."""
    difference = wanted - log_probs
    probs, mass = log_probs.exp(), wanted.exp()
    policy_term = (_log_ratio_to_mixture(difference) * probs).masked_fill_(probs == 0, 0.0)
    target_term = (_log_ratio_to_mixture(difference.neg_()) * mass).masked_fill_(mass == 0, 0.0)
    return policy_term.mul_(0.5), target_term.mul_(0.5)


def _log_ratio_to_mixture(log_other_over_self: Tensor) -> Tensor:
    """log(self / m) with m = (self + other) / 2, from log(other / self): log 2 - log(1 + other / self)."""
    return math.log(2.0) - torch.logaddexp(log_other_over_self, torch.zeros_like(log_other_over_self))


class _BucketLogits(torch.autograd.Function):
    """Logits of the K + 1 outcomes "token k" and "any other token", `[..., K + 1]`, the same on every rank.

    u_k = z_k and u_tail = log sum_{other v} exp z_v, so softmax(u) are the policy's probabilities of the outcomes. The
    largest logit of the token is subtracted, a constant that no softmax notices: the incoming gradient sums to
    zero over the outcomes, so the constant needs none. du_tail/dz_v = exp(z_v - u_tail), the policy within the tail.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, shard: VocabShard, temperature: float) -> Tensor:
        values = shard.values(logits, temperature)
        rest = exclude(values, indices, shard, -torch.inf)
        tail_maximum = shard.all_reduce_max(shard.local_max(rest))
        tail_sum = rest.sub_(tail_maximum.unsqueeze(-1)).exp_().sum(dim=-1, keepdim=True)
        packed = shard.all_reduce_sum(torch.cat([shard.select(values, indices), tail_sum], dim=-1))
        exists = (indices >= 0) & (indices < shard.vocab_size)
        selected = packed[..., :-1].masked_fill(~exists, -torch.inf)
        remainder = packed[..., -1].log()
        maximum = torch.maximum(selected.amax(dim=-1), tail_maximum)
        tail_logit = tail_maximum - maximum + remainder
        ctx.shard, ctx.temperature = shard, temperature
        # Where the tail is empty no column may get a share of its gradient: exp(z - inf) = 0.
        remainder = remainder.masked_fill(remainder == -torch.inf, torch.inf)
        ctx.save_for_backward(logits, indices, tail_maximum, remainder)
        return torch.cat([selected - maximum.unsqueeze(-1), tail_logit.unsqueeze(-1)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, indices, maximum, remainder = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        on_tokens, on_tail = upstream[..., :-1], upstream[..., -1]
        within_tail = log_softmax_of(shard.values(logits, ctx.temperature), maximum, remainder)
        within_tail = exclude(within_tail, indices, shard, -torch.inf).exp_()
        gradient = within_tail.mul_(on_tail.unsqueeze(-1))
        if shard.valid_columns:
            owned, local = shard.locate(indices)
            gradient.scatter_add_(-1, local, torch.where(owned, on_tokens, 0.0))
        gradient.div_(ctx.temperature)
        return shard.with_padding(gradient, like=logits), None, None, None
