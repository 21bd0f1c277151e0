"""The output layer fused with what is computed of its logits, on one, two and four ranks.

Against a dense float64 computation that shares no code with it: values, the gradient of the hidden states and the
gradient of each rank's rows of the output weight, where a factor of the tensor-parallel size would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_erpd.vocab_parallel import (
    IGNORED_TOKEN,
    HiddenTarget,
    LiveTarget,
    OutputLayer,
    Target,
    VocabShard,
    fused_token_terms,
    token_terms,
    vocab_parallel_topk,
)
from megatron_erpd.vocab_parallel import shard as chunks
from tests.distributed.harness import Case, run_cases
from tests.distributed.test_vocab_parallel import CountCollectives
from tests.tolerances import BF16_GRADIENT, VOCAB_PARALLEL, VOCAB_PARALLEL_FLOAT64
from tests.unit.vocab_parallel.oracles import buckets, policy_probs, probs_divergence

KINDS = ("forward_kl", "reverse_kl", "js")
TARGETS = ("full", "topk", "hidden")
VOCABULARIES = [(40, 40), (37, 48), (31, 64)]
TOKENS, HIDDEN, K = (4, 3), 8, 5
TEMPERATURE, TEACHER_TEMPERATURE = 1.3, 0.8
POSITIONS = torch.tensor([7, 0, 3, 11, 4])
WEIGHTS = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.25], dtype=torch.float64)


class Problem:
    """One batch: hidden states and output weights of student and teacher, whole; float64 that `dtype` holds exactly."""

    def __init__(self, vocab_size: int, padded: int, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(11)
        self.vocab_size, self.padded = vocab_size, padded
        self.hidden = torch.randn(*TOKENS, HIDDEN, generator=draw).to(dtype).double()
        self.weight = torch.randn(padded, HIDDEN, generator=draw).to(dtype).double() / 2
        self.teacher_hidden = torch.randn(len(POSITIONS), HIDDEN, generator=draw).to(dtype).double()
        self.teacher_weight = torch.randn(padded, HIDDEN, generator=draw).to(dtype).double() / 2
        self.tokens = torch.randint(0, vocab_size, (len(POSITIONS),), generator=draw)
        self.tokens[0], self.tokens[1] = vocab_size - 1, IGNORED_TOKEN

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.t()

    def target(self, name: str, shard: VocabShard, dtype: torch.dtype) -> Target:
        rows = slice(shard.start, shard.end)
        if name == "hidden":
            weight = self.teacher_weight[rows].to(dtype)
            return HiddenTarget(self.teacher_hidden.to(dtype), weight, TEACHER_TEMPERATURE)
        logits = self.teacher_logits[:, rows].to(dtype)
        if name == "full":
            return LiveTarget(logits, TEACHER_TEMPERATURE)
        whole = torch.log_softmax(self.teacher_logits[:, : self.vocab_size] / TEACHER_TEMPERATURE, dim=-1)
        return vocab_parallel_topk(whole.to(dtype), K, VocabShard.dense(self.vocab_size))

    def expected(self, kind: str, target: str) -> list[Tensor]:
        """Log-probs, entropy, divergence, and the gradients of hidden states and weight."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        logits = (hidden.flatten(0, 1)[POSITIONS] @ weight.t())[:, : self.vocab_size]
        p = policy_probs(logits, TEMPERATURE)
        picked = p.gather(-1, self.tokens.clamp_min(0).unsqueeze(-1)).squeeze(-1).log()
        log_probs = picked.masked_fill(self.tokens == IGNORED_TOKEN, 0.0)
        entropy = -(p * p.log()).sum(-1)
        q = policy_probs(self.teacher_logits[:, : self.vocab_size], TEACHER_TEMPERATURE)
        if target == "topk":
            indices = q.topk(K).indices
            divergence = probs_divergence(kind, buckets(q, indices), buckets(p, indices))
        else:
            divergence = probs_divergence(kind, q, p)
        loss = total_loss([log_probs, entropy, divergence])
        return [log_probs, entropy, divergence, *torch.autograd.grad(loss, [hidden, weight])]


def total_loss(terms: Any) -> Tensor:
    """A sum in which every term and token has a weight of its own."""
    factors = (1.0, -0.3, 2.0)
    return torch.stack([f * (x * WEIGHTS.to(x.dtype)).sum() for f, x in zip(factors, terms, strict=True)]).sum()


