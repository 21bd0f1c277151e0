"""Targets are made for a chunk of tokens at a time: whatever the chunk, with a clip or not, as from whole rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch
from megatron_erpd.model.forward import HiddenStates
from megatron_erpd.model.projected_target import TrustRegion, live_target
from megatron_erpd.objectives.projection import project_per_token
from megatron_erpd.objectives.signals import combine, parse_signal
from megatron_erpd.precompute.scores import Scores, hidden_states, response_states
from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.vocab_parallel import VocabShard
from megatron_erpd.vocab_parallel import shard as chunks
from tests.batches import grid_batch
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


def states(logits: list[Tensor]) -> list[HiddenStates]:
    """Hidden states that an output layer of ones on its diagonal turns into these logits, bit for bit."""
    return [HiddenStates(x.flatten(0, 1), torch.eye(PADDED)) for x in logits]


def make_batch(mask: Tensor) -> Batch:
    return grid_batch(LABELS, mask)


LABELS = torch.arange(B * S).reshape(B, S)
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.float32)
TRAINED = MASK > 0


@pytest.mark.parametrize("clip", [None, 2.0])
def test_live_target(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, batch = make_logits(), make_batch(MASK)
    positions = batch.response_positions
    expected = dense(logits, clip).log_probs.flatten(0, 1)[positions]
    for budget in BUDGETS:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
        region = TrustRegion(("base", "teacher"), TERMS, 0.2, 1.0, clip)
        target = live_target(region, batch, positions, states(logits), SHARD)
        parts = list(chunks.token_chunks(target.num_tokens, target.bytes_per_token))
        for _ in range(2):  # forward, and backward from the steps that forward found
            rows = torch.cat([target.rows(part) for part in parts])
            assert rows.shape == (len(positions), PADDED) and bool((rows[:, VOCAB:] == -torch.inf).all())
            PROJECTION_KL_FP32.assert_close(rows.log_softmax(-1)[:, :VOCAB], expected)
    unclipped = dense(logits, None).log_probs.flatten(0, 1)[positions]
    assert torch.equal(unclipped, expected) == (clip is None)


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("eta", [None, 0.3])
def test_cached_target(clip: float | None, eta: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PrecomputeSettings(delta=0.2, projection_clip=clip, k=4)
    scores = Scores(settings, ["base", "teacher"], SHARD)
    scores.eta = eta
    logits, batch = make_logits(), make_batch(MASK)
    expected = dense(logits, clip)
    for budget in BUDGETS:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
        rows = scores.target(batch, states(logits)) | {"teacher": scores.log_probs(batch, states(logits)[1])}
        assert [len(row) for row in rows["indices"]] == [3, 3, 0]
        found = {name: torch.from_numpy(np.concatenate(values)) for name, values in rows.items()}
        assert found["indices"].shape == (6, 4)
        if eta is None:
            PROJECTION_KL_FP32.assert_close(found["eta"], expected.eta.T[TRAINED])
            PROJECTION_KL_FP32.assert_close(found["target_kl"], expected.kl.T[TRAINED])
            top = expected.log_probs.transpose(0, 1)[TRAINED].topk(4)
            assert torch.equal(found["indices"], top.indices)
            PROJECTION_KL_FP32.assert_close(found["log_probs"], top.values)
        else:
            assert torch.equal(found["eta"], torch.full((6,), eta))
        whole = logits[1][..., :VOCAB].log_softmax(-1).transpose(0, 1)
        picked = whole.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
        FP32.assert_close(found["teacher"], picked[TRAINED])


def test_base_rows_without_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    scores = Scores(PrecomputeSettings(signal="none", k=4), ["base"], SHARD)
    base = make_logits()[0]
    rows = scores.target(make_batch(torch.ones(B, S)), states([base]))
    expected = base[..., :VOCAB].log_softmax(-1).transpose(0, 1).topk(4).values
    FP32.assert_close(torch.from_numpy(np.stack(rows["log_probs"])), expected)
    assert not np.stack(rows["eta"]).any() and not np.stack(rows["target_kl"]).any()


def test_a_batch_of_fillers_has_no_rows() -> None:
    """Nor has a context-parallel rank any that holds no response token."""
    scores = Scores(PrecomputeSettings(k=4), ["base", "teacher"], SHARD)
    rows = scores.target(make_batch(torch.zeros(B, S)), states(make_logits()))
    rows["teacher"] = scores.log_probs(make_batch(torch.zeros(B, S)), states(make_logits())[1])
    assert all(len(row) == 0 for values in rows.values() for row in values)


def test_hidden_states_on_the_grid_and_off_it() -> None:
    batch, weight = make_batch(MASK), torch.zeros(VOCAB, 4)
    whole = torch.randn(B, S, 4)
    found = response_states(batch, HiddenStates(whole.transpose(0, 1).flatten(0, 1), weight))
    expected = [whole[b][MASK[b] > 0] for b in range(B)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = hidden_states(batch, found, weight)
    assert torch.equal(again.rows[batch.response_positions], whole.transpose(0, 1)[MASK.T > 0])
    assert not again.rows[MASK.T.flatten() == 0].any()
