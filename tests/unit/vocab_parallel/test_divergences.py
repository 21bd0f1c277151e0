"""Divergences in one process, against formulas in probability space and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError
from megatron_erpd.vocab_parallel import (
    NO_TOKEN,
    LiveTarget,
    TopKTarget,
    VocabShard,
    divergence,
    gathered_divergence,
    vocab_parallel_log_softmax,
    vocab_parallel_topk,
)
from tests.tolerances import FLOAT64, FP32
from tests.unit.vocab_parallel.oracles import buckets, policy_probs, probs_divergence

VOCAB, PADDED = 37, 48
SHARD = VocabShard.dense(VOCAB, PADDED)
KINDS = ["forward_kl", "reverse_kl", "js"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_temperature = pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])


def make_logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    logits = 2.0 * torch.randn(2, 5, PADDED, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[..., VOCAB:] = 1e4
    return logits.to(dtype)


def make_target(seed: int = 9) -> LiveTarget:
    return LiveTarget(vocab_parallel_log_softmax(make_logits(seed), SHARD))


def gradient_of(value: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
    return gradient


@each_kind
@each_temperature
@pytest.mark.parametrize("k", [None, 1, 6, VOCAB - 1])
def test_value_and_gradient(kind: str, temperature: float, k: int | None) -> None:
    live = make_target()
    target = live if k is None else vocab_parallel_topk(live.logits, k, SHARD)
    logits = make_logits(1).requires_grad_()
    dense = logits.detach()[..., :VOCAB].clone().requires_grad_()
    value = divergence(kind, logits, target, SHARD, temperature)
    p, q = policy_probs(dense, temperature), live.logits[..., :VOCAB].exp()
    if isinstance(target, TopKTarget):
        p, q = buckets(p, target.indices), buckets(q, target.indices)
    expected = probs_divergence(kind, q, p)
    FLOAT64.assert_close(value, expected)
    weights = torch.randn(2, 5, dtype=torch.float64)
    gradient = gradient_of(value, logits, weights)
    FLOAT64.assert_close(gradient[..., :VOCAB], gradient_of(expected, dense, weights))
    assert (gradient[..., VOCAB:] == 0).all()


@each_kind
def test_gathered_is_the_same(kind: str) -> None:
    logits = make_logits(1).requires_grad_()
    weights = torch.randn(2, 5, dtype=torch.float64)
    results = [f(kind, logits, make_target(), SHARD, 1.7) for f in (divergence, gathered_divergence)]
    FLOAT64.assert_close(results[0], results[1])
    FLOAT64.assert_close(*(gradient_of(result, logits, weights) for result in results))


@each_kind
def test_gradcheck(kind: str) -> None:
    logits = make_logits(1)[:, :2].clone().requires_grad_()
    live = LiveTarget(make_target().logits[:, :2])
    assert torch.autograd.gradcheck(lambda x: divergence(kind, x, live, SHARD, 1.3), logits)
    topk = vocab_parallel_topk(live.logits, 5, SHARD)
    assert torch.autograd.gradcheck(lambda x: divergence(kind, x, topk, SHARD, 1.3), logits)


@each_kind
def test_zero_for_equal_distributions(kind: str) -> None:
    logits = make_logits(9).requires_grad_()
    for target in (make_target(), vocab_parallel_topk(make_target().logits, 4, SHARD)):
        value = divergence(kind, logits, target, SHARD)
        FLOAT64.assert_close(value, torch.zeros_like(value))
        gradient = gradient_of(value, logits, torch.ones_like(value))
        FLOAT64.assert_close(gradient, torch.zeros_like(gradient))


def test_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    logits = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64)
    target = LiveTarget(torch.tensor([0.5, 0.5], dtype=torch.float64).log())
    shard = VocabShard.dense(2)
    expected = {
        "forward_kl": 0.5 * math.log(4 / 3),
        "reverse_kl": 0.75 * math.log(3) - math.log(2),
        "js": 0.375 * math.log(6 / 5) + 0.125 * math.log(2 / 3) + 0.25 * math.log(4 / 5) + 0.25 * math.log(4 / 3),
    }
    for kind, value in expected.items():
        assert divergence(kind, logits, target, shard).item() == pytest.approx(value, rel=1e-12)


@each_kind
def test_all_tokens_in_topk_is_the_full_divergence(kind: str) -> None:
    logits = make_logits(1).requires_grad_()
    live = make_target()
    topk = vocab_parallel_topk(live.logits, VOCAB, SHARD)
    assert (topk.tail_log_prob == -torch.inf).all()
    weights = torch.randn(2, 5, dtype=torch.float64)
    results = [divergence(kind, logits, target, SHARD) for target in (live, topk)]
    FLOAT64.assert_close(results[0], results[1])
    FLOAT64.assert_close(*(gradient_of(result, logits, weights) for result in results))


@each_kind
def test_coarse_graining_bounds_from_below(kind: str) -> None:
    live, logits = make_target(), make_logits(1)
    full = divergence(kind, logits, live, SHARD)
    coarse = [divergence(kind, logits, vocab_parallel_topk(live.logits, k, SHARD), SHARD) for k in (1, 3, 9, 30)]
    for smaller, larger in zip(coarse, [*coarse[1:], full], strict=True):
        assert (smaller <= larger + 1e-12).all()


@each_kind
def test_vanishing_tail_is_exact(kind: str) -> None:
    """The policy's tail mass is e^-300 of the whole: 1 - sum(top-k) would be 0, in any precision."""
    logits = torch.full((1, 6), -300.0)
    logits[0, :2] = torch.tensor([0.5, 0.0])
    logits.requires_grad_()
    log_q = torch.log_softmax(torch.tensor([[0.0, 0.0, -2.0, -2.0, -2.0, -2.0]]), dim=-1)
    target = vocab_parallel_topk(log_q, 2, VocabShard.dense(6))
    value = divergence(kind, logits, target, VocabShard.dense(6))
    p = torch.log_softmax(torch.tensor([0.5, 0.0, -300.0 + math.log(4.0)], dtype=torch.float64), dim=-1)
    q = torch.cat([target.log_probs[0], target.tail_log_prob]).double()
    if kind == "forward_kl":
        expected = (q.exp() * (q - p)).sum()
        assert value.item() > 60
    elif kind == "reverse_kl":
        expected = (p.exp() * (p - q)).sum()
    else:
        m = torch.logaddexp(p, q) - math.log(2.0)
        expected = 0.5 * ((q.exp() * (q - m)).sum() + (p.exp() * (p - m)).sum())
    FP32.assert_close(value.double(), expected.unsqueeze(0))
    gradient = gradient_of(value, logits, torch.ones(1))
    if kind == "forward_kl":
        # The tail pulls with q's mass, shared by the policy's proportions within the tail.
        FP32.assert_close(gradient[0, 2:], (-q[2].exp() / 4).float().expand(4))
    assert gradient.isfinite().all()


