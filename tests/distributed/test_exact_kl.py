"""The exact KL penalty of replay: value and gradient are those of a dense float64 derivation, on one rank and two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.batches import grid_batch
from tests.distributed.harness import run_ranks
from tests.tolerances import FP32_PARALLEL
from tests.unit.vocab_parallel.oracles import buckets, policy_probs, probs_divergence

VOCAB_SIZE, PADDED, HIDDEN = 13, 16, 6
LOSS_MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.float32)
COEFFICIENT = 0.7


def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [b, s, h], output weight [V, h], the base's probabilities [b, s, V] and labels [b, s]; float64."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight, base = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((*LOSS_MASK.shape, HIDDEN), (VOCAB_SIZE, HIDDEN), (*LOSS_MASK.shape, VOCAB_SIZE))
    )
    labels = torch.randint(0, VOCAB_SIZE, LOSS_MASK.shape, generator=generator)
    return hidden, weight, (2 * base).softmax(-1), labels


def dense(k: int, aggregation: str) -> tuple[Tensor, Tensor]:
    """The penalty's sum, and its gradient in the weight."""
    hidden, weight, base, _ = made()
    weight.requires_grad_()
    top = base.topk(k, dim=-1).indices
    policy = policy_probs(hidden @ weight.T)
    if k < VOCAB_SIZE:
        base, policy = buckets(base, top), buckets(policy, top)
    kl = probs_divergence("reverse_kl", base, policy) * LOSS_MASK
    if aggregation == "seq_mean_token_mean":
        kl = kl / LOSS_MASK.sum(-1, keepdim=True).clamp(min=1)
    total = COEFFICIENT * kl.sum()
    total.backward()
    assert weight.grad is not None
    return total.detach(), weight.grad


def penalised(rank: int, world_size: int, k: int, aggregation: str) -> tuple[Tensor, Tensor, float]:
    """The same by the replay step, whose policy loss is 0 here: sum, gradient of this rank's rows, measured KL."""
    from megatron_erpd.model.forward import PolicyHead
    from megatron_erpd.objectives.divergences import topk_with_tail
    from megatron_erpd.objectives.replay import ppo_loss
    from megatron_erpd.training.step import ReplayStep, cached_target
    from megatron_erpd.vocab_parallel import VocabShard

    hidden, weight, base, labels = made()
    shard = VocabShard.of_rank(VOCAB_SIZE, PADDED, dist.group.WORLD if world_size > 1 else None)
    # Padding rows are large: they would show.
    padded = torch.cat([weight, torch.full((PADDED - VOCAB_SIZE, HIDDEN), 3.0, dtype=torch.float64)])
    own = padded[shard.start : shard.end].float().requires_grad_()
    top = topk_with_tail(base.log(), k)
    # As the cache holds them, for a vocabulary of 16 bits.
    rows = {
        "topk_scores": top.log_probs.float() + 2.0,
        "topk_ids_low": top.indices.short(),
        "log_normalizer": torch.full_like(LOSS_MASK, 2.0),
        "tail_log_prob": top.tail_log_prob.float(),
    }
    old, advantages = {"old_log_probs": torch.zeros_like(LOSS_MASK)}, torch.zeros(len(LOSS_MASK))
    batch = grid_batch(labels, LOSS_MASK, token_rows=old, seq_rows={"rewards": advantages}, target_rows=rows)
    step = ReplayStep(
        prefix="stage1",
        loss=ppo_loss,
        aggregation=aggregation,  # type: ignore[arg-type]
        advantages=lambda _: advantages,
        kl_coefficient=COEFFICIENT,
        kl_estimator="k3",
        vocab_size=VOCAB_SIZE,
        target=cached_target,
    )
    step._head = PolicyHead(shard, "reverse_kl", cached_target)
    output = step._head(
        hidden_states=hidden.float().transpose(0, 1),
        output_layer=SimpleNamespace(
            tp_group=shard.group, sequence_parallel=False, gradient_accumulation_fusion=False, _forward_pre_hooks={}
        ),
        output_weight=own,
        context={"batch": batch, "checks": step.checks, "outputs": []},
    )
    total, _, report = step.loss_and_metrics(batch, output)
    total.backward()
    assert own.grad is not None and step.checks.first() is None
    measured = report["stage1/policy_base_kl_exact"]
    return total.detach(), own.grad, float(measured[0] / measured[1])


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("k", [4, VOCAB_SIZE])
def test_it_is_the_dense_kl(k: int, aggregation: str) -> None:
    total, gradient, measured = penalised(0, 1, k, aggregation)
    expected, expected_gradient = dense(k, aggregation)
    FP32_PARALLEL.assert_close(total, expected, "penalty")
    FP32_PARALLEL.assert_close(gradient[:VOCAB_SIZE], expected_gradient, "gradient")
    assert not gradient[VOCAB_SIZE:].any()
    FP32_PARALLEL.assert_close(measured, float(dense(k, "token_mean")[0] / COEFFICIENT / LOSS_MASK.sum()), "measured")


@pytest.mark.parametrize("k", [4, VOCAB_SIZE])
def test_two_ranks_give_the_same(k: int) -> None:
    shards = run_ranks(penalised, 2, k, "token_mean")
    expected, expected_gradient = dense(k, "token_mean")
    gradient = torch.cat([gradient for _, gradient, _ in shards])
    for total, _, _ in shards:
        FP32_PARALLEL.assert_close(total, expected, "penalty")
    FP32_PARALLEL.assert_close(gradient[:VOCAB_SIZE], expected_gradient, "gradient")
    assert not gradient[VOCAB_SIZE:].any()


def test_fewer_entries_bound_it_from_below() -> None:
    values = [float(dense(k, "token_mean")[0]) for k in (1, 2, 4, 8, VOCAB_SIZE)]
    assert values == sorted(values) and values[0] < values[-1]
