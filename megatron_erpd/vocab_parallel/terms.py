"""Log-prob of a token, entropy and divergence from a target: the numbers per token that every loss is made of.

One computation serves logits that exist and logits that are made from hidden states a chunk at a time (`fused`):
passes over this rank's columns (`passes`, `triton_passes`), and between them at most two collectives of at most four
numbers per token, whatever the vocabulary and k are:

    1. one all-gather of each rank's maxima and sums of exponentials; every rank combines them to the normalisers
       in the same order, so that all ranks hold the same bits;
    2. one SUM of what is linear once the normalisers are known. Without a target it is part of the first.

Backward is closed-form: from the logits and a handful of numbers per token (`Scalars`), without a collective. See
`passes.gradient` for the formula, `docs/method.md` for its derivation.

Everything here is flat: n tokens, chunks of them as slices. -inf in logits has probability 0; a NaN, +inf or a row of
nothing but -inf is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_erpd.errors import TokenError
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.buckets import RowGradient, bucket_gradient, bucket_terms, entry_logits
from megatron_erpd.vocab_parallel.kernels import passes_for
from megatron_erpd.vocab_parallel.shard import VocabShard, accumulation_dtype, combine, rescaled, weighted_sum
from megatron_erpd.vocab_parallel.targets import (
    FullTarget,
    TopKTarget,
    topk_rows,
    unnormalized_tokens,
    why_unnormalized,
)

IGNORED_TOKEN = -100
"""A label that stands for no token, as in PyTorch's cross entropy: log-probability 0, no gradient."""

RowsOf = Callable[[slice], Tensor]
"""A chunk's logits `[c, v/tp]`, given the slice of its tokens."""


@dataclass(frozen=True)
class Request:
    """What is asked of n tokens.

    Attributes:
        shard: this rank's columns.
        tokens: int64 [n], global ids or `IGNORED_TOKEN`.
        temperature: divides the policy's logits.
        kind, target: the divergence; both or neither.
        with_entropy: whether the entropy is asked for; 0 otherwise.
    """

    shard: VocabShard
    tokens: Tensor
    temperature: float = 1.0
    kind: DivergenceKind | None = None
    target: FullTarget | TopKTarget | None = None
    with_entropy: bool = True

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


def compute(request: Request, logits_of: RowsOf, parts: Iterable[slice]) -> Scalars:
    """Forward over the chunks `parts`, which cover the tokens in order. See the module for the collectives."""
    # With one rank a chunk is finished while it is at hand; else all chunks share the collectives.
    groups = [[part] for part in parts] if request.shard.size == 1 else [list(parts)]
    finished = [_compute_group(request, logits_of, group) for group in groups]
    scalars = Scalars(*(torch.cat(columns) for columns in zip(*finished, strict=True)))
    _check(request, scalars, logits_of, groups)
    return scalars


def gradient(request: Request, logits: Tensor, part: slice, scalars: Scalars, upstream: Upstream, out: Tensor) -> None:
    """Writes the gradient with respect to a chunk's logits `[c, v/tp]` into `out`, which may be `logits` itself."""
    shard, scale, tokens = request.shard, request.scale, request.tokens[part]
    s = Scalars(*(x[part] for x in scalars))
    columns, out_columns = logits[:, : shard.valid_columns], out[:, : shard.valid_columns]
    constant, slope, on_token = _token_gradient(request, s, upstream, part)
    weight = None if upstream.divergence is None or request.kind is None else upstream.divergence[part]
    normalizer, other = (s.maximum, s.remainder), (s.other_maximum, s.other_remainder)
    entries, full = None, request.full_target
    of_target: dict[str, Any] = {}
    if weight is not None and request.kind is not None and request.topk_target is not None:
        row = topk_rows(request.topk_target, part)
        log_p = entry_logits(shard, columns, row.indices, scale)
        log_p = (log_p - s.maximum.unsqueeze(-1)) - s.remainder.unsqueeze(-1)
        tail = (s.other_maximum - s.maximum) + s.other_remainder - s.remainder
        tail = tail.masked_fill(tail == torch.inf, -torch.inf)  # no tail, see `_finish`
        contributions = RowGradient(constant, slope, on_token, weight)
        entries = bucket_gradient(shard, request.kind, row, log_p, tokens, s.number, tail, contributions)
        normalizer, constant, slope = other, entries.constant, entries.slope
    elif weight is not None and full is not None:
        number = torch.ones_like(constant) if request.kind == "forward_kl" else -s.number
        # A token that the loss leaves out may have an infinite divergence; 0 * inf must not reach the weights.
        constant = constant + torch.where(weight == 0, 0.0, weight * number)
        of_target = {
            "kind": request.kind,
            "weight": weight * scale,
            "target": full.rows(part)[:, : shard.valid_columns],
            "target_scale": 1.0 / full.temperature,
            "target_normalizer": other,
        }
    passes_for(logits.device).gradient(
        out_columns,
        columns,
        scale,
        normalizer,
        constant * scale,
        None if slope is None else slope * scale,
        tokens=torch.where(tokens >= 0, tokens - shard.start, -1),
        on_token=on_token * scale,
        **of_target,
    )
    if entries is not None:
        entries.write(out_columns, scale)
    out[:, shard.valid_columns :] = 0.0


