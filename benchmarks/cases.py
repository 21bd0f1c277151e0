"""What is measured: a divergence, what the policy and the target are given as, and a size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_erpd.objectives.types import DivergenceKind

Policy = Literal["logits", "hidden"]
"""The policy is given as logits that exist, or as hidden states and an output layer that makes them."""
Target = Literal["full", "topk", "hidden"]
"""The target is given as logits, as its top K tokens and the mass of all others, or as hidden states and a layer."""
Dtype = Literal["fp32", "bf16"]
Pass = Literal["forward", "forward+backward"]

PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS: tuple[DivergenceKind, ...] = ("forward_kl", "reverse_kl", "js")
TARGETS_OF_LOGITS: tuple[Target, ...] = ("full", "topk")

VOCABS = (32_000, 128_256, 151_936, 256_000)
"""Llama 2, Llama 3, Qwen and Gemma, as their checkpoints pad them."""
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
TPS = (1, 2, 4)
HIDDEN = 2048
TOPK = 64

HEADLINE_VOCAB, HEADLINE_TOKENS = 151_936, 2048
"""The size that the targets for a CPU speak of."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        vocab: of all ranks together.
        tokens: n; every rank has all of them.
        hidden: h, the width of hidden states; 0 where neither policy nor target is given by them.
    """

    policy: Policy
    target: Target
    kind: DivergenceKind
    vocab: int
    tokens: int
    tp: int
    dtype: Dtype
    hidden: int = 0

    @property
    def width(self) -> int:
        """Columns of one rank."""
        return self.vocab // self.tp

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        """Of one rank's logits."""
        return self.tokens * self.width * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Of hidden states and of one rank's part of an output layer."""
        return (self.tokens + self.width) * self.hidden * self.itemsize

    @property
    def input_bytes(self) -> int:
        """What a rank holds before it starts; a top-k target is too small to count."""
        policy = self.logits_bytes if self.policy == "logits" else self.layer_bytes
        return policy + {"full": self.logits_bytes, "topk": 0, "hidden": self.layer_bytes}[self.target]

    @property
    def result_bytes(self) -> int:
        """The gradient with respect to the policy: of its logits, or of hidden states and output layer."""
        return self.logits_bytes if self.policy == "logits" else self.layer_bytes

    @property
    def title(self) -> str:
        size = f"V={self.vocab:,} n={self.tokens:,} TP {self.tp} {self.dtype}"
        return f"{self.kind} {self.policy} against {self.target}, {size}" + (f" h={self.hidden}" * bool(self.hidden))

    def moved_bytes(self, passed: Pass) -> int:
        """What a rank must read and write at the least: every input once in each direction, the gradient once."""
        if passed == "forward":
            return self.input_bytes
        return 2 * self.input_bytes + self.result_bytes

    def products(self, passed: Pass, remade: bool = False) -> int:
        """How many matrix products of n x h x v/tp there are.

        Needed are the policy's logits and, backward, the gradients of hidden states and layer; and the target's logits.
        `remade`: backward makes the logits of both once more instead of keeping them.
        """
        if self.policy == "logits":
            return 0
        forward = 2 if self.target == "hidden" else 1
        if passed == "forward":
            return forward
        return forward + 2 + (forward if remade else 0)

    def operations(self, passed: Pass) -> int:
        """Of the products that are needed; a multiplication and an addition are two."""
        return 2 * self.products(passed) * self.tokens * self.width * self.hidden


COMBINATIONS: tuple[tuple[Policy, Target, DivergenceKind], ...] = (
    *(("logits", "full", kind) for kind in KINDS),
    *(("logits", "topk", kind) for kind in KINDS),
    *(("hidden", "hidden", kind) for kind in KINDS),
    ("hidden", "topk", "forward_kl"),
)
"""In the whole grid. With hidden states the products are what counts, so one kind is enough against a top-k."""


def grid(
    vocabs: Iterable[int],
    tokens: Iterable[int],
    tps: Sequence[int],
    dtypes: Iterable[Dtype],
    hidden: int,
) -> list[Case]:
    """Every combination at every size, the tensor-parallel sizes one after the other."""
    return [
        _case(*combination, vocab, count, tp, dtype, hidden)
        for tp, vocab, count, dtype, combination in itertools.product(tps, vocabs, tokens, dtypes, COMBINATIONS)
    ]


def quick(hidden: int) -> list[Case]:
    """Within two minutes on two CPU cores: the headline case, and the others small."""
    return [
        _case("logits", "full", "forward_kl", HEADLINE_VOCAB, HEADLINE_TOKENS, 1, "fp32", hidden),
        *(_case("logits", "full", kind, HEADLINE_VOCAB, 128, 1, "fp32", hidden) for kind in KINDS),
        _case("logits", "full", "forward_kl", HEADLINE_VOCAB, 128, 1, "bf16", hidden),
        _case("logits", "topk", "forward_kl", HEADLINE_VOCAB, 128, 1, "fp32", hidden),
        *(_case("logits", "full", "forward_kl", 32_000, count, 1, "fp32", hidden) for count in (256, 1024)),
        _case("hidden", "topk", "forward_kl", 32_000, 64, 1, "fp32", hidden),
        _case("hidden", "hidden", "forward_kl", 32_000, 64, 1, "fp32", hidden),
        *(_case("logits", target, "forward_kl", 32_000, 256, 2, "fp32", hidden) for target in ("full", "topk")),
        _case("hidden", "hidden", "forward_kl", 32_000, 32, 2, "fp32", hidden),
        *(_case("logits", target, "forward_kl", 32_000, 128, 4, "fp32", hidden) for target in ("full", "topk")),
    ]


def desk(hidden: int) -> list[Case]:
    """What two CPU cores and 24 GiB measure within an hour: the quick cases, all vocabularies, a row of lengths."""
    wide = itertools.product(TPS, VOCABS, DTYPES, TARGETS_OF_LOGITS)
    found = [
        *quick(hidden),
        *(_case("logits", "full", kind, HEADLINE_VOCAB, HEADLINE_TOKENS, 1, "fp32", hidden) for kind in KINDS),
        *(_case("logits", target, "forward_kl", vocab, 1024, tp, dtype, hidden) for tp, vocab, dtype, target in wide),
        *(_case("logits", "full", "forward_kl", 32_000, count, 1, "fp32", hidden) for count in TOKENS[1:]),
    ]
    return sorted(dict.fromkeys(found), key=lambda case: case.tp)


def _case(
    policy: Policy, target: Target, kind: DivergenceKind, vocab: int, tokens: int, tp: int, dtype: Dtype, hidden: int
) -> Case:
    uses_hidden = policy == "hidden" or target == "hidden"
    return Case(policy, target, kind, vocab, tokens, tp, dtype, hidden if uses_hidden else 0)
