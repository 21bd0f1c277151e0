"""What a policy is compared with: a distribution per token, known whole, by hidden states, or at its top-k tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.divergences import TopKTarget
from megatron_erpd.vocab_parallel.shard import VocabShard


class FullTarget(Protocol):
    """A distribution over the whole vocabulary, split as the policy's logits are, for some tokens in order.

    It is asked for a chunk of tokens at a time, in forward and once more in backward, with the same chunks; what it
    computes for a chunk need not outlive it.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def bytes_per_token(self) -> int:
        """What `rows` makes in memory for a token; 0 where it makes nothing."""
        ...

    def rows(self, part: slice) -> Tensor:
        """Logits `[c, v/tp]` of these tokens (normalised log-probs serve as well): the target is
        softmax(logits / temperature). -inf is allowed; what padding columns hold doesn't matter."""
        ...


@dataclass(frozen=True)
class LiveTarget:
    """A distribution given by its logits.

    Attributes:
        logits: [..., v/tp], any floating type; normalised log-probs serve as well.
        temperature: divides these logits; the policy's has its own.
    """

    logits: Tensor
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[:-1].numel()

    @property
    def bytes_per_token(self) -> int:
        return 0

    def rows(self, part: slice) -> Tensor:
        return self.logits.detach().reshape(-1, self.logits.shape[-1])[part]


@dataclass(frozen=True)
class HiddenTarget:
    """A teacher whose logits are made from its final hidden states as they are needed, a chunk at a time.

    Attributes:
        hidden: [..., h], the input of the teacher's output layer, replicated on every tensor-parallel rank.
        weight: [v/tp, h], this rank's shard of that output layer.
        temperature: divides the teacher's logits.
    """

    hidden: Tensor
    weight: Tensor
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[:-1].numel()

    @property
    def bytes_per_token(self) -> int:
        return len(self.weight) * self.weight.dtype.itemsize

    def rows(self, part: slice) -> Tensor:
        hidden = self.hidden.detach().reshape(-1, self.hidden.shape[-1])[part]
        return hidden.to(self.weight.dtype) @ self.weight.detach().t()


Target = FullTarget | TopKTarget

NORMALIZATION_TOLERANCE = 1e-2
"""How far the mass of a cached target may be from 1: half-precision log-probs of 64 tokens may be off by 1e-3."""


def check_target(target: Target, num_tokens: int, shard: VocabShard) -> None:
    """Raises `RecipeError` where shapes don't fit; looks at no values."""
    if isinstance(target, TopKTarget):
        entries = (num_tokens, target.indices.shape[-1])
        found = {
            "indices": (tuple(target.indices.shape), entries),
            "log_probs": (tuple(target.log_probs.shape), entries),
            "tail_log_prob": (tuple(target.tail_log_prob.shape), (num_tokens,)),
        }
    elif isinstance(target, LiveTarget):
        found = {"logits": ((target.num_tokens, target.logits.shape[-1]), (num_tokens, shard.width))}
    elif isinstance(target, HiddenTarget):
        found = {
            "weight": (tuple(target.weight.shape), (shard.width, target.hidden.shape[-1])),
            "tokens": ((target.num_tokens,), (num_tokens,)),
        }
    else:
        found = {"tokens": ((target.num_tokens,), (num_tokens,))}
    for name, (actual, expected) in found.items():
        if actual != expected:
            raise RecipeError(
                f"the target's {name} of shape {actual} don't fit {num_tokens} tokens and {shard.width} columns of the "
                f"policy: expected {expected}"
            )
    if not isinstance(target, TopKTarget) and not target.temperature > 0:
        raise RecipeError(f"the target's temperature must be above 0, not {target.temperature}")


def unnormalized_tokens(target: TopKTarget) -> Tensor:
    """Bool [n]: tokens whose entries and tail don't add up to 1, or whose entries of some mass name no token."""
    probs = target.log_probs.float().exp()
    mass = probs.sum(dim=-1) + target.tail_log_prob.float().exp()
    nameless = ((target.indices < 0) & (probs > 0)).any(dim=-1)
    return ~((mass - 1.0).abs() <= NORMALIZATION_TOLERANCE) | nameless


def why_unnormalized(target: TopKTarget, position: int) -> str:
    """What is wrong with one of `unnormalized_tokens`, for a message."""
    indices, log_probs, tail = target.indices[position], target.log_probs[position], target.tail_log_prob[position]
    if bool(((indices < 0) & (log_probs > -torch.inf)).any()):
        return f"gives mass to no token: an index is below 0 in {indices.tolist()}"
    mass = float(log_probs.double().exp().sum() + tail.double().exp())
    return f"isn't a distribution: its {len(indices)} entries and its tail add up to {mass:.6g}"


def flatten_topk(target: TopKTarget) -> TopKTarget:
    """The same with one leading dimension."""
    k = target.indices.shape[-1]
    return TopKTarget(
        target.indices.reshape(-1, k).long(), target.log_probs.reshape(-1, k), target.tail_log_prob.reshape(-1)
    )


def topk_rows(target: TopKTarget, part: slice) -> TopKTarget:
    """Some tokens of a flat target."""
    return TopKTarget(target.indices[part], target.log_probs[part], target.tail_log_prob[part])
