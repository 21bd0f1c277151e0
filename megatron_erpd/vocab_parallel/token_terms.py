"""Log-prob, entropy and divergence of logits that exist, with their gradient.

Kept for backward: the logits and the target as they are given and a few numbers per token, no vocabulary tensor
besides. The gradient of a rank's logits is its slice of the dense gradient (see `shard`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.errors import LayoutError, RecipeError
from megatron_erpd.objectives.divergences import DIVERGENCES
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.chunks import token_chunks
from megatron_erpd.vocab_parallel.shard import VocabShard
from megatron_erpd.vocab_parallel.targets import Target, TopKTarget, check_target, flatten_topk
from megatron_erpd.vocab_parallel.terms import IGNORED_TOKEN, Request, Scalars, Upstream, compute, gradient


class TokenTerms(NamedTuple):
    """Per token, the same on every rank; float32 (float64 for float64 logits).

    Attributes:
        log_probs: [...] nats, of the tokens; 0 for `IGNORED_TOKEN`.
        entropy: [...] nats, 0 where it was not asked for.
        divergence: [...] nats, 0 without a target.
    """

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor


def token_terms(
    logits: Tensor,
    shard: VocabShard,
    tokens: Tensor | None = None,
    kind: DivergenceKind | None = None,
    target: Target | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    overwrite_logits: bool = False,
) -> TokenTerms:
    """Log-probs of `tokens`, entropy and a divergence of softmax(logits / temperature), in one pass.

    Args:
        logits: [..., v/tp] of any floating type, -inf allowed; padding columns don't matter. Contiguous, or the passes
            work on a copy.
        tokens: int64 [...], global ids or `IGNORED_TOKEN`; None for none.
        kind, target: see `divergence`; given together. No gradient flows into the target.
        with_entropy: leave it out where it isn't needed.
        overwrite_logits: backward writes the gradient over the logits instead of into a tensor of its own: for logits
            that nothing else reads afterwards. A second backward is refused then, by autograd.

    Collectives forward: one all-gather of 16 bytes per token and, with a target, one SUM of 16 bytes; none backward.

    Raises:
        RecipeError, LayoutError: shapes don't fit, or the divergence is unknown.
        ErpdError: NaN, +inf or nothing above -inf in a token's logits or its target's, a target that isn't normalised,
            a token id outside the vocabulary; names tensor and token.
    """
    num_tokens = logits.shape[:-1].numel()
    if logits.shape[-1] != shard.width:
        raise LayoutError(
            f"logits of shape {tuple(logits.shape)} have {logits.shape[-1]} columns, the vocabulary range "
            f"[{shard.start}, {shard.end}) has {shard.width}"
        )
    request = make_request(shard, num_tokens, tokens, logits.device, kind, target, temperature, with_entropy)
    terms = _TokenTerms.apply(logits, request, overwrite_logits)
    return TokenTerms(*(x.reshape(logits.shape[:-1]) for x in terms))


def make_request(
    shard: VocabShard,
    num_tokens: int,
    tokens: Tensor | None,
    device: torch.device,
    kind: DivergenceKind | None,
    target: Target | None,
    temperature: float,
    with_entropy: bool,
) -> Request:
    """What `token_terms` asks, checked and flat.

    Raises:
        RecipeError: shapes don't fit, a kind without a target or the reverse, a temperature of 0 or less.
    """
    if (kind is None) != (target is None):
        raise RecipeError("a divergence needs both its kind and its target")
    if kind is not None and kind not in DIVERGENCES:
        raise RecipeError(f"divergence {kind!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if not temperature > 0:
        raise RecipeError(f"temperature must be above 0, not {temperature}")
    if tokens is None:
        tokens = torch.full((num_tokens,), IGNORED_TOKEN, dtype=torch.int64, device=device)
    elif tokens.numel() != num_tokens:
        raise RecipeError(f"tokens of shape {tuple(tokens.shape)} don't fit {num_tokens} rows of logits")
    if isinstance(target, TopKTarget):
        target = flatten_topk(target)
    if target is not None:
        check_target(target, num_tokens, shard)
    return Request(shard, tokens.reshape(-1).long(), temperature, kind, target, with_entropy)


def target_chunks(request: Request, bytes_per_token: int = 0) -> Iterator[slice]:
    """Chunks of the request's tokens, `bytes_per_token` and what the target makes of a token within the budget; one
    chunk where nothing is made."""
    if request.full_target is not None:
        bytes_per_token += request.full_target.bytes_per_token
    if not bytes_per_token:
        return iter([slice(0, len(request.tokens))])
    return token_chunks(len(request.tokens), bytes_per_token)


def upstream_of(gradients: tuple[Tensor | None, ...], request: Request, dtype: torch.dtype) -> Upstream | None:
    """Incoming gradients of the three results as they are used; None where there are none."""
    on_log_probs, on_entropy, on_divergence = (None if x is None else x.to(dtype) for x in gradients)
    if not request.with_entropy:
        on_entropy = None
    if request.kind is None:
        on_divergence = None
    if on_log_probs is None and on_entropy is None and on_divergence is None:
        return None
    return Upstream(on_log_probs, on_entropy, on_divergence)


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, request: Request, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        scalars = compute(request, lambda part: rows[part], target_chunks(request))
        ctx.request, ctx.overwrite = request, overwrite
        ctx.save_for_backward(logits, *scalars)
        ctx.set_materialize_grads(False)
        return scalars.log_probs, scalars.entropy, scalars.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, *saved = ctx.saved_tensors
        scalars, request = Scalars(*saved), ctx.request
        upstream = upstream_of(gradients, request, scalars.maximum.dtype)
        if upstream is None:
            return None, None, None
        rows = logits.detach().reshape(-1, logits.shape[-1])
        out = rows if ctx.overwrite else torch.empty_like(rows)
        for part in target_chunks(request):
            gradient(request, rows[part], part, scalars, upstream, out[part])
        return out.reshape(logits.shape), None, None