@each_kind
@pytest.mark.parametrize("k", [None, 3])
def test_extreme_logits(kind: str, k: int | None) -> None:
    target: LiveTarget | TopKTarget = LiveTarget(make_target().logits.float())
    if k is not None:
        target = vocab_parallel_topk(target.logits, k, SHARD)
    logits = torch.full((2, 5, PADDED), -1e4)
    logits[..., 7] = 1e4
    logits[..., 1, 7:9] = 1e4
    logits.requires_grad_()
    value = divergence(kind, logits, target, SHARD)
    reference = divergence(kind, logits.detach().double(), _double(target), SHARD)
    FP32.assert_close(value.double(), reference)
    gradient = gradient_of(value, logits, torch.ones_like(value))
    assert value.isfinite().all() and gradient.isfinite().all()
    FP32.assert_close(gradient.sum(-1), torch.zeros(2, 5))


def _double(target: LiveTarget | TopKTarget) -> LiveTarget | TopKTarget:
    if isinstance(target, LiveTarget):
        return LiveTarget(target.logits.double())
    return TopKTarget(target.indices, target.log_probs.double(), target.tail_log_prob.double())


@each_kind
def test_target_that_excludes_what_the_policy_excludes(kind: str) -> None:
    """-inf on both sides counts for nothing: as if the columns weren't there."""
    keep = torch.arange(PADDED) < 20
    logits = make_logits(1).masked_fill(~keep, -torch.inf).requires_grad_()
    target = LiveTarget(torch.log_softmax(make_logits(9).masked_fill(~keep, -torch.inf), dim=-1))
    smaller = VocabShard.dense(20)
    expected = divergence(kind, logits[..., :20], LiveTarget(target.logits[..., :20]), smaller)
    weights = torch.ones_like(expected)
    expected_gradient = gradient_of(expected, logits, weights)
    for function in (divergence, gathered_divergence):
        value = function(kind, logits, target, SHARD)
        FLOAT64.assert_close(value, expected)
        FLOAT64.assert_close(gradient_of(value, logits, weights), expected_gradient)


