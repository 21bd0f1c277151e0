"""The replay step's sum of loss and KL penalty."""

from __future__ import annotations

from functools import partial

import torch

from megatron_erpd.objectives.replay import sft_loss
from megatron_erpd.training.step import ReplayStep
from tests.batches import grid_batch
from tests.tolerances import FLOAT64


def test_penalty_of_imitation_is_a_mean_over_the_imitated_tokens() -> None:
    torch.manual_seed(0)
    policy = (-torch.rand(4, 5, dtype=torch.float64)).requires_grad_()
    old = -torch.rand(4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    zeros = torch.zeros(4, 5, dtype=torch.int64)
    batch = grid_batch(
        zeros,
        mask,
        token_rows={"old_log_probs": old},
        seq_rows={"rewards": rewards, "advantages": rewards},
    )
    step = ReplayStep(
        prefix="stage1",
        loss=partial(sft_loss, aggregation="token_mean"),
        aggregation="token_mean",
        advantages=lambda b: b.seq_rows["advantages"],
        kl_coefficient=0.7,
        kl_estimator="k3",
        vocab_size=9,
    )
    loss_sum, count, _ = step.loss_and_metrics(batch, torch.stack([policy, -policy.detach(), policy.detach()]))
    (gradient,) = torch.autograd.grad(loss_sum / count, policy)

    imitated = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    loss, expected = 0.0, torch.zeros_like(policy)
    for row, column in imitated:
        log_ratio = float(policy[row, column] - old[row, column])
        ratio = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
        loss += (-float(policy[row, column]) + 0.7 * (ratio * log_ratio - ratio + 1)) / len(imitated)
        expected[row, column] = (-1 + 0.7 * ratio * log_ratio) / len(imitated)
    assert int(count) == len(imitated)
    FLOAT64.assert_close(loss_sum / count, loss)
    FLOAT64.assert_close(gradient, expected)
