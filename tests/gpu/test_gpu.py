"""What needs a CUDA device: the same results as on a CPU, and a stage on NCCL. `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_erpd.model.forward import HeadContext, PolicyHead, SequenceShard, loss_of
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.training.step import DistillStep, cached_target
from megatron_erpd.vocab_parallel import (
    HiddenTarget,
    LiveTarget,
    VocabShard,
    divergence,
    fused_token_terms,
    logits_of,
    passes,
    token_terms,
    triton_passes,
)
from megatron_erpd.vocab_parallel.passes import DivergenceGradient, RowGradient, Softmax, add_product
from tests.batches import grid_batch
from tests.tolerances import BF16, BF16_GRADIENT, BF16_LOSS, BF16_ROUNDING, FP32, FP32_PARALLEL, Tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, VOCAB = 64, 5003
FULL_VOCAB = 151_936


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_log_probs_and_gradient_are_those_of_the_cpu(dtype: torch.dtype, tolerance: object) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(TOKENS, VOCAB)).to(dtype)
    labels = torch.randint(VOCAB, (TOKENS,))
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        log_probs, entropy = token_terms(x, VocabShard.dense(VOCAB), labels.to(device))[:2]
        (log_probs.sum() + 0.1 * entropy.sum()).backward()
        assert x.grad is not None
        results.append((log_probs.detach().cpu(), entropy.detach().cpu(), x.grad.float().cpu()))
    for ours, reference in zip(results[1], results[0], strict=True):
        tolerance.assert_close(ours, reference)  # type: ignore[attr-defined]


def test_an_output_layer_in_bf16_is_that_of_the_cpu() -> None:
    """Products of bf16 operands in float32, with Triton's passes, and a weight gradient summed in float32 or bf16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, 256).bfloat16(), (torch.randn(VOCAB, 256) / 4).bfloat16()
    labels = torch.randint(VOCAB, (TOKENS,))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
        target = HiddenTarget(hidden.flip(0).to(device), weight.to(device))
        terms = fused_token_terms(*leaves, VocabShard.dense(VOCAB), labels.to(device), "reverse_kl", target)
        gradients = torch.autograd.grad(sum(x.sum() for x in terms), leaves)  # type: ignore[arg-type]
        on_logits = logits_of(hidden.to(device), weight.to(device)).bfloat16()
        totals = [torch.ones(VOCAB, 256, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)]
        for total in totals:
            add_product(total, on_logits, hidden.to(device))
        results.append([*terms, *gradients, *totals])
    tolerances = [FP32_PARALLEL] * 3 + [BF16_GRADIENT] * 4
    for ours, reference, tolerance in zip(results[1], results[0], tolerances, strict=True):
        assert ours.dtype == reference.dtype
        tolerance.assert_close(ours, reference)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_divergence_and_gradient_are_those_of_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(TOKENS, VOCAB)
    target = torch.randn(TOKENS, VOCAB).log_softmax(-1)
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        value = divergence(kind, x, LiveTarget(target.to(device)), VocabShard.dense(VOCAB))  # type: ignore[arg-type]
        value.sum().backward()
        assert x.grad is not None
        results.append((value.detach().cpu(), x.grad.cpu()))
    for ours, reference in zip(results[1], results[0], strict=True):
        FP32.assert_close(ours, reference)


