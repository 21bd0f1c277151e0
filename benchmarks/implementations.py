"""What is compared: ours, a straightforward one, those of Megatron-LM and Liger, and the matrix products alone.

Each is made ready for the inputs of a case (`build`) and then runs forward and backward as often as is asked.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import liger_fused_jsd, liger_jsd, megatron_topk, why_no_liger, why_no_megatron
from megatron_erpd.vocab_parallel import (
    HiddenTarget,
    LiveTarget,
    Target,
    divergence,
    fused_token_terms,
    gather_log_probs,
)
from megatron_erpd.vocab_parallel.shard import CHUNK_BYTES, token_chunks
from megatron_erpd.vocab_parallel.token_terms import Kernels, set_kernels

Forward = Callable[[], Tensor]
Backward = Callable[[Tensor], tuple[Tensor, ...]]
Runner = tuple[Forward, Backward]
"""Forward gives the divergence of each token `[n]`, or the mean of all; backward takes it and gives the gradient of its
mean with respect to `Inputs.leaves`."""

STRAIGHTFORWARD = "straightforward"
FLOOR = "floor"
PRODUCTS_NEEDED, PRODUCTS_REMADE = "products (needed)", "products (as ours)"
TRITON, PLAIN = "ours (Triton)", "ours (plain)"
FUSED_TRITON, FUSED_PLAIN = "ours (fused, Triton)", "ours (fused, plain)"
MEGATRON, LIGER, LIGER_FUSED = "Megatron topk_kl_div", "Liger JSD", "Liger fused JSD"
PEERS = (MEGATRON, LIGER, LIGER_FUSED)
NO_DIVERGENCE = (PRODUCTS_NEEDED, PRODUCTS_REMADE, FLOOR)


@dataclass(frozen=True)
class Implementation:
    """One of the compared.

    Attributes:
        applies: whether it computes what the case asks for.
        build: makes it ready.
        working: an upper bound of the memory that it takes beyond inputs and gradient, in float32 tensors `[n, v/tp]`;
            for deciding what fits.
        missing: why it can't run on a device, or None.
        partial: the result is a rank's part of the divergence, to be summed over the ranks.
    """

    name: str
    applies: Callable[[Case], bool]
    build: Callable[[Case, Inputs], Runner]
    working: Callable[[Case], int] = lambda case: 0
    missing: Callable[[torch.device], str | None] = lambda device: None
    partial: bool = False

    def memory(self, case: Case) -> int:
        """Bytes on one rank, inputs and gradient included."""
        working = self.working(case) * 4 * case.tokens * case.width
        return case.input_bytes + case.result_bytes + working + 2 * CHUNK_BYTES


def implementations() -> list[Implementation]:
    """All of them, ours first."""
    return [
        Implementation(TRITON, lambda c: True, _ours("triton"), _logits_made, missing=_why_no_triton),
        Implementation(PLAIN, lambda c: True, _ours("torch"), _logits_made),
        Implementation(FUSED_TRITON, _from_hidden, _fused("triton"), missing=_why_no_triton),
        Implementation(FUSED_PLAIN, _from_hidden, _fused("torch")),
        Implementation(STRAIGHTFORWARD, lambda c: True, _straightforward, _whole_rows),
        Implementation(
            MEGATRON,
            lambda c: c.target == "topk" and c.kind == "forward_kl",
            _autograd(lambda inputs: megatron_topk(inputs, policy_logits(inputs, 1))),
            working=lambda c: 5,
            missing=why_no_megatron,
            partial=True,
        ),
        Implementation(
            LIGER,
            lambda c: (c.policy, c.target, c.kind, c.tp) == ("logits", "full", "js", 1),
            _autograd(liger_jsd),
            working=lambda c: 7,
            missing=why_no_liger,
        ),
        Implementation(
            LIGER_FUSED,
            lambda c: (c.policy, c.target, c.kind, c.tp) == ("hidden", "hidden", "js", 1),
            _autograd(liger_fused_jsd),
            working=lambda c: 2,
            missing=why_no_liger,
        ),
        Implementation(PRODUCTS_NEEDED, _from_hidden, _products(remade=False)),
        Implementation(PRODUCTS_REMADE, _from_hidden, _products(remade=True)),
    ]


def _logits_made(case: Case) -> int:
    """Logits and their gradient."""
    return 2 if case.policy == "hidden" else 0


def _whole_rows(case: Case) -> int:
    """Measured: 5.5 tensors of all columns, or 9.5 with the mixture, and those of hidden states."""
    return case.tp * (10 if case.kind == "js" else 6) + 2 * _logits_made(case)


def _from_hidden(case: Case) -> bool:
    return case.policy == "hidden"


def _why_no_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec("megatron_erpd.vocab_parallel.triton_passes") is None:
        return "this version has no Triton kernels"
    return None


def _autograd(forward: Callable[[Inputs], Tensor]) -> Callable[[Case, Inputs], Runner]:
    """A runner of a function that autograd differentiates."""

    def build(case: Case, inputs: Inputs) -> Runner:
        return lambda: forward(inputs), lambda result: _gradient(result, inputs)

    return build


def _gradient(result: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    upstream = torch.full_like(result, 1.0 / result.numel())
    return torch.autograd.grad(result, inputs.leaves, upstream)


def _with_kernels(kernels: Kernels, runner: Runner) -> Runner:
    """The same with these kernels in both directions."""
    forward, backward = runner

    def switched(call: Callable[..., Any], *args: Any) -> Any:
        set_kernels(kernels)
        try:
            return call(*args)
        finally:
            set_kernels("auto")

    return lambda: switched(forward), lambda result: switched(backward, result)


def target_of(inputs: Inputs) -> Target:
    """The target as this project takes it."""
    if inputs.target is not None:
        return LiveTarget(inputs.target)
    if inputs.topk is not None:
        return inputs.topk
    assert inputs.target_hidden is not None and inputs.target_weight is not None
    return HiddenTarget(inputs.target_hidden, inputs.target_weight)


def _ours(kernels: Kernels) -> Callable[[Case, Inputs], Runner]:
    """`divergence` of logits; those that hidden states make exist whole."""

    def build(case: Case, inputs: Inputs) -> Runner:
        def forward() -> Tensor:
            return divergence(case.kind, policy_logits(inputs), target_of(inputs), inputs.shard)

        return _with_kernels(kernels, (forward, lambda result: _gradient(result, inputs)))

    return build


def _fused(kernels: Kernels) -> Callable[[Case, Inputs], Runner]:
    """`fused_token_terms`: logits a chunk of tokens at a time."""

    def build(case: Case, inputs: Inputs) -> Runner:
        assert inputs.hidden is not None and inputs.weight is not None
        hidden, weight, target = inputs.hidden, inputs.weight, target_of(inputs)

        def forward() -> Tensor:
            terms = fused_token_terms(hidden, weight, inputs.shard, kind=case.kind, target=target, with_entropy=False)
            return terms.divergence

        return _with_kernels(kernels, (forward, lambda result: _gradient(result, inputs)))

    return build


def policy_logits(inputs: Inputs, *batch: int) -> Tensor:
    """This rank's logits of the policy `[n, *batch, v/tp]`: as given, or made as a column-parallel layer makes them."""
    if inputs.logits is not None:
        return inputs.logits.reshape(-1, *batch, inputs.logits.shape[-1]) if batch else inputs.logits
    assert inputs.hidden is not None and inputs.weight is not None
    hidden = inputs.hidden if inputs.shard.size == 1 else _ToAllColumns.apply(inputs.hidden, inputs.shard.group)
    return hidden.reshape(-1, *batch, hidden.shape[-1]) @ inputs.weight.t()


