"""Everything in `vocab_parallel` on two and four ranks: value and gradient are those of the dense vocabulary.

A factor of the tensor-parallel size in a gradient is the classic mistake here. `check_as_in_megatron` would catch
one the way it would happen in training: hidden states are the same on every rank, each rank owns rows of the output
weight, the loss is computed on every rank, and only the gradient of the hidden states is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_erpd.errors import LayoutError
from megatron_erpd.objectives.projection import log_partition, project_per_token
from megatron_erpd.vocab_parallel import (
    IGNORED_TOKEN,
    LiveTarget,
    TokenTerms,
    VocabShard,
    apply_eta,
    divergence,
    gather_log_probs,
    gathered_divergence,
    kl_from_base,
    project_shard,
    signal_law,
    token_terms,
    vocab_parallel_log_softmax,
    vocab_parallel_topk,
)
from megatron_erpd.vocab_parallel.shard import accumulation_dtype
from tests.distributed.harness import Case, RankError, run_cases, run_ranks
from tests.tolerances import (
    BF16,
    FLOAT64,
    FP32,
    PROJECTION_KL,
    SIGNAL_LAW,
    VOCAB_PARALLEL,
    VOCAB_PARALLEL_FLOAT64,
    Tolerance,
)
from tests.unit.vocab_parallel.oracles import buckets, policy_probs, probs_divergence

# True and padded size: no padding; one valid column in the last of four ranges of 48; a last range (of four: the last
# two) of 64 without any valid column; ranges smaller than the k of top-k.
VOCABULARIES = [(40, 40), (37, 48), (31, 64), (7, 8)]
KINDS = ("forward_kl", "reverse_kl", "js")
TOPK = 5
TEMPERATURE = 1.3
BATCH = (3, 2)
IGNORED = torch.tensor([[False, True], [False, False], [True, False]])

Loss = Callable[[Tensor, VocabShard], Tensor]
"""Logits of a shard -> the replicated loss."""


def make_shard(vocab_size: int, padded: int) -> VocabShard:
    return VocabShard.of_rank(vocab_size, padded, dist.group.WORLD)


def make_rows(seed: int, vocab_size: int, padded: int, scale: float = 2.0) -> Tensor:
    """Dense float64 logits `[*BATCH, padded]` that fp32 holds exactly, the same on every rank, large in the padding
    columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = (scale * torch.randn(*BATCH, padded, generator=generator)).double()
    rows[..., vocab_size:] = 50.0
    return rows


def local(rows: Tensor, shard: VocabShard) -> Tensor:
    return rows[..., shard.start : shard.end].clone()


def make_tokens(vocab_size: int) -> Tensor:
    tokens = torch.randint(0, vocab_size, BATCH, generator=torch.Generator().manual_seed(3))
    tokens[1, 0] = vocab_size - 1
    return tokens.masked_fill(IGNORED, IGNORED_TOKEN)


