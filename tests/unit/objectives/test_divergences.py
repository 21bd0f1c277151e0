"""Divergences against loops over Python floats, closed-form gradients, coarse-graining and zero probabilities."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.divergences import TopKTarget, divergence, topk_divergence, topk_with_tail
from megatron_erpd.objectives.types import DivergenceKind
from tests.tolerances import FLOAT64, FP32

KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
INF = math.inf
V = 9


def rows(seed: int = 0, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """(target logits, policy logits): [2, 3, V]."""
    generator = torch.Generator().manual_seed(seed)
    pair = temperature * torch.randn(2, 2, 3, V, dtype=torch.float64, generator=generator)
    return pair[0], pair[1].requires_grad_()


def kl(left: list[float], right: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True) if p > 0)


def by_hand(kind: DivergenceKind, target: list[float], policy: list[float]) -> float:
    if kind == "forward_kl":
        return kl(target, policy)
    if kind == "reverse_kl":
        return kl(policy, target)
    mixture = [(p + q) / 2 for p, q in zip(target, policy, strict=True)]
    return (kl(target, mixture) + kl(policy, mixture)) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_value_by_hand(kind: DivergenceKind) -> None:
    target, policy = (item.detach().log_softmax(-1) for item in rows())
    actual = divergence(kind, target, policy)
    assert actual.shape == (2, 3)
    for index in range(6):
        p, q = (item.exp().view(6, V)[index].tolist() for item in (target, policy))
        FLOAT64.assert_close(actual.flatten()[index], by_hand(kind, p, q))
    FLOAT64.assert_close(divergence(kind, target, target), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_the_logits_is_the_closed_form(kind: DivergenceKind) -> None:
    target_logits, logits = rows()
    q = target_logits.softmax(-1)
    p = logits.detach().softmax(-1)
    (actual,) = torch.autograd.grad(divergence(kind, q.log(), logits.log_softmax(-1)).sum(), logits)
    if kind == "forward_kl":
        expected = p - q
    else:
        # d/dz of sum p f with f = log p - log q (or half of log p - log m) is p (f - E_p f); other terms cancel.
        f = p.log() - q.log() if kind == "reverse_kl" else (p.log() - ((p + q) / 2).log()) / 2
        expected = p * (f - (p * f).sum(-1, keepdim=True))
    FLOAT64.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: DivergenceKind) -> None:
    target, logits = rows(seed=2)
    target = target.log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: divergence(kind, target, x.log_softmax(-1)), (logits,))
    topk = topk_with_tail(target, 3)
    assert torch.autograd.gradcheck(lambda x: topk_divergence(kind, topk, x.log_softmax(-1)), (logits,))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_columns_change_nothing(kind: DivergenceKind) -> None:
    target, logits = rows()
    padding = torch.full((2, 3, 4), -INF, dtype=torch.float64)
    padded_logits = torch.cat([logits.detach(), padding], -1).requires_grad_()
    padded_target = torch.cat([target, padding], -1).log_softmax(-1)
    plain = divergence(kind, target.log_softmax(-1), logits.log_softmax(-1))
    padded = divergence(kind, padded_target, padded_logits.log_softmax(-1))
    FLOAT64.assert_close(padded, plain)
    (slopes,) = torch.autograd.grad(padded.sum(), padded_logits)
    FLOAT64.assert_close(slopes[..., :V], torch.autograd.grad(plain.sum(), logits)[0])
    assert bool((slopes[..., V:] == 0).all())


def test_one_sided_zeros() -> None:
    narrow = torch.tensor([0.0, -INF], dtype=torch.float64)
    wide = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    disjoint = torch.tensor([-INF, 0.0], dtype=torch.float64)
    FLOAT64.assert_close(divergence("forward_kl", narrow, wide), math.log(2))
    FLOAT64.assert_close(divergence("reverse_kl", wide, narrow), math.log(2))
    assert float(divergence("forward_kl", wide, narrow)) == INF
    assert float(divergence("reverse_kl", narrow, wide)) == INF
    FLOAT64.assert_close(divergence("js", narrow, disjoint), math.log(2))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind: DivergenceKind) -> None:
    target = torch.tensor([200.0, -200.0, 0.0]).log_softmax(-1)
    logits = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    value = divergence(kind, target, logits.log_softmax(-1))
    (slopes,) = torch.autograd.grad(value, logits)
    assert bool(value.isfinite()) and bool(slopes.isfinite().all())
    FP32.assert_close(value, math.log(2) if kind == "js" else 400.0)


def test_topk_with_tail_by_hand() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    topk = topk_with_tail(torch.tensor(probabilities, dtype=torch.float64).log(), 2)
    assert topk.indices.tolist() == [1, 3]
    FLOAT64.assert_close(topk.log_probs.exp(), [0.4, 0.3])
    FLOAT64.assert_close(topk.tail_log_prob, math.log(0.3))


def test_the_tail_keeps_its_digits_when_it_is_tiny() -> None:
    # 1 - sum of the top probabilities is 0 in float64 here; the tail is 2e-30.
    topk = topk_with_tail(torch.tensor([0.0, math.log(1e-30), math.log(1e-30)], dtype=torch.float64), 1)
    FLOAT64.assert_close(topk.tail_log_prob, math.log(2e-30))


@pytest.mark.parametrize("kind", KINDS)
def test_topk_by_hand(kind: DivergenceKind) -> None:
    target, policy = (item.detach().log_softmax(-1) for item in rows(seed=4))
    actual = topk_divergence(kind, topk_with_tail(target, 3), policy).flatten()
    for index in range(6):
        p, q = (item.exp().view(6, V)[index].tolist() for item in (target, policy))
        top = sorted(range(V), key=lambda v: -p[v])[:3]
        p_coarse, q_coarse = ([x[v] for v in top] + [sum(x[v] for v in range(V) if v not in top)] for x in (p, q))
        FLOAT64.assert_close(actual[index], by_hand(kind, p_coarse, q_coarse))


@pytest.mark.parametrize("kind", KINDS)
def test_coarse_graining_bounds_from_below_and_all_entries_are_exact(kind: DivergenceKind) -> None:
    target, logits = rows(seed=5)
    target = target.log_softmax(-1)
    full = divergence(kind, target, logits.log_softmax(-1))
    previous = torch.full_like(full, -1e-12)
    for k in range(1, V + 1):
        coarse = topk_divergence(kind, topk_with_tail(target, k), logits.log_softmax(-1))
        assert bool((coarse >= previous - 1e-12).all()) and bool((coarse <= full + 1e-12).all())
        previous = coarse
    FLOAT64.assert_close(previous, full)
    # With K = V the tail is empty on both sides: -inf against -inf, without NaN in the gradient.
    (slopes,) = torch.autograd.grad(previous.sum(), logits, retain_graph=True)
    FLOAT64.assert_close(slopes, torch.autograd.grad(full.sum(), logits)[0])


def test_an_empty_target_tail_lets_forward_kl_ignore_the_policys() -> None:
    target = TopKTarget(torch.tensor([1]), torch.tensor([0.0]), torch.tensor(-INF))
    logits = torch.zeros(4, requires_grad=True)
    value = topk_divergence("forward_kl", target, logits.log_softmax(-1))
    (slopes,) = torch.autograd.grad(value, logits)
    FP32.assert_close(value, math.log(4))
    assert slopes.tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])


def test_unknown_kind_is_named() -> None:
    with pytest.raises(RecipeError, match="'kl' is unknown; use one of forward_kl"):
        divergence("kl", torch.zeros(2), torch.zeros(2))  # type: ignore[arg-type]
