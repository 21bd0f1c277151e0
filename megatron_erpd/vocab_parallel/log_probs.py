"""Log-probabilities and entropies of logits that are split over the vocabulary.

Shapes: logits are `[..., v/tp]` of any floating type; leading dimensions are free (Megatron's `[s, b]`, or `[b, s]`).
Results are float32, or float64 for float64 logits. Padding columns count for nothing and get no gradient.
Kept for backward: the logits as given and a few numbers per token, no vocabulary tensor besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.vocab_parallel.shard import VocabShard, normalizer
from megatron_erpd.vocab_parallel.token_terms import token_terms


def vocab_parallel_log_softmax(logits: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` over the whole vocabulary, `[..., v/tp]`; padding columns are -inf.

    Collectives: one all-gather of two numbers per token forward, one SUM of `[...]` backward. Backward needs it because
    the gradient of a general function of the log-probabilities is only known shard by shard; the functions below, which
    know what is done with them, need none. The incoming gradient of padding columns is ignored.
    """
    return _LogSoftmax.apply(logits, shard, temperature)


def token_log_probs(logits: Tensor, tokens: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` at the global ids `tokens [...]`, `[...]`; 0 and no gradient for
    `IGNORED_TOKEN`. See `token_terms`."""
    return token_terms(logits, shard, tokens, temperature=temperature, with_entropy=False).log_probs


def entropy(logits: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """The entropy in nats of `softmax(logits / temperature)`, `[...]`. See `token_terms`."""
    return token_terms(logits, shard, temperature=temperature).entropy


def token_log_probs_and_entropy(
    logits: Tensor, tokens: Tensor, shard: VocabShard, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` and `entropy` together, for one pass and the collective of one."""
    return token_terms(logits, shard, tokens, temperature=temperature)[:2]


def gather_log_probs(log_probs: Tensor, shard: VocabShard) -> Tensor:
    """All ranks' columns of `log_probs [..., v/tp]` without padding, `[..., vocab_size]`, the same on every rank.

    Works for logits as well. Collectives: one all-gather forward; none backward, where each rank takes its own
    slice of the gradient (the loss is replicated, so each rank has the whole of it).
    """
    return _Gather.apply(log_probs, shard)


def log_softmax_of(values: Tensor, maximum: Tensor, remainder: Tensor) -> Tensor:
    """`values [..., n]` less the normalizer given in two parts; a new tensor. No collective."""
    return (values - maximum.unsqueeze(-1)).sub_(remainder.unsqueeze(-1))


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: VocabShard, temperature: float) -> Tensor:
        values = shard.values(logits, temperature)
        maximum, remainder = normalizer(values, shard)
        ctx.shard, ctx.temperature = shard, temperature
        ctx.save_for_backward(logits, maximum, remainder)
        log_probs = log_softmax_of(values, maximum, remainder)
        return shard.with_padding(log_probs, like=log_probs, fill=-torch.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, maximum, remainder = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        gradient = upstream[..., : shard.valid_columns]
        total = shard.all_reduce_sum(gradient.sum(dim=-1))
        probs = log_softmax_of(shard.values(logits, ctx.temperature), maximum, remainder).exp_()
        gradient = (gradient - probs.mul_(total.unsqueeze(-1))).div_(ctx.temperature)
        return shard.with_padding(gradient, like=logits), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard, ctx.shape = shard, tensor.shape
        return shard.all_gather(tensor)[..., : shard.vocab_size].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        shard: VocabShard = ctx.shard
        own = upstream[..., shard.start : shard.start + shard.valid_columns]
        return shard.with_padding(own, like=upstream), None
