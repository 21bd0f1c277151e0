"""The matrix products of the output layer: logits, and from their gradient those of hidden states and weight.

The operands have the type of the weight, float32 or 16 bits. Every product is summed in float32, and logits are
returned in it: rounded to bf16 a logit of 20 is off by up to 0.06, as much as many a log-ratio or KL. Their gradient is
computed in float32 and rounded once, to the weight's type, for the two products of the backward, as Megatron's own
output layer has it.

On CUDA the products of 16-bit operands are the GPU's own. On a CPU operands are widened to float32, which is exact, a
block of weight rows at a time: where a CPU has no 16-bit arithmetic, PyTorch's substitute for it takes several times as
long. With float32 operands all of these are PyTorch's plain products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_erpd.vocab_parallel.shard import accumulation_dtype, local_blocks


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
    for part in _blocks(weight):
        torch.mm(wide, weight[part].to(dtype).t(), out=logits[:, part])
    return logits


@torch.no_grad()
def hidden_gradient(on_logits: Tensor, weight: Tensor) -> Tensor:
    """`on_logits [c, v] @ weight [v, h]`, both of one type; `[c, h]` in this type."""
    dtype = accumulation_dtype(weight)
    if weight.dtype == dtype or weight.is_cuda:
        return on_logits @ weight
    total = weight.new_zeros((len(on_logits), weight.shape[1]), dtype=dtype)
    for part in _blocks(weight):
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
    for part in _blocks(total):
        left = on_logits[:, part].t()
        total[part] += torch.mm(left, wide, out_dtype=dtype) if total.is_cuda else left.to(dtype) @ wide


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Of `[v, h]`, so that a block in float32 stays within the budget of `local_blocks`."""
    return local_blocks(rows, rows.shape[1] * accumulation_dtype(rows).itemsize)
