"""The output layer's matrix products, and the passes over a rank's logits in plain PyTorch: for CPUs, and what the
Triton kernels are checked against.

Three passes are all that log-probs, entropy and every divergence need: `statistics` before the ranks talk to each
other, `js_terms` between their two collectives (Jensen-Shannon alone needs the normalisers first), and `gradient`.
`triton_passes` has the same functions; `token_terms.passes_for` chooses between them.

Rows are tokens, columns this rank's valid part of the vocabulary. Everything is computed in float32 (float64 for
float64 logits), a block of rows at a time, so that temporaries stay in a CPU's cache or within a fixed budget of a
GPU's memory.

z below stands for logits * scale of the policy, y for those of the target, which is computed in the policy's type.

Products: the operands have the type of the weight, float32 or 16 bits. Every product is summed in float32, and logits
are returned in it: rounded to bf16 a logit of 20 is off by up to 0.06, as much as many a log-ratio or KL. Their
gradient is computed in float32 and rounded once, to the weight's type, for the two products of the backward, as
Megatron's own output layer has it.

On CUDA the products of 16-bit operands are the GPU's own. On a CPU operands are widened to float32, which is exact, a
block of weight rows at a time: where a CPU has no 16-bit arithmetic, PyTorch's substitute for it takes several times as
long. With float32 operands all of these are PyTorch's plain products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.objectives.per_token import cpu_sees
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel.shard import accumulation_dtype, local_blocks

NUM_STATISTICS = 6
"""m, s, u of the policy, n, t of the target, and their cross term."""

CPU_BLOCK_BYTES = 2**20
"""One temporary of a block on a CPU: a few of them stay in the cache of a core."""
CPU_GRADIENT_BLOCK_BYTES = 2**21
"""The same where a gradient is written: fewer temporaries, and no sums over columns."""
GPU_BLOCK_BYTES = 128 * 2**20


class Softmax(NamedTuple):
    """A distribution per row, softmax(logits * scale) over all ranks' columns.

    Attributes:
        logits: [n, v] of any floating type, this rank's columns; -inf allowed, v may be 0.
        scale: 1 / temperature.
        normalizer: log sum exp over the whole vocabulary in two parts, maximum and remainder, [n] each; None where it
            isn't known yet.
    """

    logits: Tensor
    scale: float = 1.0
    normalizer: tuple[Tensor, Tensor] | None = None

    def log_probs(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Of a block, a new tensor. The two parts of the normaliser are subtracted one after the other:
        `(z - maximum) - remainder` is exact to the last bits for large logits, `z - logsumexp` is not."""
        assert self.normalizer is not None
        maximum, remainder = self.normalizer
        values = self.scaled(rows, dtype) - maximum[rows].unsqueeze(-1)
        return values.sub_(remainder[rows].unsqueeze(-1))

    def probs(self, rows: slice, factor: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two tensors whose product is the probabilities of a block times a factor per row `[n]`: the first, in `out`
        or new, is made in as few passes as a CPU can; the second is [c, 1]."""
        assert self.normalizer is not None
        maximum, remainder = self.normalizer
        shifted = torch.sub(self.scaled(rows, maximum.dtype), maximum[rows].unsqueeze(-1), out=out)
        return shifted.exp_(), (remainder[rows].neg().exp_() * factor[rows]).unsqueeze(-1)

    def scaled(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """logits * scale of a block; a view where neither type nor scale asks for a copy."""
        values = self.logits[rows].to(dtype)
        return values if self.scale == 1.0 else values * self.scale


class RowGradient(NamedTuple):
    """What log-prob and entropy give a row's columns; [n] each.

    Attributes:
        constant, slope: factors of p_v and of p_v log p_v; no slope is 0.
        tokens: int64, the column of the row's token; outside [0, v) where it is another rank's.
        on_token: added at that column.
    """

    constant: Tensor
    slope: Tensor | None
    tokens: Tensor
    on_token: Tensor


class DivergenceGradient(NamedTuple):
    """What a divergence gives a row's columns: `weight [n]` times its derivative."""

    kind: DivergenceKind
    weight: Tensor
    target: Softmax


def statistics(
    policy: Softmax,
    target: Softmax | None = None,
    kind: DivergenceKind | None = None,
    excluded: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor:
    """What a rank knows of its columns, in one read of the logits (and of the target's).

    Args:
        policy, target: normalisers aren't read. Without a target its statistics don't matter.
        kind: of the cross term; for `js` it is 0 (see `js_terms`).
        excluded: int64 [n, K], columns of the policy that are left out; a column outside [0, v) means none.
        with_entropy: whether u is computed; 0 otherwise.

    Returns:
        [n, NUM_STATISTICS], with m = max z and n = max y (the lowest finite number where there is no column or none
        above -inf):
        m, s = sum exp(z - m), u = sum exp(z - m) (z - m),
        n, t = sum exp(y - n), and the cross term, for `forward_kl` sum exp(y - n) ((y - n) - (z - m)),
        for `reverse_kl` sum exp(z - m) ((z - m) - (y - n)). Terms whose weight is 0 are 0.
    """
    logits = policy.logits
    result = logits.new_zeros((len(logits), NUM_STATISTICS), dtype=accumulation_dtype(logits))
    lowest = torch.finfo(result.dtype).min
    if logits.shape[-1] == 0:
        result[:, 0] = result[:, 3] = lowest
        return result
    for rows in _blocks(logits):
        block = result[rows]
        z = policy.scaled(rows, result.dtype)
        if excluded is not None:
            z = _without(z, excluded[rows])
        z, weights = _shifted(z, block[:, 0]), None
        if target is not None:
            y = _shifted(target.scaled(rows, result.dtype), block[:, 3])
            mass = y.exp()
            block[:, 4] = mass.sum(dim=-1)
            if kind == "forward_kl":
                block[:, 5] = _weighted_sum(y.sub_(z), mass)
            elif kind == "reverse_kl":
                weights = z.exp()
                block[:, 5] = _weighted_sum(torch.sub(z, y, out=y), weights)
        if weights is None:
            weights = z.exp() if with_entropy else z.exp_()
        block[:, 1] = weights.sum(dim=-1)
        if with_entropy:
            block[:, 2] = weights.mul_(z.clamp_min_(lowest)).sum(dim=-1)
    return result


def js_terms(policy: Softmax, target: Softmax) -> Tensor:
    """This rank's part of 1/2 sum p log(p/m) and 1/2 sum q log(q/m), with m = (p + q) / 2; [n, 2]."""
    logits = policy.logits
    result = logits.new_zeros((len(logits), 2), dtype=accumulation_dtype(logits))
    if logits.shape[-1] == 0:
        return result
    for rows in _blocks(logits):
        log_p = policy.log_probs(rows, result.dtype)
        difference = target.log_probs(rows, result.dtype)
        excludes = _excludes(log_p) or _excludes(difference)
        mass = difference.exp()
        difference.sub_(log_p)
        probs = log_p.exp_()
        policy_part, target_part = _log_ratios_to_mixture(difference)
        result[rows, 0] = _weighted_(policy_part, probs, excludes).sum(dim=-1).mul_(0.5)
        result[rows, 1] = _weighted_(target_part, mass, excludes).sum(dim=-1).mul_(0.5)
    return result


def gradient(
    out: Tensor, policy: Softmax, contributions: RowGradient, divergence: DivergenceGradient | None = None
) -> None:
    """Writes a gradient with respect to the logits, in one read of each and one write.

    With p and q the probabilities of policy and target, and a, b, w, o the `constant`, `slope`, `weight` and `on_token`
    of a row, already multiplied by the policy's scale, column v of `out` becomes

        p_v (a + b log p_v) + o [v is the row's token] + w times

        forward_kl  -q_v        reverse_kl  p_v log(p_v / q_v)        js  p_v 1/2 log(p_v / m_v)

    and exactly 0 where p_v (and q_v) is. Rows in which a, b, w and o are all 0 become exactly 0.

    Args:
        out: [n, v], may be the policy's logits themselves.
    """
    logits = policy.logits
    if logits.shape[-1] == 0:
        return
    assert policy.normalizer is not None
    constant, slope, tokens, on_token = contributions
    dtype, kind = policy.normalizer[0].dtype, None if divergence is None else divergence.kind
    for rows in _blocks(logits, CPU_GRADIENT_BLOCK_BYTES):
        used = (constant[rows] != 0) | (on_token[rows] != 0)
        if divergence is not None:
            used |= divergence.weight[rows] != 0
        if slope is not None:
            used |= slope[rows] != 0
        if slope is None and divergence is None:
            block = policy.log_probs(rows, dtype).exp_().mul_(constant[rows].unsqueeze(-1))
        elif slope is None and kind == "forward_kl":
            own = out[rows] if out.dtype == dtype and policy.scale == 1.0 else None
            probs, factor = policy.probs(rows, constant, own)
            block = probs.mul_(factor)
        else:
            block = _gradient_of_log_ratios(rows, policy, contributions, divergence)
        if divergence is not None and kind == "forward_kl":
            block.addcmul_(*divergence.target.probs(rows, divergence.weight), value=-1.0)
        owned = (tokens[rows] >= 0) & (tokens[rows] < logits.shape[-1])
        column = torch.where(owned, tokens[rows], 0).unsqueeze(-1)
        block.scatter_add_(-1, column, torch.where(owned, on_token[rows], 0.0).unsqueeze(-1))
        if not cpu_sees(block, used.all):
            block.masked_fill_(~used.unsqueeze(-1), 0.0)
        if block.data_ptr() != out[rows].data_ptr():
            out[rows] = block


def _gradient_of_log_ratios(
    rows: slice, policy: Softmax, contributions: RowGradient, divergence: DivergenceGradient | None
) -> Tensor:
    """p_v (a + b log p_v + w log-ratio_v) of a block: the part of `gradient` that needs logarithms."""
    assert policy.normalizer is not None
    constant, slope = contributions.constant[rows].unsqueeze(-1), contributions.slope
    log_p = policy.log_probs(rows, policy.normalizer[0].dtype)
    probs = log_p.exp()
    excludes = _excludes(log_p)
    factor: Tensor | None = None
    if divergence is not None and divergence.kind in ("reverse_kl", "js"):
        log_q = divergence.target.log_probs(rows, log_p.dtype)
        excludes = excludes or _excludes(log_q)
        if divergence.kind == "reverse_kl":
            factor = torch.sub(log_p, log_q, out=log_q)
        else:
            factor = _log_ratios_to_mixture(log_q.sub_(log_p))[0].mul_(0.5)
        factor.mul_(divergence.weight[rows].unsqueeze(-1)).add_(constant)
    if slope is not None:
        entropy_part = log_p.clamp_min_(torch.finfo(log_p.dtype).min).mul_(slope[rows].unsqueeze(-1))
        factor = entropy_part.add_(constant) if factor is None else factor.add_(entropy_part)
    assert factor is not None
    return _weighted_(factor, probs, excludes)


def _weighted_(values: Tensor, weights: Tensor, excludes: bool) -> Tensor:
    """`values * weights` in place of `values`, 0 where the weight is 0 whatever the value."""
    values.mul_(weights)
    return values.masked_fill_(weights == 0, 0.0) if excludes else values


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over columns of `values * weights`, 0 where the weight is 0 whatever the value; `values` is overwritten."""
    total = values.mul_(weights).sum(dim=-1)
    # A column that one side excludes makes a NaN.
    if not cpu_sees(total, lambda: ~total.isnan().any()):
        total = values.masked_fill_(weights == 0, 0.0).sum(dim=-1)
    return total


def _excludes(values: Tensor) -> bool:
    """Whether there may be a -inf, which would make something of zeros that must be masked."""
    return not cpu_sees(values, lambda: values.amin() > -torch.inf)  # also true where there is a NaN


def _log_ratios_to_mixture(difference: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) with m = (p + q) / 2, from log(q / p), which is overwritten.

    log(p / m) = log 2 - log(1 + q / p), and with the sides exchanged log(q / m) = log 2 - log(1 + p / q). Both
    logarithms share log(1 + exp(-|log(q / p)|)), which can't overflow; its absolute error is that of log 2.
    """
    shared = difference.abs().neg_().exp_().add_(1.0).log_().neg_().add_(math.log(2.0))
    policy_part = shared - difference.clamp_min(0.0)
    return policy_part, shared.add_(difference.clamp_max_(0.0))


def _blocks(logits: Tensor, cpu_bytes: int = CPU_BLOCK_BYTES) -> Iterator[slice]:
    budget = cpu_bytes if logits.device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(1, budget // (accumulation_dtype(logits).itemsize * logits.shape[-1]))
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _shifted(values: Tensor, maximum: Tensor) -> Tensor:
    """`values` less their maximum, a new tensor; the maximum is written to `maximum`."""
    maximum.copy_(values.amax(dim=-1)).clamp_min_(torch.finfo(values.dtype).min)
    return values - maximum.unsqueeze(-1)


def _without(values: Tensor, columns: Tensor) -> Tensor:
    """A copy with some columns set to -inf."""
    width = values.shape[-1]
    # One column more than there are takes those that are no column of this rank.
    copy = values.new_empty((len(values), width + 1))
    copy[:, :width] = values
    copy.scatter_(-1, torch.where((columns >= 0) & (columns < width), columns, width), -torch.inf)
    return copy[:, :width]


@torch.no_grad()
def logits_of(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight^T` in float32 (float64 for float64). No gradient, no collective.

    Args:
        rows: [c, h] in the type of the weight.
        weight: [v, h].

    Returns:
        [c, v].
    """
    dtype = accumulation_dtype(weight)
    if weight.dtype == dtype:
        return rows @ weight.t()
    if weight.is_cuda:
        return torch.mm(rows, weight.t(), out_dtype=dtype)
    wide = rows.to(dtype)
    logits = wide.new_empty((len(rows), len(weight)))
    for part in _weight_blocks(weight):
        torch.mm(wide, weight[part].to(dtype).t(), out=logits[:, part])
    return logits


@torch.no_grad()
def hidden_gradient(on_logits: Tensor, weight: Tensor) -> Tensor:
    """`on_logits [c, v] @ weight [v, h]`, both of one type; `[c, h]` in this type."""
    dtype = accumulation_dtype(weight)
    if weight.dtype == dtype or weight.is_cuda:
        return on_logits @ weight
    total = weight.new_zeros((len(on_logits), weight.shape[1]), dtype=dtype)
    for part in _weight_blocks(weight):
        total.addmm_(on_logits[:, part].to(dtype), weight[part].to(dtype))
    return total.to(weight.dtype)


@torch.no_grad()
def add_product(total: Tensor, on_logits: Tensor, hidden: Tensor) -> None:
    """total [v, h] += on_logits [c, v]^T @ hidden [c, h], summed in the type of `total`."""
    dtype = accumulation_dtype(on_logits)
    if total.dtype == on_logits.dtype and (total.dtype == dtype or total.is_cuda):
        total.addmm_(on_logits.t(), hidden)
        return
    if total.is_cuda and total.dtype == torch.float32:
        try:
            import fused_weight_gradient_mlp_cuda  # Apex; Megatron's own way to a float32 sum of bf16 products
        except ImportError:
            pass
        else:
            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden, on_logits, total)
            return
    wide = hidden if total.is_cuda else hidden.to(dtype)
    for part in _weight_blocks(total):
        left = on_logits[:, part].t()
        total[part] += torch.mm(left, wide, out_dtype=dtype) if total.is_cuda else left.to(dtype) @ wide


def _weight_blocks(rows: Tensor) -> Iterator[slice]:
    """Of `[v, h]`, so that a block in float32 stays within the budget of `local_blocks`."""
    return local_blocks(rows, rows.shape[1] * accumulation_dtype(rows).itemsize)
