"""Rotary positions of a pack: those of its segments, whether all tokens are turned at once or segment by segment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_erpd import platform
from megatron_erpd.model.forward import SegmentPositions
from tests.tolerances import FP32

platform.enable_cpu()

SEGMENTS = (4, 12, 8)
"""Multiples of 2 x CP."""


def angles(longest: int, **unused: object) -> Tensor:
    return torch.outer(torch.arange(longest, dtype=torch.float32), torch.tensor([1.0, 0.1, 1.0, 0.1]))[:, None, None]


@pytest.mark.parametrize("size", [1, 2])
def test_angles_of_all_tokens_turn_them_as_those_of_the_longest_segment_do(size: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    positions = SegmentPositions(angles)
    positions.segments = SEGMENTS
    whole, longest = positions(max(SEGMENTS), packed_seq=True), angles(max(SEGMENTS))
    assert whole.shape == (sum(SEGMENTS), 1, 1, 4)
    assert torch.equal(positions(5), angles(5))  # a padded micro-batch
    ends = torch.tensor([0, 4, 16, 24], dtype=torch.int32)
    for rank in range(size):
        group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        given = torch.randn(sum(SEGMENTS) // size, 3, 4)
        found = []
        for turns in (whole, longest):
            tokens = given.clone().requires_grad_()
            turned = _apply_rotary_pos_emb_thd(tokens, ends, turns, cp_group=group)
            (gradient,) = torch.autograd.grad(turned.square().sum() + turned[:, :, 0].sum(), tokens)
            found.append((turned, gradient))
        for at_once, one_by_one in zip(*found, strict=True):
            FP32.assert_close(at_once, one_by_one)
