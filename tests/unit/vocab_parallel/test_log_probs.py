"""Log-probs and entropies in one process, float64, against torch's dense functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError, LayoutError
from megatron_erpd.vocab_parallel import (
    IGNORED_TOKEN,
    VocabShard,
    gather_log_probs,
    token_terms,
    vocab_parallel_log_softmax,
)
from tests.tolerances import BF16, FLOAT64, FP32

VOCAB, PADDED = 37, 48
SHARD = VocabShard.dense(VOCAB, PADDED)


def make_logits(dtype: torch.dtype = torch.float64, padding: float = 1e4, scale: float = 3.0) -> Tensor:
    """[2, 5, PADDED] with something in the padding that would show."""
    logits = torch.randn(2, 5, PADDED, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    logits[..., VOCAB:] = padding
    return logits.to(dtype).requires_grad_()


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    return token_terms(logits, SHARD, tokens, temperature=temperature, with_entropy=False).log_probs


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return token_terms(logits, SHARD, temperature=temperature).entropy


def make_tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("padding", [0.0, 1e4, -torch.inf, torch.inf, torch.nan])
def test_log_softmax(temperature: float, padding: float) -> None:
    logits = make_logits(padding=padding)
    result = vocab_parallel_log_softmax(logits, SHARD, temperature)
    FLOAT64.assert_close(result[..., :VOCAB], torch.log_softmax(logits[..., :VOCAB] / temperature, dim=-1))
    assert (result[..., VOCAB:] == -torch.inf).all() and not result.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_and_entropy(temperature: float) -> None:
    logits, tokens = make_logits(), make_tokens()
    log_probs, entropies = token_terms(logits, SHARD, tokens, temperature=temperature)[:2]
    dense = logits.detach()[..., :VOCAB].clone().requires_grad_()
    distribution = torch.distributions.Categorical(logits=dense / temperature)
    FLOAT64.assert_close(log_probs, distribution.log_prob(tokens))
    FLOAT64.assert_close(entropies, distribution.entropy())
    first, second = torch.randn(2, 2, 5, dtype=torch.float64)
    (first * log_probs + second * entropies).sum().backward()
    (first * distribution.log_prob(tokens) + second * distribution.entropy()).sum().backward()
    assert logits.grad is not None and dense.grad is not None
    FLOAT64.assert_close(logits.grad[..., :VOCAB], dense.grad)
    assert (logits.grad[..., VOCAB:] == 0).all()
    FLOAT64.assert_close(token_log_probs(logits, tokens, temperature), log_probs)
    FLOAT64.assert_close(entropy(logits, temperature), entropies)


def test_gradcheck() -> None:
    logits, tokens = make_logits(), make_tokens()
    tokens[0, 1] = IGNORED_TOKEN
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, tokens, 1.3), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(x, 0.8), logits)


def test_ignored_tokens_touch_nothing() -> None:
    logits, tokens = make_logits(), make_tokens()
    tokens[0] = IGNORED_TOKEN
    log_probs = token_log_probs(logits, tokens)
    assert (log_probs[0] == 0).all()
    log_probs.sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0] == 0).all() and (logits.grad[1, :, :VOCAB] != 0).all()


@pytest.mark.parametrize("token", [VOCAB, PADDED - 1, PADDED, -1])
def test_token_outside_the_vocabulary_is_refused(token: int) -> None:
    tokens = make_tokens()
    tokens[1, 2] = token
    with pytest.raises(ErpdError, match=rf"tokens\[7\] is {token}; the vocabulary has ids 0 to {VOCAB - 1}"):
        token_log_probs(make_logits(), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    logits, tokens = make_logits(dtype), make_tokens()
    log_probs, entropies = token_terms(logits, SHARD, tokens)[:2]
    assert log_probs.dtype == entropies.dtype == torch.float32
    exact = torch.log_softmax(logits.detach()[..., :VOCAB].double(), dim=-1)
    FP32.assert_close(log_probs.double(), exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
    FP32.assert_close(entropies.double(), -(exact.exp() * exact).sum(-1))
    log_probs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    expected = torch.nn.functional.one_hot(tokens, VOCAB) - exact.exp()
    (FP32 if dtype == torch.float32 else BF16).assert_close(logits.grad[..., :VOCAB], expected)


def test_extreme_logits() -> None:
    logits = torch.full((3, PADDED), -1e4)
    logits[:, 5] = 1e4
    logits[1, 6] = 1e4
    logits[2, :5] = -torch.inf
    logits.requires_grad_()
    log_probs, entropies = token_terms(logits, SHARD, torch.tensor([5, 6, 7]))[:2]
    FP32.assert_close(log_probs, torch.tensor([0.0, -torch.tensor(2.0).log().item(), -2e4]))
    FP32.assert_close(entropies, torch.tensor([0.0, torch.tensor(2.0).log().item(), 0.0]))
    (log_probs + entropies).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    FP32.assert_close(logits.grad.sum(-1), torch.zeros(3))


def test_large_logits_lose_no_digits() -> None:
    """At logits of 1e4 a float32 logsumexp is wrong by up to 5e-4; the functions must not go through one."""
    logits = (1e4 + torch.arange(PADDED) / 16.0).unsqueeze(0).requires_grad_()
    exact = torch.log_softmax(logits.detach()[..., :VOCAB].double(), dim=-1)
    FP32.assert_close(vocab_parallel_log_softmax(logits, SHARD)[..., :VOCAB].double(), exact)
    token_log_probs(logits, torch.tensor([3])).sum().backward()
    assert logits.grad is not None
    expected = torch.nn.functional.one_hot(torch.tensor([3]), VOCAB) - exact.exp()
    FP32.assert_close(logits.grad[..., :VOCAB].double(), expected)


def test_impossible_token_under_a_mask() -> None:
    """A masked token may have log-probability -inf; its gradient is zero, not NaN."""
    logits = torch.zeros(2, PADDED)
    logits[0, 4] = -torch.inf
    logits.requires_grad_()
    log_probs = token_log_probs(logits, torch.tensor([4, 4]))
    assert log_probs[0] == -torch.inf
    torch.where(torch.tensor([False, True]), log_probs, 0.0).sum().backward()
    assert logits.grad is not None and (logits.grad[0] == 0).all() and logits.grad.isfinite().all()


def test_transposed_logits() -> None:
    """Megatron's logits are [s, b, v/tp]; a transposed view must do."""
    logits, tokens = make_logits(), make_tokens()
    direct = token_log_probs(logits, tokens)
    view = token_log_probs(logits.transpose(0, 1), tokens.transpose(0, 1))
    FLOAT64.assert_close(view.transpose(0, 1), direct)


def test_gather_drops_padding() -> None:
    logits = make_logits()
    gathered = gather_log_probs(logits, SHARD)
    assert gathered.shape == (2, 5, VOCAB)
    weights = torch.randn_like(gathered)
    (gathered * weights).sum().backward()
    assert logits.grad is not None
    FLOAT64.assert_close(logits.grad[..., :VOCAB], weights)
    assert (logits.grad[..., VOCAB:] == 0).all()


def test_shard_errors() -> None:
    with pytest.raises(LayoutError, match="isn't the range of rank 0"):
        VocabShard(4, 8, 8)
    with pytest.raises(LayoutError, match="don't cover a vocabulary of 40"):
        VocabShard.dense(40, 37)
    with pytest.raises(LayoutError, match="have 37 columns"):
        entropy(torch.zeros(2, 37))
