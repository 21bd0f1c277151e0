"""The loss and its gradient are the same whether a sequence is on one rank or split over several."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch, rank_positions
from megatron_erpd.model.forward import SequenceShard, StepChecks, loss_of
from megatron_erpd.objectives.replay import ce_loss, sapo_loss
from megatron_erpd.objectives.types import LossOutput, ReplayInputs
from tests.batches import grid_batch
from tests.distributed.harness import run_ranks
from tests.tolerances import FLOAT64

B, S = 3, 16


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(1, B, S, generator=generator, dtype=torch.float64)
    old = -torch.rand(B, S, generator=generator, dtype=torch.float64)
    mask = (torch.rand(B, S, generator=generator) < 0.6).double()
    return log_probs, old, mask, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def whole_loss(name: str, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    _, old, mask, rewards = make()
    inputs = ReplayInputs(output[0], old, mask, rewards - rewards.mean(), rewards)
    result: LossOutput = {"ce": ce_loss, "sapo": sapo_loss}[name](inputs)
    return result.loss_sum, result.count, {"loss": torch.stack([result.loss_sum.detach(), result.count.double()])}


def grid() -> Batch:
    positions = torch.arange(S).expand(B, S)
    return grid_batch(positions, positions.float())


def split(rank: int, world_size: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron makes of the ranks: summed counts, summed reports, and this rank's gradient."""
    positions = rank_positions(S, rank, world_size)
    here = torch.zeros(S, dtype=torch.float64)
    here[positions] = 1
    local = (make()[0] * here).requires_grad_()
    group = torch.distributed.group.WORLD
    shard = SequenceShard(rank, world_size, group)
    total, count, report = loss_of(partial(whole_loss, name), grid(), StepChecks(), local, shard)
    total.backward()
    torch.distributed.all_reduce(count)
    torch.distributed.all_reduce(report["loss"])
    whole = torch.zeros(1, B, S, dtype=torch.float64)
    assert local.grad is not None
    whole[..., positions] = local.grad[..., positions]
    torch.distributed.all_reduce(whole)
    return whole, count, report["loss"]


def test_split_loss_is_the_whole_loss() -> None:
    for name in ("ce", "sapo"):
        output = make()[0].requires_grad_()
        total, count, _ = whole_loss(name, grid(), output)
        total.backward()
        for gradient, counted, reported in run_ranks(split, 2, name):
            assert output.grad is not None
            FLOAT64.assert_close(gradient, output.grad)
            assert int(counted) == int(count)
            FLOAT64.assert_close(reported[0], total.detach())


def test_positions_are_those_of_megatron() -> None:
    # megatron.core.utils.get_batch_on_this_cp_rank: pieces rank and 2 * size - 1 - rank.
    assert rank_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert rank_positions(8, 1, 2).tolist() == [2, 3, 4, 5]