class _ToAllColumns(torch.autograd.Function):
    """Nothing forward; backward the sum of what the ranks' columns give. As Megatron's column-parallel layer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _straightforward(case: Case, inputs: Inputs) -> Runner:
    """As it is written down: whole rows in float32, `log_softmax`, `exp`, multiply, sum, and autograd."""

    def log_probs(logits: Tensor) -> Tensor:
        whole = logits if inputs.shard.size == 1 else gather_log_probs(logits, inputs.shard)
        return torch.log_softmax(whole.float(), dim=-1)

    def forward() -> Tensor:
        policy = log_probs(policy_logits(inputs))
        if inputs.topk is not None:
            entries = policy.gather(-1, inputs.topk.indices)
            tail = (1.0 - entries.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-8).log()
            target = torch.cat([inputs.topk.log_probs, inputs.topk.tail_log_prob.unsqueeze(-1)], dim=-1)
            return straightforward_divergence(case.kind, torch.cat([entries, tail], dim=-1), target)
        if inputs.target is not None:
            return straightforward_divergence(case.kind, policy, log_probs(inputs.target))
        assert inputs.target_hidden is not None and inputs.target_weight is not None
        return straightforward_divergence(case.kind, policy, log_probs(inputs.target_hidden @ inputs.target_weight.t()))

    return forward, lambda result: _gradient(result, inputs)


def straightforward_divergence(kind: str, policy: Tensor, target: Tensor) -> Tensor:
    """Of log-probs `[n, v]`, `[n]`."""
    if kind == "forward_kl":
        return (target.exp() * (target - policy)).sum(dim=-1)
    if kind == "reverse_kl":
        return (policy.exp() * (policy - target)).sum(dim=-1)
    mixture = torch.logaddexp(policy, target) - math.log(2.0)
    return 0.5 * (policy.exp() * (policy - mixture) + target.exp() * (target - mixture)).sum(dim=-1)


def _products(remade: bool) -> Callable[[Case, Inputs], Runner]:
    """The matrix products and nothing else, in the chunks that ours works in, into memory that is there already."""

    def build(case: Case, inputs: Inputs) -> Runner:
        hidden, weight = (x.detach() for x in inputs.leaves)
        layers = [(hidden, weight)]
        if inputs.target_hidden is not None and inputs.target_weight is not None:
            layers.append((inputs.target_hidden, inputs.target_weight))
        # Ours makes float32 logits, and of 16-bit operands a gradient beside them.
        columns = len(layers) * 4 + (case.itemsize if case.itemsize < 4 else 0)
        parts = list(token_chunks(case.tokens, columns * case.width))
        # One chunk's logits stand for those of every layer and chunk: their values don't matter to the time.
        logits = hidden.new_zeros((parts[0].stop, case.width))
        on_hidden, on_weight = torch.empty_like(hidden), torch.zeros_like(weight)

        def make_logits(part: slice) -> Tensor:
            here = logits[: part.stop - part.start]
            for states, layer in layers:
                torch.mm(states[part], layer.t(), out=here)
            return here

        def forward() -> Tensor:
            for part in parts:
                make_logits(part)
            return logits

        def backward(result: Tensor) -> tuple[Tensor, ...]:
            for part in parts:
                here = make_logits(part) if remade else result[: part.stop - part.start]
                torch.mm(here, weight, out=on_hidden[part])
                on_weight.addmm_(here.t(), hidden[part])
            return on_hidden, on_weight

        return forward, backward

    return build
