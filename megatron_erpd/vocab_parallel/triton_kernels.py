"""The kernels that `triton_passes` launches; what they compute is written down in `passes`.

A program reads a row of logits, or a block of one. Blocks that lie within the row are read without a mask (`MASKED`
false): loads stay 16 bytes wide whatever the number of columns, and only the last block pays for one. Columns past the
end count as logits of -inf.

Arguments in capitals are compiled in, so that what a call doesn't ask for costs nothing: `KIND` is a
`DivergenceKind` or None, `DTYPE` the type of the computation (float32 or float64), `LOWEST` its lowest finite number,
`BLOCK` a power of two and a multiple of 32. Scales come as float64 and are rounded to `DTYPE` once. Strides count
entries from row to row and are used in int64, as tokens times vocabulary may exceed 2^31; the columns of a row are
adjacent. A pointer is None where there is nothing to point at.

Importing this module needs Triton but no GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG_2 = tl.constexpr(math.log(2.0))
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _values(row: tl.tensor, columns: tl.tensor, inside: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """logits * scale in the type of `scale`; -inf, and nothing read, where a column isn't `inside`."""
    logits = tl.load(row + columns) if inside is None else tl.load(row + columns, mask=inside, other=-float("inf"))
    return logits.to(scale.dtype) * scale


@triton.jit
def _log_probs(
    row: tl.tensor, columns: tl.tensor, inside: tl.tensor, scale: tl.tensor, normalizer: tl.tensor
) -> tl.tensor:
    """Log-probs; `normalizer` points at the maximum and the remainder of the row, subtracted one after the other."""
    maximum, remainder = tl.load(normalizer), tl.load(normalizer + 1)
    return _values(row, columns, inside, scale) - maximum - remainder


@triton.jit
def _weighted(values: tl.tensor, weights: tl.tensor) -> tl.tensor:
    """`values * weights`, 0 where the weight is 0 whatever the value; a weight of NaN stays one."""
    return tl.where(weights == 0.0, 0.0, values * weights)


@triton.jit
def _log_ratios_to_mixture(difference: tl.tensor) -> tl.tuple:
    """log(p / m) and log(q / m) with m = (p + q) / 2 from log(q / p), as in `passes`."""
    shared = LOG_2 - tl.log(1.0 + tl.exp(-tl.abs(difference)))
    return shared - tl.maximum(difference, 0.0), shared + tl.minimum(difference, 0.0)