def run_fused(problem: Problem, kind: Any, target: str, dtype: torch.dtype, sequence_parallel: bool) -> list[Tensor]:
    """As `Problem.expected`, from this rank's part."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    shard = VocabShard.of_rank(problem.vocab_size, problem.padded, group)
    hidden = problem.hidden.to(dtype)
    if sequence_parallel:
        hidden = hidden.chunk(dist.get_world_size())[dist.get_rank()]
    hidden = hidden.clone().requires_grad_()
    weight = problem.weight[shard.start : shard.end].to(dtype).requires_grad_()
    terms = fused_token_terms(
        hidden,
        weight,
        shard,
        problem.tokens,
        kind=kind,
        target=problem.target(target, shard, dtype),
        temperature=TEMPERATURE,
        positions=POSITIONS,
        layer=OutputLayer(group, sequence_parallel),
    )
    return [*terms, *torch.autograd.grad(total_loss(terms), [hidden, weight])]


def whole(part: Tensor) -> Tensor:
    """The parts of all ranks, one after another."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def check_fused(rank: int, world_size: int, vocab_size: int, padded: int, sequence_parallel: bool) -> None:
    problem = Problem(vocab_size, padded)
    chunks.CHUNK_BYTES = 1000  # a token or two at a time
    for dtype, tolerance in ((torch.float64, VOCAB_PARALLEL_FLOAT64), (torch.float32, VOCAB_PARALLEL)):
        for kind in KINDS:
            for target in TARGETS:
                actual = run_fused(problem, kind, target, dtype, sequence_parallel)
                expected = problem.expected(kind, target)
                # Errors are measured against the whole tensor's scale, so the ranks' parts are put together.
                actual[4] = whole(actual[4])
                actual[3] = whole(actual[3]) if sequence_parallel else actual[3]
                for name, left, right in zip(("lp", "H", "D", "hidden", "weight"), actual, expected, strict=True):
                    assert left.dtype == dtype
                    tolerance.assert_close(left, right, f"{name}: {kind} {target} {dtype}")


def check_bf16(rank: int, world_size: int, sequence_parallel: bool) -> None:
    """bf16 hidden states and weights: the values are those of float32 logits, on every rank the same bits; gradients
    are rounded to bf16 with the logits' gradient, and once more where they are returned and summed."""
    problem = Problem(37, 48, torch.bfloat16)
    chunks.CHUNK_BYTES = 1000
    for kind in KINDS:
        actual = run_fused(problem, kind, "hidden", torch.bfloat16, sequence_parallel)
        expected = problem.expected(kind, "hidden")
        for name, left, right in zip(("lp", "H", "D"), actual[:3], expected[:3], strict=True):
            assert left.dtype == torch.float32
            VOCAB_PARALLEL.assert_close(left, right, f"{name}: {kind}")
            if world_size > 1:
                parts = whole(left.detach().unsqueeze(0))
                assert all(torch.equal(part, parts[0]) for part in parts)
        actual[4] = whole(actual[4])
        actual[3] = whole(actual[3]) if sequence_parallel else actual[3]
        for name, left, right in zip(("hidden", "weight"), actual[3:], expected[3:], strict=True):
            assert left.dtype == torch.bfloat16
            BF16_GRADIENT.assert_close(left, right, f"{name}: {kind}")
            cosine = torch.cosine_similarity(left.double().flatten(), right.flatten(), dim=0)
            assert cosine > 0.9999, f"{name}: {kind}: {float(cosine)}"


def check_ratio_to_cross_entropy(rank: int, world_size: int) -> None:
    """|gradient of a divergence| / |gradient of the cross entropy| is a number that the layout can't change."""
    problem = Problem(37, 48)
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(37, 48, group)
    weight = problem.weight[shard.start : shard.end].clone()
    for kind in KINDS:
        norms = []
        for which in (0, 2):
            hidden = problem.hidden.clone().requires_grad_()
            terms = fused_token_terms(
                hidden,
                weight,
                shard,
                problem.tokens,
                kind,
                problem.target("full", shard, torch.float64),
                1.0,
                False,
                POSITIONS,
            )
            (gradient,) = torch.autograd.grad(terms[which].sum(), hidden)
            norms.append(gradient.norm())
        dense = problem.hidden.clone().requires_grad_()
        p = policy_probs((dense.flatten(0, 1)[POSITIONS] @ problem.weight.t())[:, :37])
        known = problem.tokens >= 0
        cross_entropy = p[known].gather(-1, problem.tokens[known].unsqueeze(-1)).log().sum()
        q = policy_probs(problem.teacher_logits[:, :37], TEACHER_TEMPERATURE)
        (of_ce,) = torch.autograd.grad(cross_entropy, dense, retain_graph=True)
        (of_kl,) = torch.autograd.grad(probs_divergence(kind, q, p).sum(), dense)
        VOCAB_PARALLEL_FLOAT64.assert_close(norms[1] / norms[0], of_kl.norm() / of_ce.norm(), kind)