def token_weights() -> Tensor:
    weights = torch.randn(BATCH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return weights.masked_fill(IGNORED, 0.0)


def per_token_functions(vocab_size: int, padded: int) -> dict[str, tuple[Loss, Loss]]:
    """Name -> (a function of this package on a shard, an independent one of the dense float64 rows `[..., V]`)."""
    tokens = make_tokens(vocab_size)
    teacher = make_rows(9, vocab_size, padded)
    q = policy_probs(teacher[..., :vocab_size])
    indices = q.topk(min(TOPK, vocab_size - 1)).indices

    def live(shard: VocabShard) -> LiveTarget:
        return LiveTarget(local(teacher, shard))

    def topk(shard: VocabShard) -> Any:
        log_probs = vocab_parallel_log_softmax(local(teacher, shard), shard)
        return vocab_parallel_topk(log_probs, indices.shape[-1], shard)

    def probs(logits: Tensor) -> Tensor:
        return policy_probs(logits, TEMPERATURE)

    def at_token(logits: Tensor) -> Tensor:
        picked = probs(logits).gather(-1, tokens.clamp_min(0).unsqueeze(-1)).squeeze(-1).log()
        return picked.masked_fill(tokens == IGNORED_TOKEN, 0.0)

    def dense_entropy(logits: Tensor) -> Tensor:
        return -(probs(logits) * probs(logits).log()).sum(-1)

    def of_gathered(logits: Tensor) -> Tensor:
        return (logits / TEMPERATURE).log_softmax(-1).square().sum(-1)

    def of_tokens(logits: Tensor, shard: VocabShard, with_entropy: bool = True) -> TokenTerms:
        return token_terms(logits, shard, tokens, temperature=TEMPERATURE, with_entropy=with_entropy)

    functions: dict[str, tuple[Loss, Loss]] = {
        "log-probs of tokens": (lambda x, s: of_tokens(x, s, with_entropy=False).log_probs, lambda x, s: at_token(x)),
        "entropy": (lambda x, s: token_terms(x, s, temperature=TEMPERATURE).entropy, lambda x, s: dense_entropy(x)),
        "both": (
            lambda x, s: torch.stack(of_tokens(x, s)[:2]).sum(0),
            lambda x, s: at_token(x) + dense_entropy(x),
        ),
        "log-softmax of gathered logits": (
            lambda x, s: of_gathered(gather_log_probs(x, s).to(accumulation_dtype(x))),
            lambda x, s: probs(x).log().square().sum(-1),
        ),
    }
    for kind in KINDS:
        functions |= {
            f"{kind} live": (
                lambda x, s, kind=kind: divergence(kind, x, live(s), s, TEMPERATURE),
                lambda x, s, kind=kind: probs_divergence(kind, q, probs(x)),
            ),
            f"{kind} gathered": (
                lambda x, s, kind=kind: gathered_divergence(kind, x, live(s), s, TEMPERATURE),
                lambda x, s, kind=kind: probs_divergence(kind, q, probs(x)),
            ),
            f"{kind} top-k": (
                lambda x, s, kind=kind: divergence(kind, x, topk(s), s, TEMPERATURE),
                lambda x, s, kind=kind: probs_divergence(kind, buckets(q, indices), buckets(probs(x), indices)),
            ),
        }
    return functions


def check_against_dense(
    name: str, shard: VocabShard, sharded: Loss, dense: Loss, dtype: torch.dtype, tolerance: Tolerance
) -> None:
    """Value, replication and the gradient of the logits, masked tokens and padding columns included."""
    padded = shard.width * shard.size
    rows = make_rows(1, shard.vocab_size, padded).to(dtype)
    leaf = local(rows, shard).requires_grad_()
    value = sharded(leaf, shard)
    dense_leaf = rows[..., : shard.vocab_size].double().requires_grad_()
    expected = dense(dense_leaf, shard)
    tolerance_of_value = VOCAB_PARALLEL if dtype == torch.bfloat16 else tolerance
    tolerance_of_value.assert_close(value, expected, name)
    copies = shard.all_gather(value.detach().unsqueeze(-1))
    assert (copies == copies[..., :1]).all(), f"{name}: ranks differ"
    weights = token_weights()
    (gradient,) = torch.autograd.grad((value * weights.to(value.dtype)).sum(), leaf)
    (dense_gradient,) = torch.autograd.grad((expected * weights).sum(), dense_leaf)
    whole = torch.nn.functional.pad(dense_gradient, (0, padded - shard.vocab_size))
    assert gradient.dtype == dtype
    tolerance.assert_close(gradient, local(whole, shard), f"gradient of {name}")
    assert (gradient[IGNORED] == 0).all(), name
    assert (gradient[..., shard.valid_columns :] == 0).all(), name


def check_all(rank: int, world_size: int, vocab_size: int, padded: int) -> None:
    shard = make_shard(vocab_size, padded)
    for name, (sharded, dense) in per_token_functions(vocab_size, padded).items():
        check_against_dense(name, shard, sharded, dense, torch.float64, VOCAB_PARALLEL_FLOAT64)
        check_against_dense(name, shard, sharded, dense, torch.float32, VOCAB_PARALLEL)
        check_against_dense(name, shard, sharded, dense, torch.bfloat16, BF16)


class CopyToTensorParallel(torch.autograd.Function):
    """What Megatron's column-parallel output layer does to its input: nothing forward, a sum over ranks backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


def output_layer_gradients(function: Loss, shard: VocabShard, parallel: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden states and of the (whole, or this rank's rows of the) output weight, in float64."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(*BATCH, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shard.width * shard.size, 6, generator=generator, dtype=torch.float64)
    rows = slice(shard.start, shard.end) if parallel else slice(shard.vocab_size)
    weight = weight[rows].clone().requires_grad_()
    entering = CopyToTensorParallel.apply(hidden) if parallel else hidden
    # Transposed as Megatron's [s, b, v/tp] is by a loss that works on [b, s].
    logits = (entering.transpose(0, 1).contiguous() @ weight.T).transpose(0, 1)
    loss = (function(logits, shard) * token_weights()).sum()
    hidden_gradient, weight_gradient = torch.autograd.grad(loss, [hidden, weight])
    return hidden_gradient, weight_gradient


def check_as_in_megatron(rank: int, world_size: int, vocab_size: int, padded: int) -> None:
    shard = make_shard(vocab_size, padded)
    for name, (sharded, dense) in per_token_functions(vocab_size, padded).items():
        hidden, weight = output_layer_gradients(sharded, shard, parallel=True)
        dense_hidden, dense_weight = output_layer_gradients(dense, shard, parallel=False)
        FLOAT64.assert_close(hidden, dense_hidden, f"hidden states under {name}")
        whole = torch.nn.functional.pad(dense_weight, (0, 0, 0, padded - vocab_size))
        FLOAT64.assert_close(weight, whole[shard.start : shard.end], f"output weight under {name}")


def check_the_check(rank: int, world_size: int) -> None:
    """A sum whose backward sums the replicated gradient again, as torch's differentiable collective does."""
    from torch.distributed.nn.functional import all_reduce

    def wrong(logits: Tensor, shard: VocabShard) -> Tensor:
        return all_reduce(logits[..., : shard.valid_columns].exp().sum(-1), group=shard.group).log()

    check_against_dense("wrong", make_shard(40, 40), wrong, lambda x, s: x.logsumexp(-1), torch.float64, FLOAT64)


def check_topk(rank: int, world_size: int, vocab_size: int, padded: int) -> None:
    shard = make_shard(vocab_size, padded)
    log_probs = torch.log_softmax(make_rows(2, vocab_size, padded)[..., :vocab_size], dim=-1)
    mine = local(torch.nn.functional.pad(log_probs, (0, padded - vocab_size), value=1.0), shard)
    values, indices = log_probs.sort(dim=-1, descending=True)
    for k in {1, min(9, vocab_size), vocab_size - 1, vocab_size}:
        topk = vocab_parallel_topk(mine, k, shard)
        assert torch.equal(topk.indices, indices[..., :k])
        assert torch.equal(topk.log_probs, values[..., :k])
        FLOAT64.assert_close(topk.tail_log_prob.exp(), values[..., k:].exp().sum(-1))
        assert k < vocab_size or (topk.tail_log_prob == -torch.inf).all()


def check_projection(rank: int, world_size: int, vocab_size: int, padded: int) -> None:
    shard = make_shard(vocab_size, padded)
    base = torch.log_softmax(make_rows(6, vocab_size, padded)[..., :vocab_size], dim=-1)
    signal = make_rows(7, vocab_size, padded)
    base_shard = local(torch.nn.functional.pad(base, (0, padded - vocab_size), value=-torch.inf), shard)
    signal_shard = local(signal.index_fill(-1, torch.arange(vocab_size, padded), torch.nan), shard)
    signal = signal[..., :vocab_size]
    one_rank = VocabShard.dense(vocab_size)
    for delta, eta_max in ((0.02, 1.0), (0.3, 1.0), (0.3, 8.0)):
        eta, log_q, kl = project_shard(base_shard, signal_shard, shard, delta=delta, eta_max=eta_max)
        dense = project_per_token(base, signal, delta, eta_max)
        PROJECTION_KL.assert_close(eta, dense.eta)
        alone = project_shard(base, signal, one_rank, delta=delta, eta_max=eta_max)
        FLOAT64.assert_close(eta, alone.eta)
        FLOAT64.assert_close(kl, alone.kl)
        copies = shard.all_gather(eta.unsqueeze(-1))
        assert (copies == copies[..., :1]).all(), "ranks chose different steps"
        whole = gather_log_probs(log_q, shard)
        FLOAT64.assert_close(whole, alone.log_probs)
        SIGNAL_LAW.assert_close(whole.exp().sum(-1), torch.ones(BATCH))
        SIGNAL_LAW.assert_close(kl, (whole.exp() * (whole - base)).sum(-1))
        SIGNAL_LAW.assert_close(kl_from_base(log_q, base_shard, shard), kl)
        inside = eta < eta_max
        PROJECTION_KL.assert_close(kl[inside], torch.full_like(kl[inside], delta))
        assert (log_q[..., shard.valid_columns :] == -torch.inf).all()
    law = signal_law(base_shard.flatten(0, 1), signal_shard.flatten(0, 1), shard, eta_max=2.0)
    for step in (0.0, 0.5, 2.0):
        weights = base.exp() * (step * signal).exp()
        SIGNAL_LAW.assert_close(log_partition(*law, step).log_partition, weights.sum(-1).log().flatten())
        q = gather_log_probs(apply_eta(base_shard, signal_shard, step, shard), shard).exp()
        FLOAT64.assert_close(q, weights / weights.sum(-1, keepdim=True))


def check_extremes(rank: int, world_size: int) -> None:
    """Logits of +-1e4, all mass on one rank, one of four ranks with nothing but -inf: as in one process."""
    vocab_size, padded = 31, 64
    shard, whole = make_shard(vocab_size, padded), VocabShard.dense(vocab_size, padded)
    rows = torch.full((*BATCH, padded), -1e4)
    rows[..., 20] = 1e4
    rows[0, :, 3] = 1e4
    rows[1, :, :16] = -torch.inf
    teacher = torch.log_softmax(make_rows(9, vocab_size, padded).float()[..., :vocab_size], dim=-1)
    teacher = torch.nn.functional.pad(teacher, (0, padded - vocab_size))
    tokens = torch.full(BATCH, 20)
    results = []
    for part in (shard, whole):
        leaf = local(rows, part).requires_grad_()
        live = LiveTarget(local(teacher, part))
        topk = vocab_parallel_topk(live.logits, 4, part)
        values = [*token_terms(leaf, part, tokens)[:2]]
        values += [divergence(kind, leaf, target, part) for kind in ("reverse_kl", "js") for target in (live, topk)]
        # Forward KL is infinite where the policy excludes a token.
        values += [divergence("forward_kl", leaf, target, part)[::2] for target in (live, topk)]
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in values), leaf)
        results.append(
            (torch.cat([value.flatten() for value in values]), local(gradient, shard) if part is whole else gradient)
        )
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        FP32.assert_close(actual, expected)


