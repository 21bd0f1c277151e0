"""Targets are made for a chunk of tokens at a time: whatever the chunk, with a clip or not, as from whole rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.objectives.projection import project_per_token
from megatron_erpd.objectives.signals import combine, parse_signal
from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.training import distill_step, model, precompute
from megatron_erpd.vocab_parallel import VocabShard, chunks
from tests.tolerances import FP32, PROJECTION_KL_FP32

S, B, VOCAB, PADDED = 5, 3, 30, 32
SHARD = VocabShard.dense(VOCAB, PADDED)
TERMS = parse_signal("strong")
BUDGETS = (1, 9_000, chunks.CHUNK_BYTES)


def make_logits() -> list[Tensor]:
    """base, teacher: [s, b, v]."""
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(S, B, PADDED, generator=generator) for _ in range(2)]


def dense(logits: list[Tensor], clip: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """eta, log q and the KL, [s, b, ...], on whole rows in float64."""
    base, teacher = (x[..., :VOCAB].double().log_softmax(-1) for x in logits)
    signal = combine(TERMS, {"base": base, "teacher": teacher})
    return project_per_token(base, signal if clip is None else signal.clamp(-clip, clip), 0.2, 1.0)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_live_target(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    logits: Any = make_logits()
    expected = dense(logits, clip).log_probs.transpose(0, 1)
    for budget in BUDGETS:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
        target = distill_step.live_target(["base", "teacher"], TERMS, 0.2, 1.0, clip, Any, logits, SHARD)
        assert target.log_probs.shape == (B, S, PADDED) and bool((target.log_probs[..., VOCAB:] == -torch.inf).all())
        PROJECTION_KL_FP32.assert_close(target.log_probs[..., :VOCAB], expected)
    unclipped = dense(logits, None).log_probs.transpose(0, 1)
    assert torch.equal(unclipped, expected) == (clip is None)


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("eta", [None, 0.3])
def test_cached_target(clip: float | None, eta: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "vocab_shard", lambda *_: SHARD)
    monkeypatch.setattr(model, "unwrap", lambda _: SimpleNamespace(post_process=True))
    settings = PrecomputeSettings(delta=0.2, projection_clip=clip, k=4)
    scores = precompute.Scores(settings, ["base", "teacher"], None, VOCAB)
    scores.eta = eta
    logits = make_logits()
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.float32)
    batch: Any = SimpleNamespace(loss_mask=mask, labels=torch.arange(S * B).reshape(B, S))
    monkeypatch.setattr(precompute, "_unflatten", lambda values, _: values)
    trained = mask.T > 0
    expected = dense(logits, clip)
    for budget in BUDGETS:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
        target: Any = scores.target(batch, logits)
        assert target["topk_indices"].shape == (6, 4)
        if eta is None:
            PROJECTION_KL_FP32.assert_close(target["eta"], expected.eta[trained])
            PROJECTION_KL_FP32.assert_close(target["target_kl"], expected.kl[trained])
            top = expected.log_probs[trained].topk(4)
            assert torch.equal(target["topk_indices"], top.indices)
            PROJECTION_KL_FP32.assert_close(target["topk_log_probs"], top.values)
        else:
            assert torch.equal(target["eta"], torch.full((6,), eta))
        log_probs = scores.log_probs(batch, logits)
        whole = logits[1][..., :VOCAB].log_softmax(-1).transpose(0, 1)
        FP32.assert_close(log_probs["teacher"], whole.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1))


def test_base_rows_without_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "vocab_shard", lambda *_: SHARD)
    monkeypatch.setattr(model, "unwrap", lambda _: SimpleNamespace(post_process=True))
    monkeypatch.setattr(precompute, "_unflatten", lambda values, _: values)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    scores = precompute.Scores(PrecomputeSettings(signal="none", k=4), ["base"], None, VOCAB)
    base = make_logits()[0]
    target: Any = scores.target(SimpleNamespace(loss_mask=torch.ones(B, S)), [base])  # type: ignore[arg-type]
    FP32.assert_close(target["topk_log_probs"], base[..., :VOCAB].log_softmax(-1).flatten(0, 1).topk(4).values)
    assert not target["eta"].any() and not target["target_kl"].any()


def test_a_batch_of_fillers_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "vocab_shard", lambda *_: SHARD)
    monkeypatch.setattr(model, "unwrap", lambda _: SimpleNamespace(post_process=True))
    monkeypatch.setattr(precompute, "_unflatten", lambda values, _: values)
    scores = precompute.Scores(PrecomputeSettings(k=4), ["base", "teacher"], None, VOCAB)
    batch: Any = SimpleNamespace(loss_mask=torch.zeros(B, S))
    assert len(scores.target(batch, make_logits())["eta"]) == 0