@triton.jit
def _moved(total: tl.tensor, mass: tl.tensor, factor: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """sum w x once every w has become factor * w and every x has become x + shift; `mass` is sum w before.

    0 where no weight was there or none is left: a maximum starts from the lowest finite number, from which the shift
    may be infinite.
    """
    return tl.where((mass == 0.0) | (factor == 0.0), 0.0, factor * (total + mass * shift))


@triton.jit
def _without_excluded(
    values: tl.tensor, words: tl.tensor, start: tl.tensor, num_columns: tl.tensor, MASKED: tl.constexpr
) -> tl.tensor:
    """`values [BLOCK / 32, 32]` with -inf where the bit of the column is set; one word per row of the tile."""
    index = start // 32 + tl.arange(0, values.shape[0])
    word = tl.load(words + index, mask=index * 32 < num_columns, other=0) if MASKED else tl.load(words + index)
    is_set = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1
    return tl.where(is_set != 0, -float("inf"), values)


@triton.jit
def _statistics_block(
    state: tl.tuple,
    policy: tl.tensor,
    scale: tl.tensor,
    target: tl.tensor,
    target_scale: tl.tensor,
    words: tl.tensor,
    start: tl.tensor,
    num_columns: tl.tensor,
    KIND: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """The statistics (m, s, u, n, t, c) of a row with one more block of columns in them.

    Sums are relative to the maxima m, n of the columns so far. When these become m', n', the weight exp(z - m) of a
    column is multiplied by exp(m - m') and its z - m grows by m - m', the same for y and n. So, before the block's own
    terms are added,

        s' = exp(m - m') s                              t' = exp(n - n') t
        u' = exp(m - m') (u + s (m - m'))
        c' = exp(n - n') (c + t ((n - n') - (m - m')))  forward_kl, with the target's weights and (y - n) - (z - m)
        c' = exp(m - m') (c + s ((m - m') - (n - n')))  reverse_kl, with the sides exchanged

    A c of +inf stays, as long as there is weight.
    """
    m, s, u, n, t, c = state
    columns = start + tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = columns < num_columns if MASKED else None
    z = _values(policy, columns, inside, scale)
    if words is not None:
        z = _without_excluded(z, words, start, num_columns, MASKED)
    maximum = tl.maximum(m, tl.max(z))
    shift = m - maximum
    factor = tl.exp(shift)
    z -= maximum
    weights = tl.exp(z)
    if WITH_ENTROPY:
        u = _moved(u, s, factor, shift) + tl.sum(_weighted(z, weights))
    if target is not None:
        y = _values(target, columns, inside, target_scale)
        target_maximum = tl.maximum(n, tl.max(y))
        target_shift = n - target_maximum
        target_factor = tl.exp(target_shift)
        y -= target_maximum
        mass = tl.exp(y)
        if KIND == "forward_kl":
            c = _moved(c, t, target_factor, target_shift - shift) + tl.sum(_weighted(y - z, mass))
        elif KIND == "reverse_kl":
            c = _moved(c, s, factor, shift - target_shift) + tl.sum(_weighted(z - y, weights))
        t = t * target_factor + tl.sum(mass)
        n = target_maximum
    s = s * factor + tl.sum(weights)
    return maximum, s, u, n, t, c


@triton.jit
def statistics_kernel(
    result: tl.tensor,
    policy: tl.tensor,
    policy_stride: tl.int64,
    scale: tl.float64,
    target: tl.tensor,
    target_stride: tl.int64,
    target_scale: tl.float64,
    words: tl.tensor,
    num_words: tl.int32,
    num_columns: tl.int32,
    KIND: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    DTYPE: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row. `result` is `[n, 6]`; bit v % 32 of `words [n, num_words]` at v // 32 excludes column v."""
    row = tl.program_id(0).to(tl.int64)
    policy += row * policy_stride
    if target is not None:
        target += row * target_stride
    if words is not None:
        words += row * num_words
    scale = tl.full((), scale, DTYPE)
    target_scale = tl.full((), target_scale, DTYPE)
    lowest, zero = tl.full((), LOWEST, DTYPE), tl.full((), 0.0, DTYPE)
    state = (lowest, zero, zero, lowest if target is not None else zero, zero, zero)
    whole = num_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        state = _statistics_block(
            state, policy, scale, target, target_scale, words, start, num_columns, KIND, WITH_ENTROPY, BLOCK, False
        )
    for start in range(whole, num_columns, BLOCK):
        state = _statistics_block(
            state, policy, scale, target, target_scale, words, start, num_columns, KIND, WITH_ENTROPY, BLOCK, True
        )
    result += row * 6
    for index in tl.static_range(6):
        tl.store(result + index, state[index])


@triton.jit
def _js_block(
    sums: tl.tuple,
    policy: tl.tensor,
    scale: tl.tensor,
    target: tl.tensor,
    target_scale: tl.tensor,
    scalars: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
) -> tl.tuple:
    """`sums`, both `[BLOCK]`, with the terms of one more block of columns in them."""
    log_p = _log_probs(policy, columns, inside, scale, scalars)
    log_q = _log_probs(target, columns, inside, target_scale, scalars + 2)
    policy_part, target_part = _log_ratios_to_mixture(log_q - log_p)
    return sums[0] + _weighted(policy_part, tl.exp(log_p)), sums[1] + _weighted(target_part, tl.exp(log_q))


@triton.jit
def js_terms_kernel(
    result: tl.tensor,
    policy: tl.tensor,
    policy_stride: tl.int64,
    scale: tl.float64,
    target: tl.tensor,
    target_stride: tl.int64,
    target_scale: tl.float64,
    scalars: tl.tensor,
    num_columns: tl.int32,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row. `result` is `[n, 2]`, `scalars [n, 4]` the normalisers of policy and target.

    A lane of the block sums for itself until the end of the row: no exchange between threads in the loop.
    """
    row = tl.program_id(0).to(tl.int64)
    policy += row * policy_stride
    target += row * target_stride
    scalars += row * 4
    scale = tl.full((), scale, DTYPE)
    target_scale = tl.full((), target_scale, DTYPE)
    sums = (tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE))
    whole = num_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        sums = _js_block(sums, policy, scale, target, target_scale, scalars, columns, None)
    for start in range(whole, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        sums = _js_block(sums, policy, scale, target, target_scale, scalars, columns, columns < num_columns)
    tl.store(result + row * 2, 0.5 * tl.sum(sums[0]))
    tl.store(result + row * 2 + 1, 0.5 * tl.sum(sums[1]))


@triton.jit
def _gradient_block(
    out: tl.tensor,
    policy: tl.tensor,
    scale: tl.tensor,
    target: tl.tensor,
    target_scale: tl.tensor,
    scalars: tl.tensor,
    token: tl.tensor,
    start: tl.tensor,
    num_columns: tl.tensor,
    KIND: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """One block of a row, read and written. A row whose four factors are 0 isn't read at all: 0 is all it gets."""
    constant, slope = tl.load(scalars + 4), tl.load(scalars + 5)
    on_token, weight = tl.load(scalars + 6), tl.load(scalars + 7)
    used = (constant != 0.0) | (slope != 0.0) | (on_token != 0.0) | (weight != 0.0)
    columns = start + tl.arange(0, BLOCK)
    inside = columns < num_columns if MASKED else None
    read = columns < tl.where(used, num_columns, 0) if MASKED else used
    log_p = _log_probs(policy, columns, read, scale, scalars)
    factor = constant
    if WITH_SLOPE:
        factor = factor + slope * log_p
    if KIND is not None:
        log_q = _log_probs(target, columns, read, target_scale, scalars + 2)
        if KIND == "reverse_kl":
            factor = factor + weight * (log_p - log_q)
        elif KIND == "js":
            factor = factor + weight * (0.5 * _log_ratios_to_mixture(log_q - log_p)[0])
    gradient = _weighted(factor, tl.exp(log_p))
    if KIND == "forward_kl":
        gradient -= _weighted(weight, tl.exp(log_q))
    gradient += tl.where(columns == token, on_token, 0.0)
    tl.store(out + columns, tl.where(used, gradient, 0.0), mask=inside)


@triton.jit
def gradient_kernel(
    out: tl.tensor,
    out_stride: tl.int64,
    policy: tl.tensor,
    policy_stride: tl.int64,
    scale: tl.float64,
    target: tl.tensor,
    target_stride: tl.int64,
    target_scale: tl.float64,
    scalars: tl.tensor,
    tokens: tl.tensor,
    num_columns: tl.int32,
    KIND: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per block of a row, so that few rows keep the device busy too.

    `scalars` is `[n, 8]`: the normalisers of policy and target, `constant`, `slope`, `on_token`, `weight`. `out` may be
    the logits: a program writes where it alone has read, and after that.
    """
    num_blocks = tl.cdiv(num_columns, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    start = tl.program_id(0) % num_blocks * BLOCK
    out += row * out_stride
    policy += row * policy_stride
    if target is not None:
        target += row * target_stride
    token = tl.load(tokens + row)
    # An id that fits no column must not become one when it is cut to the type of the columns.
    token = tl.where((token >= 0) & (token < num_columns), token, -1).to(tl.int32)
    scalars += row * 8
    scale = tl.full((), scale, DTYPE)
    target_scale = tl.full((), target_scale, DTYPE)
    if start + BLOCK <= num_columns:
        _gradient_block(
            out, policy, scale, target, target_scale, scalars, token, start, num_columns, KIND, WITH_SLOPE, BLOCK, False
        )
    else:
        _gradient_block(
            out, policy, scale, target, target_scale, scalars, token, start, num_columns, KIND, WITH_SLOPE, BLOCK, True
        )


INTERPRETED = not isinstance(gradient_kernel, triton.JITFunction)
"""Whether Triton was told to interpret kernels when this module was imported (TRITON_INTERPRET=1)."""
