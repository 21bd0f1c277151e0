"""From fresh responses to micro-batches: dealt to ranks, renewed, without rollouts that have no verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_erpd.settings import Layout, OnPolicySettings
from megatron_erpd.training.fresh_rollouts import FreshBatches, FreshRollouts, Response

SETTINGS = OnPolicySettings(prompts_per_update=2, num_rollouts=4, advantage="group_mean")


def rollouts(step: int, rewards: list[float]) -> FreshRollouts:
    responses = [Response(np.arange(1, 2 + i % 3), reward, i == 0) for i, reward in enumerate(rewards)]
    prompts = [[5, 6]] * 4 + [[7]] * 4
    return FreshRollouts(step, prompts, responses, np.arange(2).repeat(4))


def batches(fresh: FreshRollouts, rank: int = 0, size: int = 1) -> FreshBatches:
    return FreshBatches(fresh, SETTINGS, Layout(micro_batch_size=2), (rank, size))


def test_ranks_share_an_update() -> None:
    fresh = rollouts(0, [0, 1, 0, 1, 1, 1, 1, 0])
    whole = iter(batches(fresh))
    rows = torch.cat([next(whole).row_indices for _ in range(4)])
    assert sorted(rows.tolist()) == list(range(8))
    halves = [iter(batches(fresh, rank, 2)) for rank in (0, 1)]
    assert sorted(int(i) for half in halves for _ in range(2) for i in next(half).row_indices) == list(range(8))


def test_advantages_are_of_the_group_and_rollouts_without_a_verdict_are_left_out() -> None:
    stream = iter(batches(rollouts(0, [0, 1, math.nan, 1, 1, 1, 1, 0])))
    seen: dict[int, tuple[float, float]] = {}
    for _ in range(4):
        batch = next(stream)
        for b, i in enumerate(batch.row_indices.tolist()):
            seen[i] = (float(batch.seq_rows["advantages"][b]), float(batch.loss_mask[b].sum()))
    assert seen[2] == (0, 0)
    assert [seen[i][0] for i in (0, 1, 3)] == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert [seen[i][0] for i in (4, 5, 6, 7)] == pytest.approx([0.25, 0.25, 0.25, -0.75])
    assert all(seen[i][1] == 1 + i % 3 for i in seen if i != 2)


def test_an_update_is_trained_on_once() -> None:
    source = batches(rollouts(0, [0, 1] * 4))
    stream = iter(source)
    for _ in range(4):
        next(stream)
    source.rollouts = rollouts(1, [1, 1, 1, 0] * 2)
    assert {float(r) for _ in range(4) for r in next(stream).seq_rows["rewards"]} == {0, 1}
    with pytest.raises(AssertionError, match="trained on once"):
        next(stream)