def test_disjoint_supports() -> None:
    """KL is infinite, JS is log 2; a masked token's gradient is zero all the same."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]] * 2, requires_grad=True)
    target = LiveTarget(torch.tensor([[-torch.inf, -torch.inf, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0]]).log_softmax(-1))
    shard = VocabShard.dense(4)
    assert divergence("js", logits, target, shard)[0].item() == pytest.approx(math.log(2))
    for kind in ("forward_kl", "reverse_kl"):
        value = divergence(kind, logits, target, shard)
        assert value[0] == torch.inf
        masked = torch.where(torch.tensor([False, True]), value, 0.0)
        (gradient,) = torch.autograd.grad(masked[1:].sum(), logits, retain_graph=True)
        assert (gradient[0] == 0).all()


@each_kind
def test_masked_tokens_have_no_gradient(kind: str) -> None:
    logits = make_logits(1).requires_grad_()
    mask = (torch.arange(10).reshape(2, 5) % 2).double()
    for target in (make_target(), vocab_parallel_topk(make_target().logits, 4, SHARD)):
        gradient = gradient_of(divergence(kind, logits, target, SHARD), logits, mask)
        assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1][:, :VOCAB] != 0).all()


@each_kind
def test_stored_targets(kind: str) -> None:
    """A cache's types (int32, float16) and its empty entries."""
    logits = make_logits(1, torch.float32)
    topk = vocab_parallel_topk(make_target().logits, 4, SHARD)
    stored = TopKTarget(
        torch.nn.functional.pad(topk.indices, (0, 2), value=NO_TOKEN).int(),
        torch.nn.functional.pad(topk.log_probs, (0, 2), value=-torch.inf).half(),
        topk.tail_log_prob.float(),
    )
    rounded = TopKTarget(topk.indices, topk.log_probs.half().double(), topk.tail_log_prob)
    FP32.assert_close(
        divergence(kind, logits, stored, SHARD).double(), divergence(kind, logits.double(), rounded, SHARD)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype: torch.dtype) -> None:
    logits = make_logits(1, dtype).requires_grad_()
    value = divergence("reverse_kl", logits, make_target(), SHARD)
    assert value.dtype == torch.float32
    exact = divergence("reverse_kl", logits.detach().double(), make_target(), SHARD)
    FP32.assert_close(value.double(), exact)
    assert gradient_of(value, logits, torch.ones_like(value)).dtype == dtype


def test_errors() -> None:
    logits, target = make_logits(1), make_target()
    with pytest.raises(ErpdError, match="'kl' is unknown; choose one of forward_kl, reverse_kl, js"):
        divergence("kl", logits, target, SHARD)  # type: ignore[arg-type]
    with pytest.raises(ErpdError, match="the target's logits of shape"):
        divergence("js", logits[:1], target, SHARD)
    topk = vocab_parallel_topk(target.logits, 3, SHARD)
    with pytest.raises(ErpdError, match="tail_log_prob of shape"):
        divergence("js", logits, topk._replace(tail_log_prob=topk.tail_log_prob[..., :2]), SHARD)
