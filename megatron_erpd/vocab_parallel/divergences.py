"""Divergences between a fixed target and a policy whose logits are split over the vocabulary.

With q the target and p = softmax(logits / temperature), in nats per token:

    forward_kl  KL(q || p)
    reverse_kl  KL(p || q)
    js          1/2 KL(p || m) + 1/2 KL(q || m), the mixture m = (p + q) / 2; between 0 and log 2

Only the policy's logits have a gradient. It is given in closed form, so that backward needs no collective and keeps no
vocabulary tensor besides the logits and the target as they are given.

*Temperature* divides the policy's logits; a target's logits have a temperature of their own. No factor of temperature
squared is applied (Hinton et al., 2015, arXiv 1503.02531, scale by it so that the gradient keeps its size when it is
mixed with a hard-label loss; here the divergence itself is the measured quantity and its weight is the caller's).

*Infinity.* Where one side excludes what the other allows the divergence is infinite, is returned so, and its gradient
isn't finite. Tokens whose incoming gradient is zero (those that a loss mask leaves out) always get the gradient zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.divergences import DIVERGENCES
from megatron_erpd.objectives.divergences import divergence as dense_divergence
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.shard import VocabShard, accumulation_dtype
from megatron_erpd.vocab_parallel.targets import LiveTarget, Target, check_target
from megatron_erpd.vocab_parallel.token_terms import token_terms


def divergence(
    kind: DivergenceKind,
    logits: Tensor,
    target: Target,
    shard: VocabShard,
    temperature: float = 1.0,
    overwrite_logits: bool = False,
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
        target: its leading dimensions are those of the logits. No gradient flows into it.
        overwrite_logits: see `token_terms`.

    Returns:
        float32 (float64 for float64 logits). Gradient: into the logits, in their type, zero in padding columns.
        Collectives, forward: one all-gather and one SUM, each of 16 bytes per token, whatever the kind, the vocabulary
        and K. Backward: none.

    Raises:
        As `token_terms`.
    """
    return token_terms(
        logits,
        shard,
        kind=kind,
        target=target,
        temperature=temperature,
        with_entropy=False,
        overwrite_logits=overwrite_logits,
    ).divergence


def gathered_divergence(
    kind: DivergenceKind, logits: Tensor, target: LiveTarget, shard: VocabShard, temperature: float = 1.0
) -> Tensor:
    """`divergence` for a `LiveTarget` with the whole vocabulary gathered on every rank.

    The same number and gradient by another way: rows of logits and target are gathered and the dense formulas of
    `objectives.divergences` differentiated by autograd. It needs several float32 tensors `[..., vocab_size]` per
    rank; it is there to check `divergence` against on a real run.
    Collectives: two all-gathers forward, none backward.
    """
    if kind not in DIVERGENCES:
        raise RecipeError(f"divergence {kind!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    check_target(target, logits.shape[:-1].numel(), shard)
    dtype = accumulation_dtype(logits)
    policy = torch.log_softmax(gather_log_probs(logits, shard).to(dtype) / temperature, dim=-1)
    wanted = gather_log_probs(target.logits.detach(), shard).to(dtype) / target.temperature
    return dense_divergence(kind, torch.log_softmax(wanted, dim=-1), policy)


def gather_log_probs(log_probs: Tensor, shard: VocabShard) -> Tensor:
    """All ranks' columns of `log_probs [..., v/tp]` without padding, `[..., vocab_size]`, the same on every rank.

    Works for logits as well. Collectives: one all-gather forward; none backward, where each rank takes its own
    slice of the gradient (the loss is replicated, so each rank has the whole of it).
    """
    return _Gather.apply(log_probs, shard)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return shard.all_gather(tensor)[..., : shard.vocab_size].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        shard: VocabShard = ctx.shard
        own = upstream[..., shard.start : shard.start + shard.valid_columns]
        return shard.with_padding(own, like=upstream), None