class CountCollectives:
    """Counts calls of the collectives while it is entered, and the bytes that each sends."""

    def __enter__(self) -> CountCollectives:
        self.calls: list[str] = []
        self.sizes: list[int] = []
        self.saved = (dist.all_reduce, dist.all_gather)
        dist.all_reduce, dist.all_gather = (self._count(function) for function in self.saved)
        return self

    def __exit__(self, *exc: object) -> None:
        dist.all_reduce, dist.all_gather = self.saved

    def bytes_per(self, tokens: int) -> list[float]:
        return [size / tokens for size in self.sizes]

    def _count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append("gather" if function is self.saved[1] else "sum")
            sent = args[0] if function is self.saved[1] else tensor
            self.sizes.append(sent.numel() * sent.element_size())
            return function(tensor, *args, **kwargs)

        return counted


def check_collectives(rank: int, world_size: int) -> None:
    shard = make_shard(37, 48)
    leaf = local(make_rows(1, 37, 48), shard).requires_grad_()
    live = LiveTarget(vocab_parallel_log_softmax(local(make_rows(9, 37, 48), shard), shard))
    topk = vocab_parallel_topk(live.logits, 4, shard)
    signal, tokens = live.logits - leaf.detach(), make_tokens(37)
    expected: list[tuple[Callable[[], Tensor], list[str], list[str]]] = [
        (lambda: vocab_parallel_log_softmax(leaf, shard), ["gather"], []),
        (lambda: token_terms(leaf, shard, tokens, with_entropy=False).log_probs, ["gather"], []),
        (lambda: token_terms(leaf, shard, tokens).entropy, ["gather"], []),
        (lambda: gather_log_probs(leaf, shard), ["gather"], []),
        *(
            (lambda kind=kind, target=target: divergence(kind, leaf, target, shard), ["gather", "sum"], [])
            for kind in KINDS
            for target in (live, topk)
        ),
        (lambda: gathered_divergence("js", leaf, live, shard), ["gather", "gather"], []),
        (lambda: vocab_parallel_topk(live.logits, 3, shard).log_probs, ["gather", "gather"], []),
        (lambda: signal_law(live.logits[0], signal[0], shard, 1.0).values, ["sum"], []),
        *(
            (
                lambda values=values, delta=delta: project_shard(live.logits, values, shard, delta, eta_max=1.0).kl,
                ["sum"],
                [],
            )
            for values in (signal, 20 * signal, torch.zeros_like(signal))
            for delta in (0.0, 0.1, 100.0)
        ),
        (lambda: apply_eta(live.logits, signal, 0.5, shard), ["gather"], []),
    ]
    for function, forward, backward in expected:
        with CountCollectives() as counted:
            value = function()
        assert counted.calls == forward, f"{counted.calls} instead of {forward}"
        if value.requires_grad:
            with CountCollectives() as counted:
                value.sum().backward()
            assert counted.calls == backward, f"{counted.calls} instead of {backward} backward"


