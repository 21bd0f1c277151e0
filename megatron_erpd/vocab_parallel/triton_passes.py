"""The passes over a rank's logits as Triton kernels: the functions of `passes`, with the same meaning, for GPUs.

Each pass reads logits and target once, and `gradient` writes once; nothing of the size of the logits is kept
besides. `statistics` finds maxima and sums in the same read (an online softmax: see `triton_kernels`), where `passes`
needs the maxima first.

What differs from `passes`:

- Rows may be strided (a view of padded logits), but their columns must be adjacent.
- The `excluded` columns of a row must be distinct. They become bits, an eighth of a byte per column: 1/16 of bf16
  logits, written and read once, however many are excluded.
- A column whose weight vanishes only beside a later, larger one may already have made a cross term infinite.

A CUDA device is needed. With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run in
Triton's interpreter on a CPU, slowly; tests do that.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel import passes
from megatron_erpd.vocab_parallel.passes import NUM_STATISTICS, DivergenceGradient, RowGradient, Softmax
from megatron_erpd.vocab_parallel.shard import accumulation_dtype

BLOCK = 4096
"""Columns of a block; a power of two, at least 32."""
NUM_WARPS = 8
"""Warps of a program. With 16 columns per thread a thread has two to four loads of 16 bytes from each tensor under way,
and registers are left for several programs on a multiprocessor: some load while others compute."""


def statistics(
    policy: Softmax,
    target: Softmax | None = None,
    kind: DivergenceKind | None = None,
    excluded: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor:
    """`passes.statistics`: `[n, NUM_STATISTICS]`, in one read of logits and target.

    Raises:
        ErpdError: no Triton or no CUDA device; columns that aren't adjacent; a target of another shape or device.
    """
    logits = policy.logits
    if not logits.numel():
        return passes.statistics(policy)
    dtype = accumulation_dtype(logits)
    result = logits.new_empty((len(logits), NUM_STATISTICS), dtype=dtype)
    words = None if excluded is None else _excluded_bits(excluded, logits.shape[-1])
    _launch(
        "statistics_kernel",
        len(logits),
        dtype,
        result,
        *_arguments("logits", policy, logits),
        *_arguments("target", target, logits),
        words,
        0 if words is None else words.shape[-1],
        logits.shape[-1],
        KIND=kind,
        WITH_ENTROPY=with_entropy,
        LOWEST=torch.finfo(dtype).min,
    )
    return result


def js_terms(policy: Softmax, target: Softmax) -> Tensor:
    """`passes.js_terms`: `[n, 2]`, in one read of logits and target. Raises as `statistics` does."""
    logits = policy.logits
    result = logits.new_zeros((len(logits), 2), dtype=accumulation_dtype(logits))
    if not logits.numel():
        return result
    assert policy.normalizer is not None and target.normalizer is not None
    scalars = torch.stack([*policy.normalizer, *target.normalizer], dim=-1).to(result.dtype)
    arguments = (*_arguments("logits", policy, logits), *_arguments("target", target, logits))
    _launch("js_terms_kernel", len(logits), result.dtype, result, *arguments, scalars, logits.shape[-1])
    return result


def gradient(
    out: Tensor, policy: Softmax, contributions: RowGradient, divergence: DivergenceGradient | None = None
) -> None:
    """`passes.gradient`: writes `out [n, v]`, which may be the logits, in one read of logits and target.

    Everything is added up in the type of the computation before it is rounded to that of `out`. Rows that become 0
    because `constant`, `slope`, `on_token` and `weight` are 0 aren't read. Raises as `statistics` does.
    """
    logits = policy.logits
    if not logits.numel():
        return
    constant, slope, tokens, on_token = contributions
    target = None if divergence is None else divergence.target
    assert policy.normalizer is not None and (target is None or target.normalizer is not None)
    dtype = accumulation_dtype(logits)
    zero = torch.zeros_like(constant)
    scalars = torch.stack(
        [
            *policy.normalizer,
            *((target and target.normalizer) or (zero, zero)),
            constant,
            zero if slope is None else slope,
            on_token,
            zero if divergence is None else divergence.weight,
        ],
        dim=-1,
    ).to(dtype)
    _launch(
        "gradient_kernel",
        len(logits) * -(-logits.shape[-1] // BLOCK),
        dtype,
        *_arguments("out", Softmax(out), logits)[:2],
        *_arguments("logits", policy, logits),
        *_arguments("target", target, logits),
        scalars,
        tokens.contiguous(),
        logits.shape[-1],
        KIND=None if divergence is None else divergence.kind,
        WITH_SLOPE=slope is not None,
    )


def _arguments(name: str, given: Softmax | None, logits: Tensor) -> tuple[Tensor | None, int, float]:
    """What a kernel is told of a distribution: where its rows are, how far apart, and the scale.

    Raises:
        ErpdError: a kernel would read past the end of the tensor, or other columns, and not say so.
    """
    if given is None:
        return None, 0, 1.0
    tensor = given.logits
    if tensor.shape != logits.shape or tensor.dim() != 2 or tensor.device != logits.device:
        raise ErpdError(
            f"{name} of shape {list(tensor.shape)} on {tensor.device} don't fit logits of shape "
            f"{list(logits.shape)} on {logits.device}: both must be [n, v] on one device"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ErpdError(
            f"the Triton kernels need the columns of {name} next to each other in memory, not {tensor.stride(-1)} "
            "entries apart: call .contiguous() on them first"
        )
    return tensor, tensor.stride(0), given.scale


def _excluded_bits(excluded: Tensor, num_columns: int) -> Tensor:
    """int32 `[n, ceil(num_columns / 32)]`: bit v % 32 of word v // 32 is set where column v is excluded.

    Distinct columns have distinct bits, so that adding them up is setting them.
    """
    is_column = (excluded >= 0) & (excluded < num_columns)
    column = torch.where(is_column, excluded, 0)
    bits = is_column.int() << (column % 32).int()
    words = excluded.new_zeros((len(excluded), -(-num_columns // 32)), dtype=torch.int32)
    return words.scatter_add_(-1, column // 32, bits)


def _launch(name: str, num_programs: int, dtype: torch.dtype, *arguments: Any, **constants: Any) -> None:
    """Starts a kernel; `dtype` is the type of the computation, `arguments` start with the tensor that is written."""
    device = arguments[0].device
    kernels = _kernels(device)
    # Triton launches on the current device, which may be another one than that of the tensors.
    with torch.cuda.device_of(arguments[0]):
        getattr(kernels, name)[(num_programs,)](
            *arguments, **constants, DTYPE=kernels.TYPES[dtype], BLOCK=BLOCK, num_warps=NUM_WARPS
        )


def _kernels(device: torch.device) -> ModuleType:
    try:
        from megatron_erpd.vocab_parallel import triton_kernels
    except ImportError as error:
        raise ErpdError(
            "the Triton kernels need Triton, which can't be imported here: install it (pip install triton), "
            "or choose --kernels torch"
        ) from error
    if device.type != "cuda" and not triton_kernels.INTERPRETED:
        raise ErpdError(
            f"the Triton kernels need a CUDA device and got tensors on {device}: "
            "choose --kernels auto or torch, or start with TRITON_INTERPRET=1 to interpret them, slowly"
        )
    return triton_kernels
