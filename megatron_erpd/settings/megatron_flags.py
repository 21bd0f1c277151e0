"""Megatron's own flags: which are refused and why, and which a test of ours trains with.

Megatron's parser takes all of them, and its own checks of what goes together stay Megatron's. This is the one table;
recipes, plans, submissions and commands read it, and docs/megatron-flags.md shows it (a test compares them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Refusal(NamedTuple):
    """Flags that Megatron takes and that don't work here."""

    what: str
    flags: tuple[str, ...]
    reason: str
    """Follows the flag in a message; says what to do."""


REFUSED = (
    Refusal(
        "virtual pipeline stages",
        (
            "--num-layers-per-virtual-pipeline-stage",
            "--num-virtual-stages-per-pipeline-rank",
            "--microbatch-group-size-per-virtual-pipeline-stage",
            "--pipeline-model-parallel-layout",
            "--overlap-p2p-communication-warmup-flush",
            "--overlap-param-gather-with-optimizer-step",
        ),
        "with virtual pipeline stages a process has several pieces of the model, and the policies that run beside the "
        "trained one, their hidden states and precompute take one; use pipeline_parallel without them",
    ),
    Refusal(
        "overlapped communication of experts",
        (
            "--overlap-moe-expert-parallel-comm",
            "--overlap-dispatch-backward-with-experts-wgrad",
            "--ep-overlap-early-attn-memory-release",
            "--delay-wgrad-compute",
        ),
        "Megatron then runs a schedule of parts of the layers, which the forward steps here don't make "
        "(return_schedule_plan); remove it",
    ),
    Refusal(
        "sharded weights",
        (
            "--use-megatron-fsdp",
            "--use-torch-fsdp2",
            "--data-parallel-sharding-strategy",
            "--outer-dp-sharding-strategy",
            "--tensor-parallel-num-weight-shards",
            "--expert-tensor-parallel-num-weight-shards",
        ),
        "the head reads the output layer's weight, of which a data-parallel rank then holds a shard; use "
        "use-distributed-optimizer, which shards the optimizer's state, and tensor_parallel",
    ),
    Refusal(
        "delayed gradient of the output layer",
        ("--defer-embedding-wgrad-compute", "--wgrad-deferral-limit"),
        "the head computes the gradient of the output layer's weight itself, chunk by chunk; remove it",
    ),
    Refusal(
        "MuP",
        ("--use-mup",),
        "it scales the logits, which the head doesn't, and a model that was trained without it isn't the same with it; "
        "remove it",
    ),
    Refusal(
        "another architecture",
        (
            "--mtp-num-layers",
            "--mtp-standalone",
            "--heterogeneous-layers-config-path",
            "--heterogeneous-layers-config-encoded-json",
            "--hybrid-layer-pattern",
            "--hybrid-override-pattern",
            "--is-hybrid-model",
            "--multi-latent-attention",
            "--experimental-attention-variant",
            "--moe-use-upcycling",
            "--spec",
            "--yaml-cfg",
            "--use-checkpoint-args",
        ),
        "the model's architecture is that of its config.json, and its checkpoint has no weights for another; remove it",
    ),
    Refusal(
        "fixed shapes",
        ("--cuda-graph-impl", "--enable-cuda-graph", "--external-cuda-graph", "--tp-comm-overlap"),
        "needs micro-batches of one shape, and here each is as long as its longest rollout; remove it",
    ),
    Refusal(
        "batches that Megatron makes",
        (
            "--rampup-batch-size",
            "--step-batch-size-schedule",
            "--decrease-batch-size-if-needed",
            "--hybrid-context-parallel",
        ),
        "the order of the rollouts and the number of steps follow from one global batch size; remove it",
    ),
    Refusal(
        "Megatron's data sets",
        (
            "--data-path",
            "--train-data-path",
            "--valid-data-path",
            "--test-data-path",
            "--data-args-path",
            "--per-split-data-args-path",
            "--mock-data",
            "--sft",
            "--fim-data",
        ),
        "a stage reads rollouts and none of Megatron's data sets, so it would do nothing; remove it",
    ),
    Refusal(
        "tokenizers",
        ("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file"),
        "rollouts are token ids, made with the tokenizer of the model's folder; remove it",
    ),
    Refusal(
        "another precision",
        ("--fp16",),
        "the layout's precision is fp32 or bf16, and artifacts record it; set layout.precision (--precision)",
    ),
    Refusal(
        "other loops of Megatron's",
        ("--perform-rl-step", "--logits-save-dir", "--logits-load-dir"),
        "Megatron's own RL and distillation replace the batches and the loss that the stage makes; remove it",
    ),
    Refusal(
        "trainings that train nothing",
        ("--skip-train", "--freeze-all-layers"),
        "the training would end without an update; remove it",
    ),
    Refusal(
        "checkpoints",
        ("--finetune", "--ckpt-convert-format"),
        "a training that resumes would lose its step and its optimizer's state, or convert them and end; remove it",
    ),
    Refusal(
        "processes without communication",
        ("--fake-process-group",),
        "collectives would do nothing, and what they compute would be wrong; remove it",
    ),
)

WORKS = {
    "tests/integration/test_overlapped_gather.py": (
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
        "--ddp-bucket-size",
    ),
    "tests/integration/test_recomputation.py": (
        "--recompute-granularity",
        "--recompute-method",
        "--recompute-num-layers",
        "--recompute-modules",
    ),
}
"""A test to the flags that it trains with."""

_REASONS = {flag: refusal.reason for refusal in REFUSED for flag in refusal.flags}


def refused_flags(words: Iterable[str]) -> dict[str, str]:
    """The flags of a command line that are refused, with the reason of each."""
    names = (word.partition("=")[0] for word in words)
    return {name: _REASONS[name] for name in names if name in _REASONS}


def without_refused(words: Sequence[str]) -> list[str]:
    """A command line's words without the flags that are refused and their values."""
    kept, drops = [], False
    for word in words:
        if word.startswith("--"):
            drops = word.partition("=")[0] in _REASONS
        if not drops:
            kept.append(word)
    return kept
