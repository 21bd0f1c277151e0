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

from megatron_erpd.vocab_parallel.shard import VocabShard, zero_where_unused

IGNORED_TOKEN = -100
"""A label that stands for no token, as in PyTorch's cross entropy: log-probability 0, no gradient."""


def vocab_parallel_log_softmax(logits: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` over the whole vocabulary, `[..., v/tp]`; padding columns are -inf.

    Collectives: one MAX and one SUM of `[...]` forward, one SUM of `[...]` backward. Backward needs it because the
    gradient of a general function of the log-probabilities is only known shard by shard; the functions below, which
    know what is done with them, need none. The incoming gradient of padding columns is ignored.
    """
    return _LogSoftmax.apply(logits, shard, temperature)


def token_log_probs(logits: Tensor, tokens: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` at the global ids `tokens [...]`, `[...]`, the same on every rank.

    `IGNORED_TOKEN` gives 0 and no gradient. Any other id outside the true vocabulary gives NaN: looking for it on
    the host would stall a device, and a wrong number would pass unseen.
    Collectives: one MAX of `[...]` and one SUM of `[..., 2]` forward, none backward.
    """
    return _TokenStatistics.apply(logits, tokens, shard, temperature, False)[0]


def entropy(logits: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """The entropy in nats of `softmax(logits / temperature)`, `[...]`, the same on every rank.

    Collectives: one MAX of `[...]` and one SUM of `[..., 3]` forward, none backward.
    """
    tokens = torch.full(logits.shape[:-1], IGNORED_TOKEN, dtype=torch.int64, device=logits.device)
    return token_log_probs_and_entropy(logits, tokens, shard, temperature)[1]


def token_log_probs_and_entropy(
    logits: Tensor, tokens: Tensor, shard: VocabShard, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` and `entropy` together, for one pass and the collectives of one."""
    return _TokenStatistics.apply(logits, tokens, shard, temperature, True)


def gather_log_probs(log_probs: Tensor, shard: VocabShard) -> Tensor:
    """All ranks' columns of `log_probs [..., v/tp]` without padding, `[..., vocab_size]`, the same on every rank.

    Works for logits as well. Collectives: one all-gather forward; none backward, where each rank takes its own
    slice of the gradient (the loss is replicated, so each rank has the whole of it).
    """
    return _Gather.apply(log_probs, shard)


def normalizer(values: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The log of the sum of `exp(values)` over the whole vocabulary as a maximum and a remainder, both `[...]`.

    `values` is `[..., valid_columns]` as from `VocabShard.values`. The two parts are kept apart because
    `(value - maximum) - remainder` is exact to the last bits for large logits and `value - logsumexp` is not.
    Collectives: one MAX and one SUM of `[...]`. No gradient.
    """
    maximum = shard.all_reduce_max(shard.local_max(values))
    total = shard.all_reduce_sum((values - maximum.unsqueeze(-1)).exp_().sum(dim=-1))
    return maximum, total.log_()


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


class _TokenStatistics(torch.autograd.Function):
    """Log-probability of one token and, where asked, the entropy.

    With p = softmax(z), H its entropy and y the token:
    d log p_y / dz_v = [v = y] - p_v and dH / dz_v = -p_v (log p_v + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, shard: VocabShard, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        values = shard.values(logits, temperature)
        maximum = shard.all_reduce_max(shard.local_max(values))
        shifted = values - maximum.unsqueeze(-1)
        token_shifted = shard.select(shifted, tokens.unsqueeze(-1)).squeeze(-1)
        weights = shifted.exp()
        sums = [weights.sum(dim=-1), token_shifted]
        if with_entropy:
            # A logit of -inf has weight 0; the lowest finite number keeps 0 * inf away.
            lowest = torch.finfo(shifted.dtype).min
            sums.append(weights.mul_(shifted.clamp_min_(lowest)).sum(dim=-1))
        del weights, shifted
        packed = shard.all_reduce_sum(torch.stack(sums, dim=-1))
        remainder = packed[..., 0].log()
        is_token = (tokens >= 0) & (tokens < shard.vocab_size)
        outside = torch.where(tokens == IGNORED_TOKEN, 0.0, torch.nan).to(remainder.dtype)
        log_probs = torch.where(is_token, packed[..., 1] - remainder, outside)
        entropies = remainder - packed[..., 2] / packed[..., 0] if with_entropy else torch.zeros_like(remainder)
        ctx.shard, ctx.temperature = shard, temperature
        ctx.save_for_backward(logits, tokens, maximum, remainder, entropies)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, upstream_log_probs: Tensor | None, upstream_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        if upstream_log_probs is None and upstream_entropy is None:
            return None, None, None, None, None
        logits, tokens, maximum, remainder, entropies = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        log_probs = log_softmax_of(shard.values(logits, ctx.temperature), maximum, remainder)
        gradient = log_probs.exp()
        # All terms hold p_v; build their per-token factor first, then multiply once.
        factor: Tensor = torch.zeros_like(gradient)
        used = torch.zeros_like(remainder)
        if upstream_entropy is not None:
            lowest = torch.finfo(log_probs.dtype).min
            factor = log_probs.clamp_min_(lowest).add_(entropies.unsqueeze(-1)).mul_(-upstream_entropy.unsqueeze(-1))
            used = used + upstream_entropy.abs()
        on_token = torch.zeros_like(remainder)
        if upstream_log_probs is not None:
            is_token = (tokens >= 0) & (tokens < shard.vocab_size)
            on_token = torch.where(is_token, upstream_log_probs, 0.0)
            factor = factor - on_token.unsqueeze(-1)
            used = used + on_token.abs()
        gradient.mul_(factor)
        if shard.valid_columns:
            owned, local = shard.locate(tokens.unsqueeze(-1))
            gradient.scatter_add_(-1, local, torch.where(owned, on_token.unsqueeze(-1), 0.0))
        gradient = zero_where_unused(gradient, used).div_(ctx.temperature)
        return shard.with_padding(gradient, like=logits), None, None, None, None


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
