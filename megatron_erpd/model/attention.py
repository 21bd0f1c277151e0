"""Causal attention in linear memory, over segments and context-parallel shards: the local spec's core attention.

Megatron's own `DotProductAttention` keeps an s x s matrix, repeats grouped keys and values for every query head, and
takes no context parallelism. With Transformer Engine its attention is taken and this file is
not used.

*Context parallelism.* A rank holds two of 2 * CP equal pieces of each segment (`data.batch.rank_positions`). It gathers
the keys and values of all ranks (one all-gather forward; one reduce-scatter of their gradients backward) and computes
the attention of its own queries: each piece sees all keys before it and, causally, its own. Every layer keeps the whole
sequence's keys and values until its backward, which grouped heads make small against its other activations; where the
attention is recomputed (`--recompute-granularity`), they are gathered again, and are there in one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from megatron_erpd.data.batch import rank_positions
from megatron_erpd.errors import LayoutError


class CausalAttention(MegatronModule):
    """softmax(q k^T * scale) v for every query head, each position seeing its own segment up to itself.

    Computed by PyTorch's fused kernels, whose memory grows with the sequence and not with its square. (Of grouped heads
    in fp32 CUDA has none, and PyTorch keeps the scores.) Collectives: see `gather_keys`; none without context
    parallelism.

    Raises:
        LayoutError: at construction, for an attention that this isn't: dropout, a sliding window, sinks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        unsupported = {
            "--attention-dropout": config.attention_dropout if attention_dropout is None else attention_dropout,
            "--window-size": config.window_size,
            "--softmax-type": config.softmax_type != "vanilla",
            "cross attention": attention_type != "self",
        }
        for name, found in unsupported.items():
            if found:
                raise LayoutError(f"{name}: the attention without Transformer Engine doesn't compute it; leave it out")
        self.scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            self.group = pg_collection.cp if pg_collection else mpu.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """
        Args:
            query: `[s, b, heads, d]`, this rank's positions of b sequences of one length; of a pack `[t, heads, d]`,
                segment after segment.
            key, value: with `groups` heads, of which `heads` is a multiple.
            packed_seq_params: of a pack, where its segments end; on the host, as they decide what is computed.

        Returns:
            `[s, b, heads * d]`, of a pack `[t, heads * d]`.
        """
        assert attention_mask is None and attention_bias is None, "attention is causal, without a bias"
        if packed_seq_params is not None:
            lengths = tuple(packed_seq_params.cu_seqlens_q.diff().tolist())
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        else:
            lengths = (query.shape[0] * (self.group.size() if self.group else 1),)
        if self.group is not None:
            key, value = gather_keys(key, value, lengths, self.group)
        out = causal_attention(query, key, value, lengths, self.scale, self.group)
        return out if packed_seq_params is None else out.squeeze(1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Attention of this rank's queries over whole segments.

    Args:
        query: `[sum(lengths) / cp, b, heads, d]`, segment after segment, of each this rank's two pieces.
        key, value: `[sum(lengths), b, groups, d]`, whole and in order.
        lengths: of the segments, each a multiple of 2 * cp; on the host.
        group: the context-parallel ranks; None for one.

    Returns:
        `[sum(lengths) / cp, b, heads * d]`.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    pieces = [_pieces(length, group) for length in lengths]
    queries = iter(_split(q, [count for own in pieces for _, count in own]))
    outputs = []
    for keys, values, own in zip(_split(k, lengths), _split(v, lengths), pieces, strict=True):
        for start, count in own:
            end = start + count
            outputs.append(_attend(next(queries), keys[:, :, :end], values[:, :, :end], scale))
    return (torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]).permute(2, 0, 1, 3).flatten(2)


def _split(values: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Positions one after another. Slices would each have a gradient as long as all of them together."""
    return values.split(list(counts), dim=2) if len(counts) > 1 else [values]


def _pieces(length: int, group: torch.distributed.ProcessGroup | None) -> list[tuple[int, int]]:
    """Start and size of this rank's pieces of a segment."""
    if group is None:
        return [(0, length)]
    size, rank = group.size(), group.rank()
    count = length // (2 * size)
    return [(rank * count, count), ((2 * size - 1 - rank) * count, count)]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`[b, heads, n, d]`: the queries are the last n of the keys' positions."""
    grouped = query.shape[1] != key.shape[1]
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    if query.device.type == "cpu":
        return _LastQueries.apply(query, key, value, scale)
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _LastQueries(torch.autograd.Function):
    """Causal attention of queries at the end of the keys, on a CPU, whose kernel aligns its causal mask at the start.

    Two calls of it: over the keys before the first query, all of them seen, and over the queries' own, causally. Both
    give the logarithm of their softmax's denominator, by which the results are averaged (as flash attention does with
    its blocks: Dao et al., arXiv 2205.14135, section 3.1). The kernel's backward takes the whole result and the whole
    denominator, and so gives each part's share of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        start = key.shape[2] - query.shape[2]
        keys, values = (_for_heads(x, query.shape[1]) for x in (key, value))
        before, before_log = _flash(query, keys[:, :, :start], values[:, :, :start], 0.0, False, scale=scale)
        own, own_log = _flash(query, keys[:, :, start:], values[:, :, start:], 0.0, True, scale=scale)
        log = torch.logaddexp(before_log, own_log)
        share = (before_log - log).exp().unsqueeze(-1)
        out = (before * share + own * (1 - share)).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log = ctx.saved_tensors
        start = key.shape[2] - query.shape[2]
        keys, values = (_for_heads(x, query.shape[1]) for x in (key, value))
        parts = [
            _flash_backward(
                upstream, query, keys[:, :, at], values[:, :, at], out, log, 0.0, is_causal=causal, scale=ctx.scale
            )
            for at, causal in ((slice(0, start), False), (slice(start, None), True))
        ]
        (before, *before_keys), (own, *own_keys) = parts
        on_keys, on_values = (
            torch.cat(pair, dim=2).unflatten(1, (key.shape[1], -1)).sum(dim=2)
            for pair in zip(before_keys, own_keys, strict=True)
        )
        return before + own, on_keys, on_values, None


def _for_heads(values: Tensor, heads: int) -> Tensor:
    """Keys or values of groups `[b, groups, n, d]` for each of their query heads: before PyTorch 2.9 the CPU's kernel
    reads beyond the end of fewer."""
    return values if values.shape[1] == heads else values.repeat_interleave(heads // values.shape[1], dim=1)


def gather_keys(
    key: Tensor, value: Tensor, lengths: Sequence[int], group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole segments, in order, from all context-parallel ranks' pieces.

    Args:
        key, value: `[sum(lengths) / cp, b, groups, d]`.

    Returns:
        `[sum(lengths), b, groups, d]` each. One all-gather forward, one reduce-scatter of the gradients backward.
    """
    order = _whole_order(tuple(lengths), group.size(), key.device)
    whole = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group).index_select(0, order)
    return whole[:, 0], whole[:, 1]


@lru_cache(maxsize=8)  # all layers of a micro-batch ask for the same
def _whole_order(lengths: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Where in all ranks' pieces, rank after rank, each position of the segments is. Made on the device: the host would
    wait for a copy."""
    starts = [0, *accumulate(lengths)]
    held = [
        start + rank_positions(length, rank, size, device)
        for rank in range(size)
        for start, length in zip(starts, lengths, strict=False)
    ]
    return torch.cat(held).argsort()
