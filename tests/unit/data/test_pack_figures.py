"""Figures of packs, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_erpd.data.batch import packer
from megatron_erpd.data.pack_figures import precompute_packs, training_packs
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.settings import Layout


def test_of_a_training() -> None:
    """On two ranks; attention is nothing beside such a model."""
    lengths = np.array([91, 61, 41, 31, 11, 9, 7, 5])
    layout = Layout(micro_batch_tokens=100, data_parallel=2)
    order, packing = BatchOrder(lengths, 4, 0), packer(layout, lengths, 1e12)
    first, second = (int((lengths[order.stream(start, 4)] - 1).sum()) for start in (0, 4))
    assert first != second
    # Of one step, and of two: no more than an epoch.
    for steps, tokens in ((1, first), (2, (first + second) / 2), (10, (first + second) / 2)):
        found = training_packs(order, packing, layout, 3, steps)
        assert (found.budget, found.packs, found.over_budget, found.padding) == (100, 3, 0, 0)
        assert found.filled == pytest.approx(tokens / 600)
    one = training_packs(BatchOrder(lengths[:1], 1, 0), packer(layout, lengths[:1], 1e12), layout, 1, 1)
    assert one.spread == pytest.approx(2.0)  # one of two ranks has nothing to do
    assert one.describe() == (
        "packs of 100 tokens: 1 on each rank and step, 45.0% full, 0.0% padding, work of the ranks (longest / mean) "
        "2.000"
    )
    shares = {"pack_filled": 0.45, "pack_padding": 0.0, "pack_spread": 2.0}
    assert one.summary() == {"pack_tokens": 100, "packs_per_step": 1, **shares}


def test_of_a_pass_of_precompute() -> None:
    """Three packs on two ranks, each sequence padded to 4 tokens and each pack to 8."""
    lengths = np.array([2, 6, 6, 30])
    layout = Layout(
        micro_batch_tokens=8, context_parallel=2, tensor_parallel=2, sequence_parallel=True, data_parallel=2
    )
    packing = packer(layout, lengths, 1e12)
    assert packing.tokens.tolist() == [4, 8, 8, 32]
    groups = [np.array([3]), np.array([1, 2]), np.array([0])]
    found = precompute_packs(groups, packing, layout, lengths)
    assert (found.budget, found.packs, found.over_budget) == (16, 2, 1)
    assert found.filled == (32 + 16 + 8) / (4 * 16)
    assert found.padding == pytest.approx(1 - (29 + 5 + 5 + 1) / (32 + 16 + 8))
    assert found.spread == pytest.approx(36 / 26)
