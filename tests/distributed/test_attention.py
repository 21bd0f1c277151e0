"""The attention core over packed segments and context-parallel ranks against a dense float64 computation."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.profiler import profile

from megatron_erpd.data.batch import rank_positions
from megatron_erpd.errors import LayoutError
from megatron_erpd.model.attention import CausalAttention, causal_attention, gather_keys
from tests.distributed.harness import run_ranks
from tests.tolerances import BF16, FLOAT64, FP32_PARALLEL, Tolerance

B, D, SCALE = 2, 8, 0.3


class Case(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    groups: int
    dtype: torch.dtype
    tolerance: Tolerance


CASES = [
    Case((16,), 4, 4, torch.float64, FLOAT64),
    Case((24, 8, 40), 4, 2, torch.float64, FLOAT64),
    Case((8, 8), 6, 1, torch.float32, FP32_PARALLEL),
    Case((16, 64), 4, 2, torch.bfloat16, BF16),
]


def inputs(case: Case) -> list[Tensor]:
    """Query, key, value and the gradient of the result, whole."""
    generator = torch.Generator().manual_seed(len(case.lengths))
    total = sum(case.lengths)
    shapes = [(case.heads, D), (case.groups, D), (case.groups, D)]
    made = [torch.randn(total, B, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made.append(torch.randn(total, B, case.heads * D, generator=generator, dtype=torch.float64))
    return [value.to(case.dtype) for value in made]


def held(lengths: tuple[int, ...], rank: int, size: int) -> Tensor:
    """The positions of a pack that a rank holds."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    if size == 1:
        return torch.arange(starts[-1])
    return torch.cat([start + rank_positions(n, rank, size) for start, n in zip(starts, lengths, strict=False)])


def ours(rank: int, world_size: int, case: Case) -> list[Tensor]:
    query, key, value, upstream = inputs(case)
    own = held(case.lengths, rank, world_size)
    leaves = [x[own].requires_grad_() for x in (query, key, value)]
    group = torch.distributed.group.WORLD if world_size > 1 else None
    keys = gather_keys(leaves[1], leaves[2], case.lengths, group) if group else (leaves[1], leaves[2])
    out = causal_attention(leaves[0], *keys, case.lengths, SCALE, group)
    out.backward(upstream[own])
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def dense(case: Case) -> list[Tensor]:
    query, key, value, upstream = (x.double() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    segment = torch.cat([torch.full((n,), i) for i, n in enumerate(case.lengths)])
    position = torch.arange(len(segment))
    sees = (segment[:, None] == segment) & (position[:, None] >= position)
    repeat = case.heads // case.groups
    scores = torch.einsum("qbhd,kbhd->bhqk", leaves[0], leaves[1].repeat_interleave(repeat, dim=2)) * SCALE
    weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
    out = torch.einsum("bhqk,kbhd->qbhd", weights, leaves[2].repeat_interleave(repeat, dim=2)).flatten(2)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def all_cases(rank: int, world_size: int) -> list[list[Tensor]]:
    return [ours(rank, world_size, case) for case in CASES]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_attention_is_that_of_whole_segments(world_size: int) -> None:
    ranks = run_ranks(all_cases, world_size)
    for i, case in enumerate(CASES):
        expected: Any = dense(case)
        for rank, found in enumerate(ranks):
            own = held(case.lengths, rank, world_size)
            for name, a, b in zip(("out", "query", "key", "value"), found[i], expected, strict=True):
                case.tolerance.assert_close(a, b[own], f"{name} of {case} on rank {rank}")


def allocated(lengths: tuple[int, ...]) -> int:
    """Bytes of all tensors that are made forward and backward."""
    leaves = [torch.randn(sum(lengths), 1, heads, 64, requires_grad=True) for heads in (4, 2, 2)]
    with profile(profile_memory=True) as profiler:
        causal_attention(*leaves, lengths, SCALE).sum().backward()
    assert profiler.kineto_results is not None
    return sum(max(0, e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]")


def test_a_segments_gradient_is_no_longer_than_the_segment() -> None:
    assert allocated((32,) * 64) < 3 * allocated((2048,))


@pytest.mark.parametrize(
    ("setting", "flag"),
    [({"attention_dropout": 0.1}, "--attention-dropout"), ({"window_size": (4, 0)}, "--window-size")],
)
def test_another_attention_is_refused(setting: dict[str, Any], flag: str) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "attention_dropout": 0.0}
    config = TransformerConfig(**{**sizes, **setting})
    with pytest.raises(LayoutError, match=f"{flag}: the attention without Transformer Engine doesn't compute it"):
        CausalAttention(config, 1, None, "self")