def check_main_grad(rank: int, world_size: int) -> None:
    """The weight's gradient is added to `main_grad`, twice for two micro-batches, and autograd is told so."""
    problem = Problem(37, 48)
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(37, 48, group)
    weight = torch.nn.Parameter(problem.weight[shard.start : shard.end].float())
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad = False
    target = problem.target("full", shard, torch.float32)
    for _ in range(2):
        terms = fused_token_terms(
            problem.hidden.float(),
            weight,
            shard,
            problem.tokens,
            "reverse_kl",
            target,
            TEMPERATURE,
            positions=POSITIONS,
            layer=OutputLayer(group, accumulate=True),
        )
        total_loss(terms).backward()
    expected = problem.expected("reverse_kl", "full")[4][shard.start : shard.end]
    VOCAB_PARALLEL.assert_close(weight.main_grad - 1.0, 2 * expected)
    assert weight.grad_added_to_main_grad


def check_tied(rank: int, world_size: int) -> None:
    """A weight that embeds the tokens too gets the sum of both gradients."""
    problem = Problem(37, 48)
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(37, 48, group)
    weight = problem.weight[shard.start : shard.end].clone().requires_grad_()
    inputs = torch.tensor([[1, 5, 36]] * 4)
    owned, local = shard.locate(inputs)
    embedded = torch.where(owned.unsqueeze(-1), weight[local], 0.0)
    if group is not None:
        whole = embedded.detach().clone()
        dist.all_reduce(whole, group=group)
        embedded = embedded + (whole - embedded.detach())
    terms = fused_token_terms(embedded, weight, shard, problem.tokens, positions=POSITIONS, with_entropy=False)
    terms.log_probs.sum().backward()
    dense = problem.weight.clone().requires_grad_()
    logits = (dense[inputs].flatten(0, 1)[POSITIONS] @ dense.t())[:, :37]
    known = problem.tokens >= 0
    torch.log_softmax(logits, -1)[known].gather(-1, problem.tokens[known].unsqueeze(-1)).sum().backward()
    assert weight.grad is not None and dense.grad is not None
    VOCAB_PARALLEL_FLOAT64.assert_close(weight.grad, dense.grad[shard.start : shard.end])


def check_collectives(rank: int, world_size: int) -> None:
    """Two small ones forward however many chunks there are; backward only the sum of the hidden states' gradient."""
    problem = Problem(37, 48)
    shard = VocabShard.of_rank(37, 48, dist.group.WORLD)
    weight = problem.weight[shard.start : shard.end].float().requires_grad_()
    for kind in (None, *KINDS):
        for name in TARGETS if kind else (None,):
            calls = []
            for chunk_bytes in (10**9, 300):
                chunks.CHUNK_BYTES = chunk_bytes
                hidden = problem.hidden.float().requires_grad_()
                target = None if name is None else problem.target(name, shard, torch.float32)
                with CountCollectives() as counted:
                    terms = fused_token_terms(
                        hidden,
                        weight,
                        shard,
                        problem.tokens,
                        kind,
                        target,
                        positions=POSITIONS,  # type: ignore[arg-type]
                    )
                assert all(size <= 16 for size in counted.bytes_per(len(POSITIONS))), counted.sizes
                forward = counted.calls
                with CountCollectives() as counted:
                    total_loss(terms).backward()
                calls.append((forward, counted.calls))
            assert calls[0] == calls[1] == (["gather"] if kind is None else ["gather", "sum"], ["sum"]), calls


def check_as_unfused(rank: int, world_size: int) -> None:
    problem = Problem(31, 64)
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(31, 64, group)
    for kind in KINDS:
        for name in TARGETS:
            fused = run_fused(problem, kind, name, torch.float64, False)[:3]
            rows = problem.hidden.flatten(0, 1)[POSITIONS]
            logits = rows @ problem.weight[shard.start : shard.end].t()
            target = problem.target(name, shard, torch.float64)
            unfused = token_terms(logits, shard, problem.tokens, kind, target, TEMPERATURE)
            for left, right in zip(fused, unfused, strict=True):
                VOCAB_PARALLEL_FLOAT64.assert_close(left, right)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long), 4])
def test_fused(world_size: int) -> None:
    cases: list[Case] = [
        (f"{vocab_size} in {padded}, SP {sequence_parallel}", check_fused, (vocab_size, padded, sequence_parallel))
        for vocab_size, padded in VOCABULARIES
        for sequence_parallel in ([False, True] if world_size > 1 else [False])
    ]
    cases += [
        (f"bf16, SP {sequence_parallel}", check_bf16, (sequence_parallel,))
        for sequence_parallel in ([False, True] if world_size > 1 else [False])
    ]
    checks: list[Callable[..., None]] = [check_ratio_to_cross_entropy, check_main_grad, check_tied, check_as_unfused]
    cases += [(check.__name__, check, ()) for check in checks]
    if world_size > 1:
        cases.append(("collectives", check_collectives, ()))
    run_cases(cases, world_size)
