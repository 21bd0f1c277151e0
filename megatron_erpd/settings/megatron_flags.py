"""Megatron's own flags: which are refused and why, and which a test of ours trains with.

Megatron's parser takes all of them, and its own checks of what goes together stay Megatron's. This is the one table;
recipes, plans, submissions and commands read it, and docs/megatron-flags.md shows it (a test compares them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


class Refusal(NamedTuple):
    """Flags that Megatron takes and that don't work here."""

    what: str
    flags: tuple[str, ...]
    reason: str
    """Follows the flag in a message; says what to do."""


REFUSED = (
    Refusal(
        "layers placed by hand",
        ("--pipeline-model-parallel-layout",),
        "which layers a process has follows from pipeline_parallel and the number of virtual stages, and plan and the "
        "conversion count on it; use num-virtual-stages-per-pipeline-rank",
    ),
    Refusal(
        "early receives of pipeline stages",
        ("--overlap-p2p-communication-warmup-flush",),
        "micro-batches differ in length, so that a stage asks for the shape first, and would wait for the next "
        "micro-batch's before it computes this one; remove it",
    ),
    Refusal(
        "gathers of parameters within the optimizer's step",
        ("--overlap-param-gather-with-optimizer-step",),
        "Megatron refuses it with distributed checkpoints, which artifacts hold; use overlap-param-gather",
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
    "tests/integration/test_virtual_stages.py": (
        "--num-virtual-stages-per-pipeline-rank",
        "--num-layers-per-virtual-pipeline-stage",
        "--microbatch-group-size-per-virtual-pipeline-stage",
    ),
}
"""A test to the flags that it trains with."""

LAYERS_PER_VIRTUAL_STAGE = "--num-layers-per-virtual-pipeline-stage"
VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
MICRO_BATCH_GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
"""The flags of Megatron's interleaved schedule, which only a training has."""

_REASONS = {flag: refusal.reason for refusal in REFUSED for flag in refusal.flags}


def refused_flags(words: Iterable[str]) -> dict[str, str]:
    """The flags of a command line that are refused, with the reason of each."""
    names = (word.partition("=")[0] for word in words)
    return {name: _REASONS[name] for name in names if name in _REASONS}


def without_refused(words: Sequence[str]) -> list[str]:
    """A command line's words without the flags that are refused and their values."""
    return _without(words, _REASONS)


def without_virtual_stages(words: Sequence[str]) -> tuple[str, ...]:
    """A command line's words without virtual pipeline stages: what a stage that doesn't train takes of them."""
    return tuple(_without(words, (LAYERS_PER_VIRTUAL_STAGE, VIRTUAL_STAGES, MICRO_BATCH_GROUP)))


def value_of(words: Sequence[str], flag: str) -> str | None:
    """What a flag was given, as two words or as one with `=`; None where it isn't there."""
    for word, following in zip(words, (*words, "")[1:], strict=True):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def _without(words: Sequence[str], flags: Collection[str]) -> list[str]:
    kept, drops = [], False
    for word in words:
        if word.startswith("--"):
            drops = word.partition("=")[0] in flags
        if not drops:
            kept.append(word)
    return kept
