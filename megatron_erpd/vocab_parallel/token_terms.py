"""Log-prob of a token, entropy and divergence from a target: the numbers per token that every loss is made of.

`token_terms` computes them of logits that exist, `fused_token_terms` of logits that it makes from hidden states a chunk
at a time, so that no tensor `[tokens, v/tp]` ever exists. One computation serves both: passes over this rank's columns
(`passes`, `triton_passes`), and between them at most two collectives of at most four numbers per token, whatever the
vocabulary and k are:

    1. one all-gather of each rank's maxima and sums of exponentials; every rank combines them to the normalisers
       in the same order, so that all ranks hold the same bits;
    2. one SUM of what is linear once the normalisers are known. Without a target it is part of the first.

Backward is closed-form: from the logits and a handful of numbers per token (`Scalars`), without a collective. See
`passes.gradient` for the formula, `docs/method.md` for its derivation. The gradient of a rank's logits is its slice of
the dense gradient (see `shard`).

With the output layer, forward makes the logits of a chunk of tokens, takes their numbers and drops them. Backward makes
them once more, turns them into their own gradient (in place; beside them for a 16-bit layer, see `passes`), and
multiplies that into the gradients of the hidden states and the weight. That is one matrix product more than with logits
kept (four instead of three), for memory that doesn't grow with the number of tokens. It has to be so where the loss
isn't known yet (a sequence's ratio, a KL budget), and it lets the weight's gradient be added to Megatron's `main_grad`
at once.

Everything here is flat: n tokens, chunks of them as slices. -inf in logits has probability 0; a NaN, +inf or a row of
nothing but -inf is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.errors import LayoutError, RecipeError, TokenError
from megatron_erpd.objectives.divergences import DIVERGENCES, TopKTarget
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel import passes
from megatron_erpd.vocab_parallel.passes import (
    DivergenceGradient,
    RowGradient,
    Softmax,
    add_product,
    hidden_gradient,
    logits_of,
)
from megatron_erpd.vocab_parallel.shard import (
    VocabShard,
    accumulation_dtype,
    check_memory,
    combine,
    rescaled,
    token_chunks,
    weighted_sum,
)
from megatron_erpd.vocab_parallel.targets import (
    FullTarget,
    Target,
    bucket_gradient,
    bucket_terms,
    check_target,
    entry_logits,
    flatten_topk,
    topk_rows,
    unnormalized_tokens,
    why_unnormalized,
)

IGNORED_TOKEN = -100
"""A label that stands for no token, as in PyTorch's cross entropy: log-probability 0, no gradient."""

RowsOf = Callable[[slice], Tensor]
"""A chunk's logits `[c, v/tp]`, given the slice of its tokens."""

Later = Callable[[Tensor, Callable[[], TokenError]], None]
"""Gets a bool `[]` that is still on the device, whether something is wrong with a token, and what makes the error."""


# Of logits that exist


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
    later: Later | None = None,
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
        later: gets what is wrong with the values of tokens in place of an error here, for which the host would wait
            until the device knows.

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
    request = make_request(shard, num_tokens, tokens, logits.device, kind, target, temperature, with_entropy, later)
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
    later: Later | None = None,
) -> TermsRequest:
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
    return TermsRequest(shard, tokens.reshape(-1).long(), temperature, kind, target, with_entropy, later)


def target_chunks(request: TermsRequest, bytes_per_token: int = 0) -> Iterator[slice]:
    """Chunks of the request's tokens, `bytes_per_token` and what the target makes of a token within the budget; one
    chunk where nothing is made."""
    if request.full_target is not None:
        bytes_per_token += request.full_target.bytes_per_token
    if not bytes_per_token:
        return iter([slice(0, len(request.tokens))])
    return token_chunks(len(request.tokens), bytes_per_token)