@pytest.mark.parametrize("kind", [None, "forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_PARALLEL), (torch.bfloat16, BF16_ROUNDING)])
@pytest.mark.parametrize("columns", [FULL_VOCAB, FULL_VOCAB - 293])
def test_triton_passes_are_the_plain_passes(
    kind: DivergenceKind | None, dtype: torch.dtype, tolerance: Tolerance, columns: int
) -> None:
    torch.manual_seed(0)
    logits, target = (3 * torch.randn(2, TOKENS, FULL_VOCAB, device="cuda")).to(dtype)[..., :columns]
    excluded = torch.rand(TOKENS, columns, device="cuda").topk(64).indices
    for chosen in (None, excluded):
        arguments = (Softmax(logits, 1.3), Softmax(target, 0.9), kind, chosen, True)
        found, expected = triton_passes.statistics(*arguments), passes.statistics(*arguments)
        for index, name in enumerate("msuntc"):
            FP32_PARALLEL.assert_close(found[:, index], expected[:, index], name)
    m, s, _, n, t, _ = passes.statistics(Softmax(logits, 1.3), Softmax(target, 0.9)).unbind(-1)
    both = policy, other = Softmax(logits, 1.3, (m, s.log())), Softmax(target, 0.9, (n, t.log()))
    FP32_PARALLEL.assert_close(triton_passes.js_terms(*both), passes.js_terms(*both))

    constant, slope, on_token, weight = torch.randn(4, TOKENS, device="cuda")
    tokens = torch.randint(columns, (TOKENS,), device="cuda")
    rows = RowGradient(constant, slope, tokens, on_token)
    divergence = None if kind is None else DivergenceGradient(kind, weight, other)
    wanted = torch.empty_like(logits)
    passes.gradient(wanted, policy, rows, divergence)
    triton_passes.gradient(logits, policy, rows, divergence)
    tolerance.assert_close(logits, wanted)


def test_triton_passes_beyond_2_to_the_31_entries() -> None:
    num_rows = 2**31 // FULL_VOCAB + 2
    logits = torch.ones(num_rows, FULL_VOCAB, dtype=torch.bfloat16, device="cuda")
    logits[-1].normal_()
    last = logits[-1:].clone()
    found = triton_passes.statistics(Softmax(logits))
    FP32_PARALLEL.assert_close(found[-1:], passes.statistics(Softmax(last)))
    m, s = found[:, :2].unbind(-1)
    constant = torch.zeros_like(m)
    constant[-1] = 1e3
    rows = RowGradient(constant, None, torch.full_like(m, -1, dtype=torch.int64), torch.zeros_like(m))
    of_last = RowGradient(*(None if x is None else x[-1:] for x in rows))
    passes.gradient(last, Softmax(last, 1.0, (m[-1:], s[-1:].log())), of_last)
    triton_passes.gradient(logits, Softmax(logits, 1.0, (m, s.log())), rows)
    BF16_ROUNDING.assert_close(logits[-1:], last)
    assert not logits[:-1].any()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_our_part_of_a_step_waits_for_nothing(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hidden states to their gradient, towards a cached target; CUDA raises at a copy to the host."""
    monkeypatch.setenv("ERPD_KERNELS", kernels)
    torch.manual_seed(0)
    hidden = torch.randn(16, 4, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, 256, device="cuda") / 4).bfloat16().requires_grad_()
    labels, mask = torch.randint(VOCAB, (4, 16)), torch.ones(4, 16)
    mask[:, :3] = 0
    top = torch.randn(4, 16, VOCAB).log_softmax(-1).topk(8)
    rows = {
        "topk_scores": top.values,
        "topk_ids_low": top.indices.short(),
        "log_normalizer": torch.zeros(4, 16),
        "tail_log_prob": torch.log1p(-top.values.exp().sum(-1)),
    }
    old = {"old_log_probs": torch.zeros(4, 16)}
    batch = grid_batch(labels, mask, token_rows=old, target_rows=rows).to("cuda")
    step = DistillStep(kind="reverse_kl", target=cached_target, vocab_size=VOCAB)
    head = PolicyHead(VocabShard.dense(VOCAB), step.kind, step.target)
    layer = SimpleNamespace(
        tp_group=None, sequence_parallel=False, gradient_accumulation_fusion=False, _forward_pre_hooks={}
    )
    for mode in ("default", "error"):  # the first compiles the kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            context = HeadContext(batch=batch, checks=step.checks, outputs=[])
            output = head(hidden_states=hidden, output_layer=layer, output_weight=weight, context=context)
            loss, _, _ = loss_of(step.loss_and_metrics, batch, step.checks, output, SequenceShard())
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.checks.first() is None


def test_a_round_on_nccl(tmp_path: Path) -> None:
    """Import, log-probs, replay and projection on one device; a stage each, as a user would call them."""
    from megatron_erpd.commands.import_checkpoint import import_checkpoint
    from megatron_erpd.commands.precompute import precompute
    from megatron_erpd.commands.train import distill, train_teacher
    from tests.integration.tiny import write_model, write_random_rollouts

    write_model(tmp_path / "hf")
    rollouts = write_random_rollouts(tmp_path / "rollouts.parquet")
    import_checkpoint(["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"])
    data = ["--base", f"{tmp_path}/base", "--rollouts", str(rollouts)]
    precompute([*data, "--kind", "token", "--output", f"{tmp_path}/log-probs"])
    train = [*data, "--base-log-probs", f"{tmp_path}/log-probs", "--global-batch-size", "16", "--micro-batch-size", "8"]
    train_teacher([*train, "--loss", "ce", "--epochs", "4", "--output", f"{tmp_path}/teacher"])
    teacher = ["--policy", f"teacher={tmp_path}/teacher"]
    precompute([*data, *teacher, "--k", "8", "--delta", "0.01", "--output", f"{tmp_path}/cache"])
    distill([*train, "--cache", f"{tmp_path}/cache", "--epochs", "8", "--output", f"{tmp_path}/student"])
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["stage2/reverse_kl"] < rows[0]["stage2/reverse_kl"]


def test_packs_on_a_device_give_what_padded_batches_do(tmp_path: Path) -> None:
    """Losses and gradient norms of a replay, with Transformer Engine's attention where it is installed."""
    from megatron_erpd.commands.import_checkpoint import import_checkpoint
    from megatron_erpd.commands.train import train_teacher
    from tests.integration.tiny import write_model, write_random_rollouts

    write_model(tmp_path / "hf")
    rollouts = write_random_rollouts(tmp_path / "rollouts.parquet")
    import_checkpoint(["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"])
    train = ["--base", f"{tmp_path}/base", "--rollouts", str(rollouts), "--loss", "sft", "--epochs", "0.8"]
    train += ["--global-batch-size", "16", "--precision", "bf16"]
    found = []
    for flag, size in (("--micro-batch-size", "8"), ("--micro-batch-tokens", "64")):
        train_teacher([*train, flag, size, "--output", f"{tmp_path}/{flag}"])
        lines = (tmp_path / flag / "metrics.jsonl").read_text().splitlines()
        found.append([[row["stage1/loss"], row["grad-norm"]] for row in map(json.loads, lines)])
    BF16_LOSS.assert_close(found[1], found[0])
