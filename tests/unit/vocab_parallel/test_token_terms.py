"""Log-probs, entropy and divergence together: what is kept and made in memory, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_erpd.errors import ErpdError, LayoutError, RecipeError
from megatron_erpd.vocab_parallel import (
    IGNORED_TOKEN,
    HiddenTarget,
    LiveTarget,
    Target,
    TopKTarget,
    VocabShard,
    divergence,
    fused_token_terms,
    passes,
    token_terms,
    vocab_parallel_topk,
)
from megatron_erpd.vocab_parallel import shard as chunks
from tests.tolerances import FLOAT64
from tests.unit.vocab_parallel.oracles import policy_probs, probs_divergence

VOCAB, PADDED, TOKENS, HIDDEN = 37, 48, 6, 5
SHARD = VocabShard.dense(VOCAB, PADDED)
KINDS = ("forward_kl", "reverse_kl", "js")
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_target(name: str, dtype: torch.dtype = torch.float64) -> Target:
    hidden, weight = make(3, TOKENS, HIDDEN).to(dtype), make(4, PADDED, HIDDEN).to(dtype)
    if name == "hidden":
        return HiddenTarget(hidden, weight, 0.7)
    logits = hidden @ weight.t()
    if name == "full":
        return LiveTarget(logits, 0.7)
    whole = torch.log_softmax(logits[:, :VOCAB] / 0.7, dim=-1)
    return vocab_parallel_topk(whole, 4, VocabShard.dense(VOCAB))


def make_tokens() -> Tensor:
    tokens = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))
    tokens[2] = IGNORED_TOKEN
    return tokens


@each_kind
def test_hidden_target_is_the_target_of_its_logits(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    results = []
    for name in ("full", "hidden"):
        logits = make(1, TOKENS, PADDED).requires_grad_()
        value = divergence(kind, logits, make_target(name), SHARD, 1.3)
        (gradient,) = torch.autograd.grad((value * torch.arange(TOKENS)).sum(), logits)
        results.append((value, gradient))
    for left, right in zip(*results, strict=True):
        FLOAT64.assert_close(left, right)
    p = policy_probs(make(1, TOKENS, PADDED)[:, :VOCAB], 1.3)
    q = policy_probs((make(3, TOKENS, HIDDEN) @ make(4, PADDED, HIDDEN).t())[:, :VOCAB], 0.7)
    FLOAT64.assert_close(results[1][0], probs_divergence(kind, q, p))


@each_kind
@pytest.mark.parametrize("target", ["full", "topk", "hidden"])
def test_gradient_over_the_logits(kind: Any, target: str) -> None:
    """Written over the logits it is the same; a second backward is refused."""
    gradients = []
    for overwrite in (False, True):
        leaf = make(1, TOKENS, PADDED).requires_grad_()
        logits = leaf * 1.0
        terms = token_terms(logits, SHARD, make_tokens(), kind, make_target(target), overwrite_logits=overwrite)
        loss = torch.stack([x * torch.arange(TOKENS) for x in terms]).sum()
        loss.backward(retain_graph=True)
        assert leaf.grad is not None
        gradients.append(leaf.grad.clone())
    FLOAT64.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that an operation returned in a tensor of its own."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in given and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return result


@each_kind
@pytest.mark.parametrize("name", ["full", "topk", "hidden"])
def test_memory(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for backward: a few numbers per token. Made: nothing larger than a chunk, however many tokens there are."""
    tokens_in_all, width, rows = 96, 64, 4
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * rows * width * 4)
    monkeypatch.setattr(passes, "CPU_BLOCK_BYTES", rows * width * 4)
    shard = VocabShard.dense(width)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens_in_all, 2, generator=draw).requires_grad_()
    weight = torch.randn(width, 2, generator=draw).requires_grad_()
    teacher = torch.randn(tokens_in_all, 2, generator=draw)
    target: Target = HiddenTarget(teacher, weight.detach())
    if name != "hidden":
        logits = teacher @ weight.detach().t()
        target = LiveTarget(logits) if name == "full" else vocab_parallel_topk(logits.log_softmax(-1), 3, shard)
    tokens = torch.zeros(tokens_in_all, dtype=torch.int64)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with LargestTensor() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = fused_token_terms(hidden, weight, shard, tokens, kind, target)
        torch.stack(tuple(terms)).sum().backward()
    # Two chunks' rows of the student and a target that is made; K columns more where entries are left out.
    assert made.numel <= 2 * rows * (width + 1), made.numel
    assert max(tensor.numel() for tensor in saved if tensor is not hidden) <= tokens_in_all
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        saved.clear()
        logits = (hidden.detach() @ weight.detach().t()).requires_grad_()
        torch.stack(tuple(token_terms(logits, shard, tokens, kind, target))).sum().backward()
    assert max(tensor.numel() for tensor in saved if tensor.data_ptr() != logits.data_ptr()) <= tokens_in_all