def check_layout_errors(rank: int, world_size: int) -> None:
    with pytest.raises(LayoutError, match=r"isn't a multiple of the 2 ranks"):
        VocabShard.of_rank(37, 41, dist.group.WORLD)
    with pytest.raises(LayoutError, match=r"isn't the range of rank"):
        VocabShard((1 - rank) * 8, (2 - rank) * 8, 16, dist.group.WORLD)
    with pytest.raises(LayoutError, match=r"don't cover a vocabulary of 17"):
        VocabShard(rank * 8, rank * 8 + 8, 17, dist.group.WORLD)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.long), 4])
def test_as_dense(world_size: int) -> None:
    checks = (check_all, check_as_in_megatron, check_topk, check_projection)
    cases: list[Case] = [
        (f"{check.__name__} of {vocab_size} in {padded}", check, (vocab_size, padded))
        for check in checks
        for vocab_size, padded in VOCABULARIES
    ]
    cases += [("extremes", check_extremes, ()), ("collectives", check_collectives, ())]
    run_cases(cases, world_size)


def test_a_factor_of_the_world_size_is_caught() -> None:
    with pytest.raises(RankError, match=r"gradient of wrong"):
        run_ranks(check_the_check, 2)


def test_layout_errors() -> None:
    run_ranks(check_layout_errors, 2)
