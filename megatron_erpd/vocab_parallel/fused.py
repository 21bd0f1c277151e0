"""The output layer and what is computed of its logits in one: no tensor `[tokens, v/tp]` ever exists.

Forward makes the logits of a chunk of tokens, takes their numbers and drops them. Backward makes them once more, turns
them into their own gradient in place, and multiplies that into the gradients of the hidden states and the weight. That
is one matrix product more than with logits kept (four instead of three), for memory that doesn't grow with the
number of tokens. It has to be so where the loss isn't known yet (a sequence's ratio, a KL budget), and it lets the
weight's gradient be added to Megatron's `main_grad` at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.errors import LayoutError
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel import chunks
from megatron_erpd.vocab_parallel.shard import VocabShard
from megatron_erpd.vocab_parallel.targets import Target
from megatron_erpd.vocab_parallel.terms import Request, Scalars, compute, gradient
from megatron_erpd.vocab_parallel.token_terms import TokenTerms, make_request, target_chunks, upstream_of


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
) -> TokenTerms:
    """`token_terms` of the logits `hidden @ weight^T`, which are made a chunk of tokens at a time.

    Args:
        hidden: [..., h], or [s/tp, ..., h] under sequence parallelism: the output layer's input.
        weight: [v/tp, h], this rank's shard; with tied weights the embedding's.
        positions: int64 [n], which rows of the flattened hidden states are wanted; None for all. The others cost
            nothing and get the gradient 0.
        tokens, kind, target, temperature, with_entropy: as `token_terms`, for the n rows in their order.
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
    request = make_request(shard, num_tokens, tokens, hidden.device, kind, target, temperature, with_entropy)
    chunks.check_memory(hidden.device, num_tokens, _bytes_per_token(weight))
    return TokenTerms(*_FusedTerms.apply(hidden, weight, request, positions, layer))


class _FusedTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, request: Request, positions: Tensor | None, layer: OutputLayer
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = layer.gather(hidden).reshape(-1, hidden.shape[-1])
        chunk_size = _bytes_per_token(weight)
        scalars = compute(
            request, lambda part: _rows(rows, positions, part) @ weight.t(), target_chunks(request, chunk_size)
        )
        # The weight itself, not a saved copy of the reference: `main_grad` is an attribute of the parameter.
        ctx.request, ctx.positions, ctx.layer, ctx.weight = request, positions, layer, weight
        ctx.main_grad = weight.main_grad if layer.accumulate and hasattr(weight, "main_grad") else None
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
        rows = ctx.layer.gather(hidden)
        shape, rows = rows.shape, rows.reshape(-1, hidden.shape[-1])
        on_hidden = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        on_weight = _weight_gradient(weight, ctx.main_grad) if ctx.needs_input_grad[1] else None
        for part in target_chunks(request, _bytes_per_token(weight)):
            chunk = _rows(rows, ctx.positions, part)
            logits = chunk @ weight.t()
            gradient(request, logits, part, scalars, upstream, out=logits)
            if on_hidden is not None:
                where = part if ctx.positions is None else ctx.positions[part]
                on_hidden[where] = logits @ weight
            if on_weight is not None:
                add_product(on_weight, logits, chunk)
            del logits
        if on_hidden is not None:
            on_hidden = ctx.layer.reduce(on_hidden.reshape(shape))
        if on_weight is not None and ctx.main_grad is not None:
            on_weight = _after_main_grad(weight)
        elif on_weight is not None:
            on_weight = on_weight.to(weight.dtype)
        return on_hidden, on_weight, None, None, None


def add_product(total: Tensor, on_logits: Tensor, hidden: Tensor) -> None:
    """total [v, h] += on_logits [c, v]^T @ hidden [c, h], summed in the type of `total`."""
    if total.dtype == on_logits.dtype:
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
    total.add_(on_logits.t() @ hidden)


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
    return len(weight) * weight.dtype.itemsize