def test_positions_that_are_not_asked_for_get_no_gradient() -> None:
    hidden = make(1, TOKENS, HIDDEN).requires_grad_()
    weight = make(2, PADDED, HIDDEN).requires_grad_()
    positions = torch.tensor([4, 1])
    terms = fused_token_terms(hidden, weight, SHARD, torch.tensor([3, 5]), positions=positions)
    expected = torch.log_softmax((hidden[positions] @ weight.t())[:, :VOCAB], dim=-1)[[0, 1], [3, 5]]
    FLOAT64.assert_close(terms.log_probs, expected)
    gradients = torch.autograd.grad(terms.log_probs.sum(), [hidden, weight])
    for left, right in zip(gradients, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        FLOAT64.assert_close(left, right)
    empty = fused_token_terms(hidden, weight, SHARD, torch.tensor([], dtype=torch.int64), positions=positions[:0])
    (gradient,) = torch.autograd.grad(empty.log_probs.sum(), hidden)
    assert empty.entropy.shape == (0,) and not gradient.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["policy", "target"])
def test_overflown_logits_are_refused(value: float, whose: str) -> None:
    logits, teacher = make(1, TOKENS, PADDED), make(2, TOKENS, PADDED)
    (logits if whose == "policy" else teacher)[4, 11] = value
    match = rf"the {whose}'s logits of token 4 hold NaN or \+inf.*columns: {value} at id 11"
    with pytest.raises(ErpdError, match=match):
        divergence("forward_kl", logits, LiveTarget(teacher), SHARD)


def test_a_row_without_a_finite_logit_is_refused() -> None:
    logits = make(1, TOKENS, PADDED)
    logits[2] = -torch.inf
    with pytest.raises(ErpdError, match="the policy's logits of token 2 hold .* nothing above -inf"):
        token_terms(logits, SHARD, make_tokens())
    hidden = torch.zeros(TOKENS, HIDDEN)
    hidden[5] = torch.nan
    with pytest.raises(ErpdError, match="the policy's logits of token 5"):
        fused_token_terms(hidden, torch.ones(PADDED, HIDDEN), SHARD, make_tokens())


def test_padding_may_hold_anything() -> None:
    logits = make(1, TOKENS, PADDED)
    logits[:, VOCAB:] = torch.nan
    teacher = logits.roll(1, 0).requires_grad_()
    terms = token_terms(logits.requires_grad_(), SHARD, make_tokens(), "js", LiveTarget(teacher))
    (gradient,) = torch.autograd.grad(terms.divergence.sum(), logits)
    assert gradient.isfinite().all() and not gradient[:, VOCAB:].any()


def test_targets_that_are_no_distribution_are_refused() -> None:
    logits, target = make(1, TOKENS, PADDED), make_target("topk")
    assert isinstance(target, TopKTarget)
    log_probs = target.log_probs.clone()
    log_probs[3] += 0.5
    with pytest.raises(
        ErpdError, match=r"the target of token 3 isn't a distribution: its 4 entries and its tail add up"
    ):
        divergence("js", logits, target._replace(log_probs=log_probs), SHARD)
    indices = target.indices.clone()
    indices[1, 2] = -1
    with pytest.raises(ErpdError, match="the target of token 1 gives mass to no token"):
        divergence("js", logits, target._replace(indices=indices), SHARD)
    half = TopKTarget(target.indices, target.log_probs.half(), target.tail_log_prob.half())
    divergence("js", logits, half, SHARD)  # as a cache may keep it


def test_shapes_and_settings_that_do_not_fit_are_refused() -> None:
    logits = make(1, TOKENS, PADDED)
    with pytest.raises(RecipeError, match="needs both its kind and its target"):
        token_terms(logits, SHARD, kind="js")
    with pytest.raises(RecipeError, match="temperature must be above 0, not 0"):
        token_terms(logits, SHARD, temperature=0.0)
    with pytest.raises(RecipeError, match="target's temperature must be above 0"):
        divergence("js", logits, LiveTarget(logits, -1.0), SHARD)
    with pytest.raises(RecipeError, match=r"tokens of shape \(5,\) don't fit 6 rows"):
        token_terms(logits, SHARD, make_tokens()[:5])
    with pytest.raises(RecipeError, match=r"target's weight of shape \(48, 4\)"):
        divergence("js", logits, HiddenTarget(make(3, TOKENS, HIDDEN), make(4, PADDED, 4)), SHARD)
    with pytest.raises(LayoutError, match="don't make logits of 48 columns"):
        fused_token_terms(make(3, TOKENS, HIDDEN), make(4, 40, HIDDEN), SHARD)


def test_a_chunk_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(
        LayoutError, match="doesn't fit into the 0 MiB left on cpu; set a smaller one with --head-chunk"
    ):
        fused_token_terms(make(3, TOKENS, HIDDEN), make(4, PADDED, HIDDEN), SHARD)
    with pytest.raises(LayoutError, match="a chunk of 0 bytes"):
        chunks.set_chunk_bytes(0)
