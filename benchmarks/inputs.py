"""The tensors of a case, on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import DTYPES, TOPK, Case
from megatron_erpd.vocab_parallel import TopKTarget, VocabShard, vocab_parallel_log_softmax, vocab_parallel_topk

DISTINCT_TOKENS = 64
"""So many tokens are drawn and then repeated: drawing 300 million numbers would take longer than measuring."""
SPREAD = 2.0
"""The standard deviation of the logits; a distribution that is neither flat nor a single token."""


@dataclass(frozen=True)
class Context:
    """Where a rank measures.

    Attributes:
        group: of the tensor-parallel ranks; None for one.
    """

    device: torch.device
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """All ranks go on together, with nothing under way on their devices."""
        if self.group is not None:
            dist.barrier(group=self.group)
        self.synchronize()

    def over_ranks(self, values: list[float], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> list[float]:
        """The largest (or another reduction) of each value over the ranks."""
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()


@dataclass(frozen=True)
class Inputs:
    """What an implementation is given; what a case has no use for is None.

    Attributes:
        logits: [n, v/tp], with gradient.
        hidden, weight: [n, h] and [v/tp, h], with gradient; the policy's logits are `hidden @ weight^T`.
        target: [n, v/tp], logits.
        target_hidden, target_weight: as `hidden` and `weight`, without gradient.
        topk: [n, K] and [n].
    """

    context: Context
    shard: VocabShard
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    target: Tensor | None = None
    target_hidden: Tensor | None = None
    target_weight: Tensor | None = None
    topk: TopKTarget | None = None
    leaves: tuple[Tensor, ...] = field(init=False)
    """What the gradient is taken with respect to."""

    def __post_init__(self) -> None:
        leaves = tuple(x for x in (self.logits, self.hidden, self.weight) if x is not None)
        object.__setattr__(self, "leaves", leaves)

    def storages(self) -> set[int]:
        """Addresses of the memory that the inputs take."""
        tensors = [*self.leaves, self.target, self.target_hidden, self.target_weight, *(self.topk or ())]
        return {x.untyped_storage().data_ptr() for x in tensors if x is not None}


def make_inputs(case: Case, context: Context) -> Inputs:
    """Random inputs, the same in every run; hidden states are the same on every rank."""
    shard = VocabShard.of_rank(case.vocab, case.vocab, context.group)
    dtype, device = DTYPES[case.dtype], context.device
    own = torch.Generator(device).manual_seed(1000 + context.rank)
    shared = torch.Generator(device).manual_seed(1)

    def draw(rows: int, columns: int, generator: torch.Generator, spread: float) -> Tensor:
        return torch.empty((rows, columns), device=device).normal_(0.0, spread, generator=generator).to(dtype)

    def tokens(columns: int, generator: torch.Generator, spread: float) -> Tensor:
        return _repeat(draw(min(DISTINCT_TOKENS, case.tokens), columns, generator, spread), case.tokens)

    made: dict[str, Tensor | TopKTarget] = {}
    if case.policy == "logits":
        made["logits"] = tokens(case.width, own, SPREAD).requires_grad_()
    else:
        made["hidden"] = tokens(case.hidden, shared, 1.0).requires_grad_()
        made["weight"] = draw(case.width, case.hidden, own, SPREAD / case.hidden**0.5).requires_grad_()
    if case.target == "full":
        made["target"] = tokens(case.width, own, SPREAD)
    elif case.target == "hidden":
        made["target_hidden"] = tokens(case.hidden, shared, 1.0)
        made["target_weight"] = draw(case.width, case.hidden, own, SPREAD / case.hidden**0.5)
    else:
        teacher = draw(min(DISTINCT_TOKENS, case.tokens), case.width, own, SPREAD)
        found = vocab_parallel_topk(vocab_parallel_log_softmax(teacher, shard), min(TOPK, case.vocab), shard)
        made["topk"] = TopKTarget(*(_repeat(x, case.tokens) for x in found))
    return Inputs(context, shard, **made)  # type: ignore[arg-type]


def _repeat(block: Tensor, rows: int) -> Tensor:
    """`block [m, ...]` over and over, `[rows, ...]`."""
    result = block.new_empty((rows, *block.shape[1:]))
    for start in range(0, rows, len(block)):
        part = result[start : start + len(block)]
        part.copy_(block[: len(part)])
    return result