def _token_gradient(
    request: Request, s: Scalars, upstream: Upstream, part: slice
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of log-prob and entropy: the factors of p_v and p_v log p_v, and what the token's own column gets besides."""
    if upstream.log_probs is None:
        on_token = torch.zeros_like(s.maximum)
    else:
        on_token = torch.where(request.tokens[part] == IGNORED_TOKEN, 0.0, upstream.log_probs[part])
    if upstream.entropy is None or not request.with_entropy:
        return -on_token, None, on_token
    slope = -upstream.entropy[part]
    return slope * s.entropy - on_token, slope, on_token


def _compute_group(request: Request, logits_of: RowsOf, group: list[slice]) -> Scalars:
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


def _scan(request: Request, columns: Tensor, target_columns: Tensor | None, part: slice) -> tuple[Tensor, ...]:
    """Of a chunk: this rank's statistics, its tokens' scaled logits (0 where a token is another rank's) and the scaled
    logits at the target's entries (none without a top-k target)."""
    shard, full, topk, excluded = request.shard, request.full_target, request.topk_target, None
    entries = columns.new_zeros((len(columns), 0), dtype=accumulation_dtype(columns))
    if topk is not None:
        owned, local = shard.locate(topk.indices[part])
        excluded = torch.where(owned, local, -1)
        entries = entry_logits(shard, columns, topk.indices[part], request.scale)
    statistics = passes_for(columns.device).statistics(
        columns,
        request.scale,
        target=target_columns,
        target_scale=1.0 if full is None else 1.0 / full.temperature,
        kind=None if full is None else request.kind,
        excluded=excluded,
        with_entropy=request.with_entropy,
    )
    token_logits = shard.select(columns, request.tokens[part].unsqueeze(-1)).squeeze(-1)
    return statistics, token_logits.to(statistics.dtype) * request.scale, entries


def _js_halves(
    request: Request,
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
        passes = passes_for(columns.device)
        halves.append(passes.js_terms(columns, request.scale, own, target_columns, 1.0 / full.temperature, theirs))
    return torch.cat(halves)


def _finish(
    request: Request,
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


def _check(request: Request, scalars: Scalars, logits_of: RowsOf, groups: list[list[slice]]) -> None:
    """Raises `TokenError` that names the tensor and the token. All ranks hold the same numbers and raise together."""
    tokens, size = request.tokens, request.shard.vocab_size
    problems = {
        "the policy's logits": ~(scalars.remainder.isfinite() & scalars.maximum.isfinite()),
        "tokens": (tokens != IGNORED_TOKEN) & ((tokens < 0) | (tokens >= size)),
    }
    if request.topk_target is not None:
        problems["the target"] = unnormalized_tokens(request.topk_target)
    else:
        problems["the target's logits"] = ~(scalars.other_remainder.isfinite() & scalars.other_maximum.isfinite())
    if not torch.stack(list(problems.values())).any():  # one look from the host for all of them
        return
    name = next(name for name, bad in problems.items() if bad.any())
    positions: list[int] = problems[name].nonzero().flatten().tolist()
    position = positions[0]
    if name == "tokens":
        raise TokenError(
            f"tokens[{position}] is {int(tokens[position])}; the vocabulary has ids 0 to {size - 1}", positions
        )
    if name == "the target":
        assert request.topk_target is not None
        why = why_unnormalized(request.topk_target, position)
        raise TokenError(f"the target of token {position} {why}", positions)
    part = next(part for group in groups for part in group if part.start <= position < part.stop)
    rows_of = logits_of if name == "the policy's logits" or request.full_target is None else request.full_target.rows
    row = rows_of(part)[position - part.start, : request.shard.valid_columns]
    wrong = (row.isnan() | (row == torch.inf)).nonzero().flatten()
    found = f"{float(row[wrong[0]])} at id {int(wrong[0]) + request.shard.start}" if len(wrong) else "none of these"
    raise TokenError(
        f"{name} of token {position} hold NaN or +inf, or nothing above -inf (this rank's columns: {found}); the "
        "weights or the activations before them have overflowed",
        positions,
    )