def upstream_of(gradients: tuple[Tensor | None, ...], request: TermsRequest, dtype: torch.dtype) -> Upstream | None:
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
    def forward(ctx: Any, logits: Tensor, request: TermsRequest, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
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


# With the output layer


@dataclass(frozen=True)
class OutputLayer:
    """How a column-parallel output layer talks to the other ranks, and where its weight's gradient goes.

    Attributes:
        group: the tensor-parallel group; None for one process.
        sequence_parallel: the hidden states come split along their first dimension; they are gathered here, forward and
            backward, and their gradient is reduce-scattered.
        accumulate: add the weight's gradient to `weight.main_grad`, as Megatron's `gradient_accumulation_fusion`.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    accumulate: bool = False

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, hidden: Tensor) -> Tensor:
        """All rows of the hidden states, on every rank."""
        if not self.sequence_parallel or self.size == 1:
            return hidden
        whole = hidden.new_empty((self.size * hidden.shape[0], *hidden.shape[1:]))
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.group)
        return whole

    def reduce(self, partial: Tensor) -> Tensor:
        """The gradient of what `gather` was given, from each rank's part of the gradient of what it returned."""
        if self.size == 1:
            return partial
        if not self.sequence_parallel:
            dist.all_reduce(partial, group=self.group)
            return partial
        own = partial.new_empty((partial.shape[0] // self.size, *partial.shape[1:]))
        dist.reduce_scatter_tensor(own, partial, group=self.group)
        return own


def fused_token_terms(
    hidden: Tensor,
    weight: Tensor,
    shard: VocabShard,
    tokens: Tensor | None = None,
    kind: DivergenceKind | None = None,
    target: Target | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    positions: Tensor | None = None,
    layer: OutputLayer | None = None,
    later: Later | None = None,
) -> TokenTerms:
    """`token_terms` of the logits `hidden @ weight^T`, which are made a chunk of tokens at a time, in float32 whatever
    the type of hidden states and weight (float64 for float64).

    Args:
        hidden: [..., h], or [s/tp, ..., h] under sequence parallelism: the output layer's input.
        weight: [v/tp, h], this rank's shard; with tied weights the embedding's.
        positions: int64 [n], which rows of the flattened hidden states are wanted; None for all. The others cost
            nothing and get the gradient 0.
        tokens, kind, target, temperature, with_entropy, later: as `token_terms`, for the n rows in their order.
        layer: the ranks and the weight's gradient; by default `shard.group`, no sequence parallelism, no `main_grad`.

    Returns:
        As `token_terms`, each [n]. Gradients flow into `hidden` and `weight`.
        Collectives: those of `token_terms`, and the output layer's own (under sequence parallelism an all-gather of the
        hidden states forward and backward; a sum or reduce-scatter of their gradient backward). A target that has
        collectives of its own (a projection) runs them per chunk.

    Raises:
        As `token_terms`; LayoutError where a chunk doesn't fit into the memory that is left.
    """
    layer = OutputLayer(shard.group) if layer is None else layer
    if hidden.shape[-1] != weight.shape[-1] or len(weight) != shard.width:
        raise LayoutError(
            f"hidden states of shape {tuple(hidden.shape)} and an output layer of shape {tuple(weight.shape)} don't "
            f"make logits of {shard.width} columns"
        )
    rows = hidden.shape[:-1].numel() * (layer.size if layer.sequence_parallel else 1)
    num_tokens = rows if positions is None else len(positions)
    request = make_request(shard, num_tokens, tokens, hidden.device, kind, target, temperature, with_entropy, later)
    check_memory(hidden.device, num_tokens, _bytes_per_token(weight))
    return TokenTerms(*_FusedTerms.apply(hidden, weight, request, positions, layer))


class _FusedTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, request: TermsRequest, positions: Tensor | None, layer: OutputLayer
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = layer.gather(hidden).reshape(-1, hidden.shape[-1])
        chunk_size = _bytes_per_token(weight)
        scalars = compute(
            request, lambda part: logits_of(_rows(rows, positions, part), weight), target_chunks(request, chunk_size)
        )
        _LayerGradients.save(ctx, weight, positions, layer)
        ctx.request = request
        ctx.save_for_backward(hidden, *scalars)
        ctx.set_materialize_grads(False)
        return scalars.log_probs, scalars.entropy, scalars.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, *saved = ctx.saved_tensors
        scalars, request, weight = Scalars(*saved), ctx.request, ctx.weight
        upstream = upstream_of(gradients, request, scalars.maximum.dtype)
        if upstream is None:
            return None, None, None, None, None
        sums = _LayerGradients(ctx, hidden)
        for part in target_chunks(request, _bytes_per_token(weight)):
            chunk = sums.rows_of(part)
            logits = logits_of(chunk, weight)
            # float32 logits of a 16-bit layer: the gradient is rounded as it is written, for the products.
            on_logits = logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)
            gradient(request, logits, part, scalars, upstream, out=on_logits)
            del logits
            sums.add(part, chunk, on_logits)
            del on_logits
        return *sums.results(), None, None, None


def output_logits(hidden: Tensor, weight: Tensor, positions: Tensor, layer: OutputLayer) -> Tensor:
    """Logits `[n, v/tp]` that exist whole, in float32 (float64 for float64).

    Gradients flow into `hidden` and `weight`. Args and collectives: as `fused_token_terms`.
    """
    return _OutputLogits.apply(hidden, weight, positions, layer)


class _OutputLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, layer: OutputLayer) -> Tensor:
        _LayerGradients.save(ctx, weight, positions, layer)
        ctx.save_for_backward(hidden)
        return logits_of(layer.gather(hidden).reshape(-1, hidden.shape[-1])[positions], weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_logits: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        sums = _LayerGradients(ctx, *ctx.saved_tensors)
        part = slice(0, len(on_logits))
        sums.add(part, sums.rows_of(part), on_logits.to(ctx.weight.dtype))
        return *sums.results(), None, None


class _LayerGradients:
    """The gradients of an output layer's hidden states and weight, summed over chunks of tokens."""

    @staticmethod
    def save(ctx: Any, weight: Tensor, positions: Tensor | None, layer: OutputLayer) -> None:
        """In forward. The weight itself, not a saved copy of the reference: `main_grad` is an attribute of it."""
        ctx.weight, ctx.positions, ctx.layer = weight, positions, layer
        ctx.main_grad = weight.main_grad if layer.accumulate and hasattr(weight, "main_grad") else None

    def __init__(self, ctx: Any, hidden: Tensor) -> None:
        self.ctx = ctx
        rows = ctx.layer.gather(hidden)
        self.shape, self.rows = rows.shape, rows.reshape(-1, hidden.shape[-1])
        self.on_hidden = torch.zeros_like(self.rows) if ctx.needs_input_grad[0] else None
        self.on_weight = _weight_gradient(ctx.weight, ctx.main_grad) if ctx.needs_input_grad[1] else None

    def rows_of(self, part: slice) -> Tensor:
        """A chunk's hidden states `[c, h]`."""
        return _rows(self.rows, self.ctx.positions, part)

    def add(self, part: slice, chunk: Tensor, on_logits: Tensor) -> None:
        """What a chunk's hidden states and the gradient of its logits `[c, v/tp]`, in the weight's type, give."""
        if self.on_hidden is not None:
            where = part if self.ctx.positions is None else self.ctx.positions[part]
            self.on_hidden[where] = hidden_gradient(on_logits, self.ctx.weight)
        if self.on_weight is not None:
            add_product(self.on_weight, on_logits, chunk)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """What autograd gets; the output layer's collective for the hidden states' gradient."""
        on_hidden, on_weight, weight = self.on_hidden, self.on_weight, self.ctx.weight
        if on_hidden is not None:
            on_hidden = self.ctx.layer.reduce(on_hidden.reshape(self.shape))
        if on_weight is not None and self.ctx.main_grad is not None:
            on_weight = _after_main_grad(weight)
        elif on_weight is not None:
            on_weight = on_weight.to(weight.dtype)
        return on_hidden, on_weight


def _weight_gradient(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """What the chunks add to: `main_grad`, or a float32 sum of their own (float64 for float64)."""
    if main_grad is not None:
        return main_grad
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _after_main_grad(weight: Tensor) -> Tensor | None:
    """What autograd gets once the gradient is in `main_grad`: Megatron's hooks want a tensor, whose values they ignore
    unless the parameter asks for zeros."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)


def _rows(rows: Tensor, positions: Tensor | None, part: slice) -> Tensor:
    return rows[part] if positions is None else rows[positions[part]]


def _bytes_per_token(weight: Tensor) -> int:
    """Of a chunk: logits, and in backward their gradient beside them where it has another type. The same in both
    directions, so that the chunks are."""
    dtype = accumulation_dtype(weight)
    return len(weight) * (dtype.itemsize + (weight.dtype.itemsize if weight.dtype != dtype else 0))


# The computation of both


@dataclass(frozen=True)
class TermsRequest:
    """What is asked of n tokens.

    Attributes:
        shard: this rank's columns.
        tokens: int64 [n], global ids or `IGNORED_TOKEN`.
        temperature: divides the policy's logits.
        kind, target: the divergence; both or neither.
        with_entropy: whether the entropy is asked for; 0 otherwise.
        later: gets what is wrong; None for an error at once.
    """

    shard: VocabShard
    tokens: Tensor
    temperature: float = 1.0
    kind: DivergenceKind | None = None
    target: FullTarget | TopKTarget | None = None
    with_entropy: bool = True
    later: Later | None = None

    @property
    def scale(self) -> float:
        return 1.0 / self.temperature

    @property
    def full_target(self) -> FullTarget | None:
        return None if isinstance(self.target, TopKTarget) else self.target

    @property
    def topk_target(self) -> TopKTarget | None:
        return self.target if isinstance(self.target, TopKTarget) else None


class Scalars(NamedTuple):
    """Numbers per token, each [n], the same on every rank; backward needs no others.

    `maximum` and `remainder` are the policy's log sum exp in two parts; `other_maximum` and `other_remainder` those of
    the target or, for a top-k target, of the policy outside of its entries. `number` is what the divergence's gradient
    subtracts: the divergence for `reverse_kl`, its policy half for `js`.
    """

    log_probs: Tensor
    entropy: Tensor
    divergence: Tensor
    maximum: Tensor
    remainder: Tensor
    other_maximum: Tensor
    other_remainder: Tensor
    number: Tensor


class Upstream(NamedTuple):
    """Gradients of the loss with respect to log-probs, entropy and divergence, each [n] or None for zero."""

    log_probs: Tensor | None
    entropy: Tensor | None
    divergence: Tensor | None


def compute(request: TermsRequest, logits_of: RowsOf, parts: Iterable[slice]) -> Scalars:
    """Forward over the chunks `parts`, which cover the tokens in order. See the module for the collectives."""
    # With one rank a chunk is finished while it is at hand; else all chunks share the collectives.
    groups = [[part] for part in parts] if request.shard.size == 1 else [list(parts)]
    finished = [_compute_group(request, logits_of, group) for group in groups]
    scalars = Scalars(*(torch.cat(columns) for columns in zip(*finished, strict=True)))
    _check(request, scalars, logits_of, groups)
    return scalars


def gradient(
    request: TermsRequest, logits: Tensor, part: slice, scalars: Scalars, upstream: Upstream, out: Tensor
) -> None:
    """Writes the gradient with respect to a chunk's logits `[c, v/tp]` into `out`, which may be `logits` itself."""
    shard, scale = request.shard, request.scale
    s = Scalars(*(x[part] for x in scalars))
    columns, out_columns = logits[:, : shard.valid_columns], out[:, : shard.valid_columns]
    rows = _token_gradient(request, s, upstream, part)
    normalizer, other = (s.maximum, s.remainder), (s.other_maximum, s.other_remainder)
    entries, divergence, full = None, None, request.full_target
    if upstream.divergence is not None and request.kind is not None:
        weight = upstream.divergence[part]
        if request.topk_target is not None:
            top = topk_rows(request.topk_target, part)
            log_p = entry_logits(shard, columns, top.indices, scale)
            log_p = (log_p - s.maximum.unsqueeze(-1)) - s.remainder.unsqueeze(-1)
            tail = (s.other_maximum - s.maximum) + s.other_remainder - s.remainder
            tail = tail.masked_fill(tail == torch.inf, -torch.inf)  # no tail, see `_finish`
            entries = bucket_gradient(shard, request.kind, top, log_p, s.number, tail, rows, weight)
            normalizer, rows = other, rows._replace(constant=entries.constant, slope=entries.slope)
        else:
            assert full is not None
            number = torch.ones_like(weight) if request.kind == "forward_kl" else -s.number
            # A token that the loss leaves out may have an infinite divergence; 0 * inf must not reach the weights.
            rows = rows._replace(constant=rows.constant + torch.where(weight == 0, 0.0, weight * number))
            target = Softmax(full.rows(part)[:, : shard.valid_columns], 1.0 / full.temperature, other)
            divergence = DivergenceGradient(request.kind, weight * scale, target)
    slope = None if rows.slope is None else rows.slope * scale
    rows = RowGradient(rows.constant * scale, slope, rows.tokens, rows.on_token * scale)
    passes_for(logits.device).gradient(out_columns, Softmax(columns, scale, normalizer), rows, divergence)
    if entries is not None:
        entries.write(out_columns, scale)
    out[:, shard.valid_columns :] = 0.0


def _token_gradient(request: TermsRequest, s: Scalars, upstream: Upstream, part: slice) -> RowGradient:
    """Of log-prob and entropy."""
    tokens = request.tokens[part]
    if upstream.log_probs is None:
        on_token = torch.zeros_like(s.maximum)
    else:
        on_token = torch.where(tokens == IGNORED_TOKEN, 0.0, upstream.log_probs[part])
    column = torch.where(tokens >= 0, tokens - request.shard.start, -1)
    if upstream.entropy is None or not request.with_entropy:
        return RowGradient(-on_token, None, column, on_token)
    slope = -upstream.entropy[part]
    return RowGradient(slope * s.entropy - on_token, slope, column, on_token)


def _compute_group(request: TermsRequest, logits_of: RowsOf, group: list[slice]) -> Scalars:
    """Forward over chunks that share their collectives."""
    shard, full, topk = request.shard, request.full_target, request.topk_target
    scans = []
    for part in group:
        columns = logits_of(part)[:, : shard.valid_columns]
        target_columns = None if full is None else full.rows(part)[:, : shard.valid_columns]
        scans.append(_scan(request, columns, target_columns, part))
    # A single chunk's logits are still here for the second look that `js` needs.
    kept = (columns, target_columns) if len(group) == 1 else None
    statistics, token_logits, entries = (torch.cat(x) for x in zip(*scans, strict=True))
    whole = slice(group[0].start, group[-1].stop)
    if topk is not None:
        assert request.kind is not None
        found = bucket_terms(shard, request.kind, topk_rows(topk, whole), entries, statistics, token_logits)
        return _finish(request, whole, *found)
    m, s, u, n, t, cross = statistics.unbind(dim=-1)
    zero = torch.zeros_like(m)
    if full is None:
        gathered = shard.all_gather_partials(torch.stack([m, s, u, token_logits], dim=-1))
        maximum, total = combine(gathered[..., 0], gathered[..., 1])
        weighted = weighted_sum(gathered[..., 0], gathered[..., 1], gathered[..., 2], maximum)
        terms = gathered[..., 3].sum(dim=0), weighted, zero, zero
        return _finish(request, whole, (maximum, total), (zero, torch.ones_like(zero)), terms)
    gathered = shard.all_gather_partials(torch.stack([m, s, n, t], dim=-1))
    policy, target = combine(gathered[..., 0], gathered[..., 1]), combine(gathered[..., 2], gathered[..., 3])
    lead, target_lead = m - policy[0], n - target[0]
    first = second = zero
    if request.kind == "forward_kl":
        first = rescaled(target_lead, cross + t * (target_lead - lead))
    elif request.kind == "reverse_kl":
        first = rescaled(lead, cross + s * (lead - target_lead))
    else:
        first, second = _js_halves(request, logits_of, group, kept, policy, target).unbind(dim=-1)
    packed = torch.stack([token_logits, rescaled(lead, u + lead * s), first, second], dim=-1)
    return _finish(request, whole, policy, target, shard.all_reduce_sum(packed).unbind(dim=-1))


def _scan(request: TermsRequest, columns: Tensor, target_columns: Tensor | None, part: slice) -> tuple[Tensor, ...]:
    """Of a chunk: this rank's statistics, its tokens' scaled logits (0 where a token is another rank's) and the scaled
    logits at the target's entries (none without a top-k target)."""
    shard, full, topk, excluded = request.shard, request.full_target, request.topk_target, None
    entries = columns.new_zeros((len(columns), 0), dtype=accumulation_dtype(columns))
    if topk is not None:
        owned, local = shard.locate(topk.indices[part])
        excluded = torch.where(owned, local, -1)
        entries = entry_logits(shard, columns, topk.indices[part], request.scale)
    target = None if full is None or target_columns is None else Softmax(target_columns, 1.0 / full.temperature)
    kind = None if full is None else request.kind
    policy = Softmax(columns, request.scale)
    statistics = passes_for(columns.device).statistics(policy, target, kind, excluded, request.with_entropy)
    token_logits = shard.select(columns, request.tokens[part].unsqueeze(-1)).squeeze(-1)
    return statistics, token_logits.to(statistics.dtype) * request.scale, entries


def _js_halves(
    request: TermsRequest,
    logits_of: RowsOf,
    group: list[slice],
    kept: tuple[Tensor, Tensor | None] | None,
    policy: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
) -> Tensor:
    """This rank's part of both halves of the Jensen-Shannon divergence, `[n, 2]`: a second look at all chunks."""
    shard, full = request.shard, request.full_target
    assert full is not None
    halves = []
    for part in group:
        if kept is None:
            columns, target_columns = (rows(part)[:, : shard.valid_columns] for rows in (logits_of, full.rows))
        else:
            columns, other = kept
            assert other is not None
            target_columns = other
        here = slice(part.start - group[0].start, part.stop - group[0].start)
        own, theirs = ((maximum[here], total[here].log()) for maximum, total in (policy, target))
        pair = Softmax(columns, request.scale, own), Softmax(target_columns, 1.0 / full.temperature, theirs)
        halves.append(passes_for(columns.device).js_terms(*pair))
    return torch.cat(halves)


def _finish(
    request: TermsRequest,
    part: slice,
    policy: Sequence[Tensor],
    other: Sequence[Tensor],
    sums: Sequence[Tensor],
) -> Scalars:
    """The results, from normalisers (maximum and total; `other` as in `Scalars`) and the summed token logit, entropy
    sum and two terms."""
    (maximum, total), (other_maximum, other_total) = policy, other
    remainder, other_remainder = total.log(), other_total.log()
    token_logit, weighted, first, second = sums
    log_probs = (token_logit - maximum) - remainder
    log_probs = torch.where(request.tokens[part] == IGNORED_TOKEN, 0.0, log_probs)
    entropy = remainder - weighted / total if request.with_entropy else torch.zeros_like(total)
    divergence = first + second
    if request.full_target is not None and request.kind == "forward_kl":
        divergence = first / other_total - other_remainder + remainder
    elif request.full_target is not None and request.kind == "reverse_kl":
        divergence = first / total - remainder + other_remainder
    number = first if request.kind == "js" else divergence
    if request.topk_target is not None:
        # Where no column is left outside of the entries none may get a share of a gradient: exp(z - inf) = 0.
        other_remainder = other_remainder.masked_fill(other_remainder == -torch.inf, torch.inf)
    return Scalars(log_probs, entropy, divergence, maximum, remainder, other_maximum, other_remainder, number)


def _check(request: TermsRequest, scalars: Scalars, logits_of: RowsOf, groups: list[list[slice]]) -> None:
    """Raises `TokenError` that names the tensor and the token, or leaves it for later. All ranks hold the same numbers
    and raise together."""
    tokens, size = request.tokens, request.shard.vocab_size
    problems = {
        "the policy's logits": ~(scalars.remainder.isfinite() & scalars.maximum.isfinite()),
        "tokens": (tokens != IGNORED_TOKEN) & ((tokens < 0) | (tokens >= size)),
    }
    if request.topk_target is not None:
        problems["the target"] = unnormalized_tokens(request.topk_target)
    else:
        problems["the target's logits"] = ~(scalars.other_remainder.isfinite() & scalars.other_maximum.isfinite())
    names, wrong = list(problems), torch.stack(list(problems.values()))
    if request.later is not None:
        # Nothing larger than a flag per token may be kept for it.
        request.later(wrong.any(), lambda: _token_error(*_first_wrong(names, wrong), size))
    elif wrong.any():  # one look from the host for all of them
        name, positions = _first_wrong(names, wrong)
        raise _token_error(name, positions, size, _found(request, name, positions[0], logits_of, groups))


def _first_wrong(names: list[str], wrong: Tensor) -> tuple[str, list[int]]:
    """The first tensor with wrong tokens, and these; `wrong` is bool `[tensors, n]`."""
    return next((name, bad.nonzero().flatten().tolist()) for name, bad in zip(names, wrong, strict=True) if bad.any())


def _token_error(name: str, positions: list[int], vocab_size: int, found: str = "") -> TokenError:
    position = positions[0]
    if name == "tokens":
        said = f"tokens[{position}] is {found or 'no id'}; the vocabulary has ids 0 to {vocab_size - 1}"
    elif name == "the target":
        said = f"the target of token {position} {found or 'is no distribution over the vocabulary'}"
    else:
        said = (
            f"{name} of token {position} hold NaN or +inf, or nothing above -inf{found}; the weights or the "
            "activations before them have overflowed"
        )
    return TokenError(said, positions)


def _found(request: TermsRequest, name: str, position: int, logits_of: RowsOf, groups: list[list[slice]]) -> str:
    """What is wrong with a token, from the tensor itself."""
    if name == "tokens":
        return str(int(request.tokens[position]))
    if name == "the target":
        assert request.topk_target is not None
        return why_unnormalized(request.topk_target, position)
    part = next(part for group in groups for part in group if part.start <= position < part.stop)
    rows_of = logits_of if name == "the policy's logits" or request.full_target is None else request.full_target.rows
    row = rows_of(part)[position - part.start, : request.shard.valid_columns]
    wrong = (row.isnan() | (row == torch.inf)).nonzero().flatten()
    found = f"{float(row[wrong[0]])} at id {int(wrong[0]) + request.shard.start}" if len(wrong) else "none of these"
    return f" (this rank's columns: {found})"


# Which implementation of the passes

Kernels = Literal["auto", "torch", "triton"]

ENVIRONMENT = "ERPD_KERNELS"
"""Decides where no stage's `--kernels` does: torch or triton."""
_chosen: Kernels = "auto"


def set_kernels(kernels: Kernels) -> None:
    """Chooses for this process; `auto` leaves it to the environment, and without that to the device.

    Raises:
        RecipeError: no such kernels.
    """
    global _chosen
    _chosen = _known(kernels, "kernels")


def kernels_for(device: torch.device) -> Literal["torch", "triton"]:
    """What tensors on `device` are computed with: by default Triton on CUDA devices, PyTorch on CPUs. Under Triton's
    interpreter (`TRITON_INTERPRET=1`) its kernels run on a CPU too."""
    choice = _known(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT) if _chosen == "auto" else _chosen
    if choice == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return choice


def passes_for(device: torch.device) -> ModuleType:
    """The module whose `statistics`, `js_terms` and `gradient` are used on `device`."""
    if kernels_for(device) == "torch":
        return passes
    from megatron_erpd.vocab_parallel import triton_passes  # importing Triton takes a while

    return triton_passes


def _known(value: str, source: str) -> Kernels:
    if value not in get_args(Kernels):
        raise RecipeError(f"{source} {value!r} is unknown; choose one of {', '.join(get_args(Kernels))}")
    return value  # type: ignore[return-value]
