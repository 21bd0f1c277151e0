"""The output layer in bf16: logits, and all that is made of them, are those of float32 products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.model.forward import HiddenStates
from megatron_erpd.precompute.scores import Scores
from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.vocab_parallel import HiddenTarget, OutputLayer, VocabShard, fused_token_terms, output_logits
from megatron_erpd.vocab_parallel import shard as chunks
from megatron_erpd.vocab_parallel.passes import add_product, hidden_gradient, logits_of
from tests.batches import grid_batch
from tests.tolerances import BF16_GRADIENT, BF16_ROUNDING, FP32, VOCAB_PARALLEL
from tests.unit.vocab_parallel.oracles import policy_probs, probs_divergence

VOCAB, HIDDEN, TOKENS = 500, 64, 24
SHARD = VocabShard.dense(VOCAB)
KINDS = ("forward_kl", "reverse_kl", "js")


def make(seed: int, *shape: int) -> Tensor:
    """bf16; logits of two of them have a standard deviation of 4 and a maximum of about 16."""
    scale = 4 / HIDDEN**0.5 if shape[0] == VOCAB else 1.0
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last of them smaller."""
    monkeypatch.setattr(chunks, "CPU_CACHE_BYTES", 128 * HIDDEN * 4)


@pytest.mark.usefixtures("small_blocks")
def test_products_of_16_bits_are_summed_in_float32() -> None:
    rows, weight, on_logits = make(1, TOKENS, HIDDEN), make(2, VOCAB, HIDDEN), make(3, TOKENS, VOCAB)
    logits = logits_of(rows, weight)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    VOCAB_PARALLEL.assert_close(logits, rows.double() @ weight.double().t())
    on_hidden = hidden_gradient(on_logits, weight)
    assert on_hidden.dtype == torch.bfloat16
    BF16_ROUNDING.assert_close(on_hidden, (on_logits.double() @ weight.double()).bfloat16())
    product = on_logits.double().t() @ rows.double()
    for dtype, tolerance in ((torch.float32, VOCAB_PARALLEL), (torch.bfloat16, BF16_GRADIENT)):
        total = torch.ones(VOCAB, HIDDEN, dtype=dtype)
        add_product(total, on_logits, rows)
        add_product(total, on_logits, rows)
        assert total.dtype == dtype
        tolerance.assert_close(total, 1 + 2 * product)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_float32_are_the_plain_ones(dtype: torch.dtype) -> None:
    rows, weight, on_logits = (
        x.to(dtype) for x in (make(1, TOKENS, HIDDEN), make(2, VOCAB, HIDDEN), make(3, TOKENS, VOCAB))
    )
    assert torch.equal(logits_of(rows, weight), rows @ weight.t())
    assert torch.equal(hidden_gradient(on_logits, weight), on_logits @ weight)
    total = torch.ones(VOCAB, HIDDEN, dtype=dtype)
    add_product(total, on_logits, rows)
    assert torch.equal(total, torch.ones(VOCAB, HIDDEN, dtype=dtype).addmm_(on_logits.t(), rows))


def dense(kind: str, tokens: Tensor) -> list[Tensor]:
    """Log-prob, entropy, divergence and the gradients of their sum, in float64 from the same bf16 numbers."""
    hidden = make(1, TOKENS, HIDDEN).double().requires_grad_()
    weight = make(2, VOCAB, HIDDEN).double().requires_grad_()
    p = policy_probs(hidden @ weight.t())
    q = policy_probs(make(4, TOKENS, HIDDEN).double() @ make(5, VOCAB, HIDDEN).double().t())
    terms = [p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log(), -(p * p.log()).sum(-1), probs_divergence(kind, q, p)]
    return [*terms, *torch.autograd.grad(sum(x.sum() for x in terms), [hidden, weight])]


@pytest.mark.parametrize("kind", KINDS)
def test_terms_in_bf16(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to bf16 these logits put errors of .01 on every log-prob."""
    tokens = torch.arange(TOKENS)
    expected = dense(kind, tokens)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5 * VOCAB * 6)
    hidden, weight = make(1, TOKENS, HIDDEN).requires_grad_(), make(2, VOCAB, HIDDEN).requires_grad_()
    target = HiddenTarget(make(4, TOKENS, HIDDEN), make(5, VOCAB, HIDDEN))
    terms = fused_token_terms(hidden, weight, SHARD, tokens, kind, target)
    for actual, value in zip(terms, expected, strict=False):
        assert actual.dtype == torch.float32
        FP32.assert_close(actual, value)
    gradients = torch.autograd.grad(sum(x.sum() for x in terms), [hidden, weight])  # type: ignore[arg-type]
    for gradient, value in zip(gradients, expected[3:], strict=True):
        BF16_GRADIENT.assert_close(gradient, value)
        assert torch.cosine_similarity(gradient.double().flatten(), value.flatten(), dim=0) > 0.9999


def test_log_probs_are_as_good_as_float32_allows() -> None:
    """At most 1.1 times the error of log-probs from a whole float32 product, and far from that of bf16 logits."""
    hidden, weight, tokens = make(1, TOKENS, HIDDEN), make(2, VOCAB, HIDDEN), torch.arange(TOKENS)

    def error(log_probs: Tensor) -> float:
        return float((log_probs.detach().double() - dense("js", tokens)[0].detach()).abs().mean())

    def of_logits(logits: Tensor) -> Tensor:
        return logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    ours = error(fused_token_terms(hidden, weight, SHARD, tokens).log_probs)
    float32 = error(of_logits(hidden.float() @ weight.float().t()).float())
    bf16 = error(of_logits(hidden @ weight.t()))
    # What float32 itself rounds away of a log-prob of -10 is the smallest error that can be told from none.
    assert ours <= 1.1 * float32 + 1e-6
    assert bf16 > 1000 * ours


def test_logits_that_exist() -> None:
    """Of a gathered target: float32, with gradients into hidden states and weight."""
    hidden, weight = make(1, TOKENS, HIDDEN).requires_grad_(), make(2, VOCAB, HIDDEN).requires_grad_()
    positions, upstream = torch.tensor([3, 0, 7]), make(6, 3, VOCAB).float()
    logits = output_logits(hidden, weight, positions, OutputLayer())
    assert torch.equal(logits, logits_of(hidden.detach()[positions], weight))
    actual = torch.autograd.grad(logits, [hidden, weight], upstream)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(wide[0][positions] @ wide[1].t(), wide, upstream.double())
    for gradient, value in zip(actual, expected, strict=True):
        BF16_GRADIENT.assert_close(gradient, value)


def test_precompute() -> None:
    """The log-probs of a teacher cache, from bf16 hidden states."""
    hidden, weight = make(1, TOKENS, HIDDEN), make(2, VOCAB, HIDDEN)
    labels = torch.arange(TOKENS).view(1, -1)
    batch = grid_batch(labels, torch.ones(1, TOKENS))
    scores = Scores(PrecomputeSettings(), ["base"], SHARD)
    (found,) = scores.log_probs(batch, HiddenStates(hidden, weight))
    FP32.assert_close(torch.from_numpy(found), dense("js", labels[0])[0])
