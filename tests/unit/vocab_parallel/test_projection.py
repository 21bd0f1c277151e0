"""The projection in one process, float64, against the dense bisection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_erpd.errors import ErpdError
from megatron_erpd.objectives.projection import solve_eta_bisection
from megatron_erpd.objectives.signal_law import NUM_BINS, NUM_MOMENTS
from megatron_erpd.vocab_parallel import (
    VocabShard,
    apply_eta,
    kl_from_base,
    project_shard,
    signal_law,
    token_chunks,
)
from megatron_erpd.vocab_parallel import shard as chunks
from tests.tolerances import FLOAT64, FP32, PROJECTION_KL, PROJECTION_KL_FP32, SIGNAL_LAW

VOCAB, PADDED = 37, 48
SHARD = VocabShard.dense(VOCAB, PADDED)


def make_inputs(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Base log-probs and a signal [4, 5, PADDED], with something in the padding that would show."""
    generator = torch.Generator().manual_seed(0)
    logits, signal = torch.randn(2, 4, 5, PADDED, generator=generator, dtype=torch.float64)
    base = torch.log_softmax(2.0 * logits[..., :VOCAB], dim=-1)
    signal[..., VOCAB:] = torch.nan
    return torch.nn.functional.pad(base, (0, PADDED - VOCAB), value=3.0), scale * signal


def kl(log_q: Tensor, base: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - base)).sum(-1)


@pytest.mark.parametrize("eta", [0.0, 0.4, "per token"])
def test_apply_eta(eta: float | str) -> None:
    base, signal = make_inputs()
    step = torch.linspace(0, 2, 20, dtype=torch.float64).reshape(4, 5) if isinstance(eta, str) else eta
    log_q = apply_eta(base, signal, step, SHARD)
    column = step.unsqueeze(-1) if isinstance(step, Tensor) else step
    weights = base[..., :VOCAB].exp() * (column * signal[..., :VOCAB]).exp()
    FLOAT64.assert_close(log_q[..., :VOCAB].exp(), weights / weights.sum(-1, keepdim=True))
    assert (log_q[..., VOCAB:] == -torch.inf).all()


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.5, 3.0])
@pytest.mark.parametrize("eta_max", [1.0, 4.0])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_project(delta: float, eta_max: float, scale: float) -> None:
    base, signal = make_inputs(scale)
    eta, log_q, divergence = project_shard(base, signal, SHARD, delta=delta, eta_max=eta_max)
    exact = solve_eta_bisection(base[..., :VOCAB], signal[..., :VOCAB], delta, eta_max)
    PROJECTION_KL.assert_close(eta, exact)
    SIGNAL_LAW.assert_close(log_q[..., :VOCAB].exp().sum(-1), torch.ones(4, 5, dtype=torch.float64))
    SIGNAL_LAW.assert_close(divergence, kl(log_q[..., :VOCAB], base[..., :VOCAB]))
    SIGNAL_LAW.assert_close(kl_from_base(log_q, base, SHARD), divergence)
    assert (divergence <= delta * (1 + PROJECTION_KL.rtol) + FLOAT64.atol).all()
    inside = eta < eta_max
    (PROJECTION_KL if delta else FLOAT64).assert_close(divergence[inside], torch.full_like(divergence[inside], delta))


def test_excluded_tokens_stay_excluded() -> None:
    base, signal = make_inputs()
    keep = torch.arange(PADDED) < 20
    base = torch.log_softmax(base.masked_fill(~keep, -torch.inf), dim=-1)
    broken = signal.masked_fill(~keep, torch.nan)
    smaller = VocabShard.dense(20)
    whole = project_shard(base, broken, SHARD, delta=0.3, eta_max=2.0)
    part = project_shard(base[..., :20], signal[..., :20], smaller, delta=0.3, eta_max=2.0)
    FLOAT64.assert_close(whole.eta, part.eta)
    FLOAT64.assert_close(whole.kl, part.kl)
    FLOAT64.assert_close(whole.log_probs[..., :20], part.log_probs)
    assert (whole.log_probs[..., 20:] == -torch.inf).all()


def test_unnormalised_base_and_large_signals_in_float32() -> None:
    base, signal = make_inputs(50.0)
    base32 = (base + 1e-3).half().float()
    eta, log_q, divergence = project_shard(base32, signal.float(), SHARD, delta=0.1, eta_max=1.0)
    assert eta.dtype == log_q.dtype == divergence.dtype == torch.float32
    FP32.assert_close(log_q[..., :VOCAB].exp().sum(-1), torch.ones(4, 5))
    normalised = torch.log_softmax(base32[..., :VOCAB], dim=-1)
    FP32.assert_close(divergence, kl(log_q[..., :VOCAB], normalised))
    PROJECTION_KL_FP32.assert_close(divergence, torch.full((4, 5), 0.1))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, signal = make_inputs()
    whole = project_shard(base, signal, SHARD, delta=0.3, eta_max=2.0)
    for budget in (1, 400_000):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
        for part, all_at_once in zip(project_shard(base, signal, SHARD, delta=0.3, eta_max=2.0), whole, strict=True):
            FLOAT64.assert_close(part, all_at_once)


def test_token_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    assert list(token_chunks(7, 30)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(token_chunks(2, 1000)) == [slice(0, 1), slice(1, 2)]
    assert list(token_chunks(0, 30)) == [slice(0, 0)]


def test_temporaries_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made on the way is of a chunk's size, the result and the moments apart."""
    tokens, width, budget = 96, 4096, 2**20
    monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
    base = torch.randn(tokens, width).log_softmax(-1)
    signal = torch.randn(tokens, width)
    shard = VocabShard.dense(width)
    with Allocations() as seen:
        project_shard(base, signal, shard, delta=0.1, eta_max=1.0)
    large = [size for size in seen.sizes if size > budget]
    result, moments = tokens * width * 4, tokens * NUM_MOMENTS * NUM_BINS * 8
    assert seen.sizes and set(large) <= {result, moments} and large.count(result) <= 2


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(item.untyped_storage().nbytes())
        return result


def test_no_tokens() -> None:
    base, signal = make_inputs()
    eta, log_q, divergence = project_shard(base[:, :0], signal[:, :0], SHARD, delta=0.3, eta_max=2.0)
    assert eta.shape == divergence.shape == (4, 0) and log_q.shape == (4, 0, PADDED)


def test_no_gradient() -> None:
    base, signal = make_inputs()
    result = project_shard(base.requires_grad_(), signal.requires_grad_(), SHARD, delta=0.1, eta_max=1.0)
    assert not any(tensor.requires_grad for tensor in result)


def test_errors() -> None:
    base, signal = make_inputs()
    with pytest.raises(ErpdError, match="eta_max must be a number above 0"):
        project_shard(base, signal, SHARD, delta=0.1, eta_max=0.0)
    with pytest.raises(ErpdError, match="delta"):
        project_shard(base, signal, SHARD, delta=-1.0, eta_max=1.0)
    with pytest.raises(ErpdError, match="NaN or infinity"):
        project_shard(base, torch.full_like(signal, torch.nan), SHARD, delta=0.1, eta_max=1.0)
    with pytest.raises(ErpdError, match="NaN or infinity"):
        signal_law(base[0], torch.full_like(signal[0], torch.inf), SHARD, eta_max=1.0)
