"""Top-k and its exact tail, in one process."""

from __future__ import annotations

import pytest
import torch

from megatron_erpd.errors import ErpdError
from megatron_erpd.vocab_parallel import VocabShard, vocab_parallel_topk
from tests.tolerances import FLOAT64, FP32

SHARD = VocabShard.dense(37, 48)


def make_log_probs() -> torch.Tensor:
    logits = 2.0 * torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_probs = torch.log_softmax(logits[..., :37], dim=-1)
    # A value in the padding that would be selected first.
    return torch.nn.functional.pad(log_probs, (0, 11), value=5.0)


@pytest.mark.parametrize("k", [1, 5, 36, 37])
def test_against_dense(k: int) -> None:
    log_probs = make_log_probs()
    topk = vocab_parallel_topk(log_probs, k, SHARD)
    values, indices = log_probs[..., :37].sort(dim=-1, descending=True)
    assert torch.equal(topk.indices, indices[..., :k])
    assert torch.equal(topk.log_probs, values[..., :k])
    rest = values[..., k:].exp().sum(-1)
    FLOAT64.assert_close(topk.tail_log_prob.exp(), rest)
    total = topk.log_probs.exp().sum(-1) + topk.tail_log_prob.exp()
    FLOAT64.assert_close(total, torch.ones_like(total))


def test_vanishing_tail() -> None:
    """Below e^-103 float32 has no probability any more; its logarithm is exact all the same."""
    log_probs = torch.tensor([[0.0, -200.0, -200.0, -5000.0]])
    topk = vocab_parallel_topk(log_probs, 1, VocabShard.dense(4))
    expected = torch.tensor([-200.0]) + torch.tensor([2.0]).log()
    FP32.assert_close(topk.tail_log_prob, expected)
    topk = vocab_parallel_topk(log_probs, 3, VocabShard.dense(4))
    assert topk.tail_log_prob.item() == -5000.0


def test_excluded_tokens_leave_an_empty_tail() -> None:
    log_probs = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    topk = vocab_parallel_topk(log_probs, 2, VocabShard.dense(4))
    assert topk.log_probs[0, 0] == 0 and topk.log_probs[0, 1] == -torch.inf
    assert topk.tail_log_prob.item() == -torch.inf


@pytest.mark.parametrize("k", [0, 38])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ErpdError, match=rf"1 <= k <= 37 .* not k = {k}"):
        vocab_parallel_topk(make_log_probs(), k, SHARD)
