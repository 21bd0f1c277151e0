"""Megatron's own flags: which are refused and why, which a test of ours trains with, and which are passed on untested.

Megatron's parser takes all of them, and its own checks of what goes together stay Megatron's. This is the one table,
and each of the parser's flags is in one place of it (a test holds that); recipes, plans, submissions and commands read
it, and docs/megatron-flags.md shows it (a test compares them). A name that ends with `*` stands for all that begin so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from megatron_erpd.settings.base import Layout


class Refusal(NamedTuple):
    """Flags that Megatron takes and that don't work here."""

    what: str
    flags: tuple[str, ...]
    reason: str
    """Follows the flag in a message; says what to do."""


REFUSED = (
    Refusal(
        "layers placed by hand",
        ("--pipeline-model-parallel-layout", "--account-for-*", "--decoder-first-*", "--decoder-last-*"),
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
            "--megatron-fsdp-*",
            "--fsdp-*",
            "--torch-fsdp2-*",
            "--enable-full-sharding-in-hsdp",
            "--init-model-with-meta-device",
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
        "fused cross entropy",
        ("--cross-entropy-*",),
        "the loss is computed by the head, chunk by chunk, so it would do nothing; remove it",
    ),
    Refusal(
        "MuP",
        ("--use-mup", "--mup-*"),
        "it scales the logits, which the head doesn't, and a model that was trained without it isn't the same with it; "
        "remove it",
    ),
    Refusal(
        "another architecture",
        (
            "--mtp-*",
            "--heterogeneous-layers-config-*",
            "--hybrid-layer-pattern",
            "--hybrid-override-pattern",
            "--is-hybrid-model",
            "--multi-latent-attention",
            "--q-lora-rank",
            "--kv-lora-rank",
            "--qk-head-dim",
            "--qk-pos-emb-head-dim",
            "--v-head-dim",
            "--rotary-scaling-factor",
            "--mscale*",
            "--cache-mla-latents",
            "--mla-down-proj-fusion",
            "--experimental-attention-variant",
            "--dsa-*",
            "--no-dsa-*",
            "--disable-dsa-*",
            "--linear-*",
            "--mamba-*",
            "--disable-mamba-mem-eff-path",
            "--moe-use-upcycling",
            "--moe-upcycling-granularity",
            "--num-experts",
            "--moe-layer-freq",
            "--moe-ffn-hidden-size",
            "--moe-shared-expert-*",
            "--moe-latent-size",
            "--moe-mlp-glu-interleave-size",
            "--encoder-num-layers",
            "--decoder-num-layers",
            "--window-*",
            "--yarn-*",
            "--no-yarn-*",
            "--relative-attention-*",
            "--rope-type",
            "--no-rope-freq",
            "--mrope-section",
            "--use-rotary-position-embeddings",
            "--rotary-seq-len-interpolation-factor",
            "--rotary-interleaved",
            "--use-rope-scaling",
            "--rope-scaling-factor",
            "--no-position-embedding",
            "--openai-gelu",
            "--squared-relu",
            "--quick-geglu",
            "--use-fused-weighted-squared-relu",
            "--glu-linear-offset",
            "--activation-func-clamp-value",
            "--softmax-type",
            "--fp32-residual-connection",
            "--apply-residual-connection-post-layernorm",
            "--apply-layernorm-1p",
            "--apply-query-key-layer-scaling",
            "--qk-l2-norm",
            "--qk-clip*",
            "--attention-output-gate",
            "--spec",
            "--yaml-cfg",
            "--use-checkpoint-args",
            "--use-mp-args-from-checkpoint-args",
        ),
        "the model's architecture is that of its config.json, and its checkpoint has no weights for another; remove it",
    ),
    Refusal(
        "another routing",
        (
            "--moe-router-topk*",
            "--moe-router-num-groups",
            "--moe-router-group-topk",
            "--moe-router-pre-softmax",
            "--moe-router-score-function",
            "--moe-router-dtype",
            "--moe-router-enable-expert-bias",
            "--moe-router-bias-update-rate",
            "--moe-router-quantile-balancing-ema",
            "--moe-router-force-*",
            "--moe-router-load-balancing-type",
            "--moe-enable-routing-replay",
            "--moe-aux-loss-coeff",
            "--moe-z-loss-coeff",
            "--moe-input-jitter-eps",
            "--moe-expert-capacity-factor",
            "--moe-expert-rank-capacity-factor",
            "--moe-pad-expert-input-to-capacity",
            "--moe-token-drop-policy",
            "--moe-apply-probs-on-input",
        ),
        "a mixture chooses a token's experts as its config.json says, drops no token, and adds nothing to the loss; "
        "remove it",
    ),
    Refusal(
        "FP8 and FP4",
        (
            "--fp8-*",
            "--no-fp8-*",
            "--disable-fp8-*",
            "--fp4-*",
            "--first-last-layers-bf16",
            "--num-layers-at-start-in-bf16",
            "--num-layers-at-end-in-bf16",
            "--te-precision-config-file",
            "--kitchen-*",
            "--use-kitchen-attention",
            "--reuse-grad-buf-for-mxfp8-param-ag",
            "--keep-fp8-transpose-cache",
            "--moe-router-padding-for-*",
        ),
        "its products want tokens in multiples of 16 or more, and a micro-batch has as many as its rollouts; artifacts "
        "record fp32 or bf16; set layout.precision (--precision)",
    ),
    Refusal(
        "fixed shapes",
        (
            "--cuda-graph-*",
            "--enable-cuda-graph",
            "--external-cuda-graph",
            "--tp-comm-*",
            "--no-tp-comm-*",
            "--disable-tp-comm-*",
        ),
        "needs micro-batches of one shape, and here each is as long as its longest rollout; remove it",
    ),
    Refusal(
        "batches that Megatron makes",
        (
            "--rampup-batch-size",
            "--step-batch-size-schedule",
            "--decrease-batch-size-if-needed",
            "--hybrid-context-parallel",
            "--train-samples",
            "--iterations-to-skip",
            "--phase-transition-iterations",
        ),
        "the order of the rollouts and the number of steps follow from one global batch size; remove it",
    ),
    Refusal(
        "other schedules",
        (
            "--lr-warmup-fraction",
            "--lr-warmup-samples",
            "--lr-warmup-init",
            "--lr-decay-samples",
            "--lr-wsd-*",
            "--override-opt*",
            "--use-checkpoint-opt*",
            "--start-weight-decay",
            "--end-weight-decay",
            "--weight-decay-incr-style",
        ),
        "rates follow from learning_rate, min_learning_rate, warmup_fraction and weight_decay; set these",
    ),
    Refusal(
        "another optimizer",
        ("--optimizer", "--sgd-momentum", "--muon-*", "--lion-*"),
        "the settings are Adam's (adam_beta1, adam_beta2), and so is what a checkpoint must hold; remove it",
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
            "--per-dataset-sequences-path",
            "--mock-data",
            "--split",
            "--sft*",
            "--fim-*",
            "--data-cache-path",
            "--dataloader-fast-cache-load",
            "--dataloader-defer-npy-index-mmap",
            "--dataloader-inter-document-masking",
            "--no-mmap-bin-files",
            "--encoder-seq-length",
            "--decoder-seq-length",
            "--sample-rate",
            "--mask-prob",
            "--short-seq-prob",
            "--num-workers",
            "--num-dataset-builder-threads",
            "--object-storage-cache-path",
            "--mid-level-dataset-surplus",
            "--reset-position-ids",
            "--reset-attention-mask",
            "--eod-mask-loss",
            "--allow-ambiguous-pad-tokens",
            "--start-eval-at-iter",
            "--eval-global-batch-size",
            "--eval-micro-batch-size",
            "--test-mode",
            "--full-validation",
            "--multiple-validation-sets",
            "--validation-set-names",
            "--log-validation-ppl-to-tensorboard",
        ),
        "a stage reads rollouts and none of Megatron's data sets, so it would do nothing; remove it",
    ),
    Refusal(
        "tokenizers",
        (
            "--tokenizer-*",
            "--no-tokenizer-*",
            "--disable-tokenizer-*",
            "--no-use-tokenizer-*",
            "--disable-use-tokenizer-*",
            "--tiktoken-*",
            "--null-tokenizer-*",
            "--vocab-file",
            "--vocab-extra-ids",
            "--merge-file",
            "--padded-vocab-size",
            "--no-pad-vocab-size",
            "--disable-pad-vocab-size",
            "--trust-remote-code",
            "--chat-template",
        ),
        "rollouts are token ids, made with the tokenizer of the model's folder; remove it",
    ),
    Refusal(
        "another precision",
        (
            "--fp16*",
            "--loss-scale*",
            "--initial-loss-scale",
            "--min-loss-scale",
            "--hysteresis",
            "--no-log-loss-scale-to-tensorboard",
            "--disable-log-loss-scale-to-tensorboard",
        ),
        "the layout's precision is fp32 or bf16, and artifacts record it; set layout.precision (--precision)",
    ),
    Refusal(
        "other loops of Megatron's",
        ("--perform-rl-step", "--rl-*", "--no-rl-*", "--grpo-*", "--langrl-env-config", "--refit-method", "--logits-*"),
        "Megatron's own RL and distillation replace the batches and the loss that the stage makes; remove it",
    ),
    Refusal(
        "Megatron's inference",
        (
            "--inference-*",
            "--no-inference-*",
            "--max-tokens-to-oom",
            "--output-bert-embeddings",
            "--bert-embedder-type",
            "--use-legacy-static-engine",
            "--decode-only-cuda-graphs",
            "--enable-chunked-prefill",
            "--num-speculative-tokens",
            "--use-same-sampling-seed-across-dp-ranks",
            "--flash-decode",
            "--nccl-all-reduce-for-prefill",
            "--mlp-chunks-for-*",
            "--symmetric-ar-type",
            "--moe-pad-experts-for-cuda-graph-inference",
        ),
        "policies are sampled from by rollouts.engine, so it would do nothing; remove it",
    ),
    Refusal(
        "vision and retrieval",
        (
            "--ict-*",
            "--biencoder-*",
            "--bert-load",
            "--bert-no-binary-head",
            "--titles-data-path",
            "--query-in-block-prob",
            "--use-one-sent-docs",
            "--evidence-data-path",
            "--retriever-*",
            "--block-data-path",
            "--embedding-path",
            "--indexer-*",
            "--num-classes",
            "--img-*",
            "--num-channels",
            "--patch-dim",
            "--classes-fraction",
            "--data-per-class-fraction",
            "--no-data-sharding",
            "--head-lr-mult",
            "--vision-*",
            "--swin-*",
            "--mask-type",
            "--mask-factor",
            "--iter-per-epoch",
            "--dino-*",
        ),
        "is of Megatron's programs for images and retrieval, and would do nothing; remove it",
    ),
    Refusal(
        "trainings that train nothing",
        ("--skip-train", "--freeze-all-layers"),
        "the training would end without an update; remove it",
    ),
    Refusal(
        "unchecked gradients",
        ("--no-check-for-nan-in-loss-and-grad",),
        "a NaN would go into the weights and be saved, where a training ends before that step; remove it",
    ),
    Refusal(
        "checkpoints",
        (
            "--finetune",
            "--ckpt-convert-*",
            "--ckpt-step",
            "--override-ckpt-iteration",
            "--load-main-params-from-ckpt",
            "--no-load-optim",
            "--no-load-rng",
            "--no-save-optim",
            "--no-save-rng",
            "--exit-on-missing-checkpoint",
            "--auto-detect-ckpt-format",
            "--use-dist-ckpt",
            "--dist-ckpt-format",
            "--dist-ckpt-strictness",
            "--dist-ckpt-save-pre-mcore-014",
            "--ckpt-fully-parallel-save",
            "--no-strict-fsdp-dtensor-load",
            "--disable-strict-fsdp-dtensor-load",
        ),
        "a training that resumes would lose its step or its optimizer's state, or load other than what it saved; "
        "remove it",
    ),
    Refusal(
        "checkpoints elsewhere",
        ("--non-persistent-*", "--replication*", "--persistent-save-interval"),
        "a training resumes from its own folder, whose saves follow from checkpoints and save_interval; set these",
    ),
    Refusal(
        "asynchronous saves",
        ("--async-save", "--async-strategy", "--async-ckpt-use-cpu-shm", "--use-persistent-ckpt-worker"),
        "is set as one; set layout.async_save (--async-save before the `--`)",
    ),
    Refusal(
        "other signals",
        ("--exit-signal", "--exit-signal-handler-for-*"),
        "a stage is asked by SIGTERM to save and to end; remove it",
    ),
    Refusal(
        "restarts by Megatron",
        ("--inprocess-*", "--enable-ft-package", "--calc-ft-timeouts", "--ft-num-warmup-iters", "--adlr-*"),
        "what the stage keeps beside Megatron's state would not begin anew; `run` and `submit` resume it; remove it",
    ),
    Refusal(
        "processes without communication",
        ("--fake-process-group",),
        "collectives would do nothing, and what they compute would be wrong; remove it",
    ),
    Refusal(
        "former names",
        ("--batch-size", "--warmup", "--model-parallel-size", "--checkpoint-activations", "--use-mcore-models"),
        "Megatron takes it no more; remove it",
    ),
)


class RefusedValue(NamedTuple):
    """A value of a flag that doesn't go with some layouts: what Transformer Engine's attention doesn't compute."""

    flag: str
    value: str
    layouts: str
    """In words; `refused_values` has them as conditions."""
    reason: str
    """Follows flag and value in a message; says what to do."""


_PACKS_IN_CP, _PACKS_OR_CP = "packs with context parallelism", "packs, or context parallelism"
_FP32, _HEADS = "fp32 with packs or context parallelism", "context parallelism that doesn't divide a rank's heads"
REFUSED_VALUES = (
    RefusedValue(
        "--cp-comm-type",
        "a2a+p2p",
        _PACKS_IN_CP,
        "Transformer Engine's hierarchical context parallelism takes no packs (an assertion ends the first step); take "
        "p2p or a2a, or give micro_batch_size",
    ),
    RefusedValue(
        "--cp-comm-type",
        "all_gather",
        _PACKS_IN_CP,
        "Transformer Engine takes no packs with it before a version of 2026 (an assertion ends the first step); take "
        "p2p or a2a, or give micro_batch_size",
    ),
    RefusedValue(
        "--cp-comm-type",
        "a2a",
        _HEADS,
        "each context-parallel rank gets a share of the query heads and of the key/value heads that a tensor-parallel "
        "rank has, which context_parallel must divide; take p2p",
    ),
    RefusedValue(
        "--attention-backend",
        "unfused",
        _PACKS_OR_CP,
        "Transformer Engine's unfused attention takes neither, and keeps the scores; remove it",
    ),
    RefusedValue(
        "--transformer-impl",
        "transformer_engine",
        _FP32,
        "Transformer Engine has only its unfused attention in fp32, which takes neither; without the flag Megatron's "
        "own layers are taken, with the attention here; remove it, or set layout.precision: bf16",
    ),
)

WORKS = {
    "tests/integration/test_stage_ends.py": ("--exit-interval",),
    "tests/integration/test_megatron_flags.py": (
        "--log-params-norm",
        "--log-num-zeros-in-grad",
        "--timing-log-level",
        "--manual-gc",
        "--manual-gc-interval",
        "--check-weight-hash-across-dp-replicas-interval",
        "--verify-integrity",
    ),
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
    "tests/integration/test_deterministic.py": ("--deterministic-mode",),
}
"""A test to the flags that it trains with."""

LAYERS_PER_VIRTUAL_STAGE = "--num-layers-per-virtual-pipeline-stage"
VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
MICRO_BATCH_GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
"""The flags of Megatron's interleaved schedule, which only a training has."""

PASSED = {
    "communication": (
        "--cp-comm-type",
        "--hierarchical-context-parallel-sizes",
        "--max-seqlen-per-dp-cp-rank",
        "--ddp-num-buckets",
        "--ddp-pad-buckets-for-high-nccl-busbw",
        "--ddp-average-in-collective",
        "--ddp-reduce-scatter-with-fp32-accumulation",
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        "--grad-reduce-in-bf16",
        "--accumulate-allreduce-grads-in-fp32",
        "--num-distributed-optimizer-instances",
        "--no-align-*",
        "--disable-align-*",
        "--no-use-layer-wise-param-layout",
        "--no-gradient-reduce-div-fusion",
        "--create-all-gather-group",
        "--suggested-communication-unit-size",
        "--no-overlap-p2p-communication",
        "--pipeline-model-parallel-comm-backend",
        "--use-ring-exchange-p2p",
        "--no-clone-scatter-output-in-embedding",
        "--disable-clone-scatter-output-in-embedding",
        "--distributed-*",
        "--local-rank",
        "--lazy-mpu-init",
        "--nccl-communicator-config-path",
        "--use-nccl-ub",
        "--disable-symmetric-registration",
        "--use-tp-pp-dp-mapping",
        "--disable-gloo-process-groups",
        "--use-sharp",
        "--sharp-enabled-group",
        "--high-priority-*",
        "--flight-recorder-*",
        "--no-flight-recorder-*",
        "--disable-flight-recorder-*",
    ),
    "kernels": (
        "--transformer-impl",
        "--attention-backend",
        "--flash-attention-version",
        "--use-flash-attn",
        "--use-te-activation-func",
        "--use-transformer-engine-op-fuser",
        "--use-grouped-gemm-for-*",
        "--fused-residual-rmsnorm",
        "--no-masked-softmax-fusion",
        "--no-bias-*",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
        "--disable-jit-fuser",
        "--disable-bf16-reduced-precision-matmul",
        "--batch-invariant-mode",
        "--enable-experimental",
        "--onnx-safe",
    ),
    "random numbers and initial weights, which are loaded": (
        "--te-rng-tracker",
        "--data-parallel-random-init",
        "--init-method-*",
        "--embedding-init-method-std",
        "--no-initialization",
        "--use-cpu-initialization",
    ),
    "optimizer": (
        "--adam-eps",
        "--decoupled-*",
        "--apply-wd-to-qk-layernorm",
        "--no-weight-decay-cond-type",
        "--optimizer-cuda-graph",
        "--optimizer-cpu-offload",
        "--optimizer-offload-fraction",
        "--use-torch-optimizer-for-cpu-offload",
        "--overlap-cpu-optimizer-d2h-h2d",
        "--no-pin-cpu-*",
        "--use-precision-aware-optimizer",
        "--main-grads-dtype",
        "--main-params-dtype",
        "--exp-avg-*",
        "--dump-param-to-param-group-map",
    ),
    "memory": (
        "--recompute-activations",
        "--distribute-saved-activations",
        "--cpu-offloading-*",
        "--fine-grained-*",
        "--offload-modules",
        "--min-offloaded-tensor-size",
        "--delay-offload-until-cuda-graph",
        "--delta-offload-bytes-across-pp-ranks",
        "--activation-offload-fraction",
        "--empty-unused-memory-level",
    ),
    "mixtures": (
        "--moe-grouped-gemm",
        "--moe-single-grouped-*",
        "--moe-permute-fusion*",
        "--moe-router-fusion",
        "--moe-layer-recompute",
        "--moe-per-layer-logging",
        "--moe-enable-deepep",
        "--moe-flex-*",
        "--moe-deepep-*",
        "--moe-hybridep-*",
        "--moe-ncclep-*",
        "--moe-paged-stash*",
        "--moe-routing-trace-*",
    ),
    "the checkpoint's files": (
        "--no-ckpt-*",
        "--disable-ckpt-*",
        "--ckpt-fully-parallel-load*",
        "--ckpt-fully-parallel-save-process-group",
        "--ckpt-assume-constant-structure",
        "--distrib-optim-fully-reshardable-mem-efficient",
        "--no-stream-ckpt-dequant",
        "--disable-stream-ckpt-dequant",
        "--dist-ckpt-workers",
        "--async-ckpt-cpu-priority",
        "--async-ckpt-io-priority",
        "--enable-msc",
        "--disable-msc",
    ),
    "what is logged, measured and dumped": (
        "--log-throughput",
        "--log-progress",
        "--log-memory-*",
        "--log-device-memory-used",
        "--log-max-attention-logit",
        "--log-energy",
        "--log-straggler",
        "--logging-level",
        "--config-logger-dir",
        "--timing-log-option",
        "--no-barrier-with-level-1-timing",
        "--tensorboard-queue-size",
        "--save-params-interval",
        "--save-activations-interval",
        "--save-tokens-per-expert-interval",
        "--save-wgrads-interval",
        "--save-dgrads-interval",
        "--profile*",
        "--use-pytorch-profiler",
        "--pytorch-profiler-*",
        "--record-*",
        "--memory-snapshot-path",
        "--nvtx-ranges",
        "--straggler-*",
        "--disable-straggler-on-startup",
        "--run-workload-inspector-server",
        "--no-one-logger",
        "--one-logger-*",
        "--app-tag-run-*",
    ),
    "checks, ends, and faults to order": (
        "--exit-duration-in-mins",
        "--no-manual-gc-eval",
        "--disable-manual-gc-eval",
        "--check-for-*",
        "--gpu-sniff-test-interval",
        "--train-sync-interval",
        "--result-rejected-tracker-filename",
        "--error-injection-*",
        "--fault-injector-*",
    ),
}
"""What flags are about to those that Megatron gets as they are, and that no test here trains with."""

_REASONS = {flag: refusal.reason for refusal in REFUSED for flag in refusal.flags if not flag.endswith("*")}
_PREFIXES = {flag[:-1]: refusal.reason for refusal in REFUSED for flag in refusal.flags if flag.endswith("*")}


def _reason(name: str) -> str | None:
    """Why a flag is refused; None where it isn't."""
    found = _REASONS.get(name)
    return found or next((reason for start, reason in _PREFIXES.items() if name.startswith(start)), None)


def refused_flags(words: Iterable[str]) -> dict[str, str]:
    """The flags of a command line that are refused, with the reason of each."""
    names = (word.partition("=")[0] for word in words)
    return {name: reason for name in names if (reason := _reason(name))}


def refused_values(words: Sequence[str], layout: Layout, heads: int, groups: int) -> list[str]:
    """What of a command line's flags doesn't go with a layout, each as `flag value: reason`.

    Args:
        heads, groups: of the model's queries, and of its keys and values.
    """
    packs, split = layout.pack_tokens is not None, layout.context_parallel > 1
    shared = layout.tensor_parallel * layout.context_parallel
    holds = {
        _PACKS_IN_CP: packs and split,
        _PACKS_OR_CP: packs or split,
        _FP32: layout.precision == "fp32" and (packs or split),
        _HEADS: split and bool(heads % shared or groups % shared),
    }
    return [
        f"{item.flag} {item.value}: {item.reason}"
        for item in REFUSED_VALUES
        if holds[item.layouts]
        and item.value.replace("_", "") in (v.replace("_", "") for v in _values(words, item.flag))
    ]


def _values(words: Sequence[str], flag: str) -> list[str]:
    """All that a flag was given, as words after it or as one with `=`."""
    found: list[str] = []
    for at, word in enumerate(words):
        if word.startswith(flag + "="):
            found.append(word.partition("=")[2])
        elif word == flag:
            found += takewhile(lambda following: not following.startswith("--"), words[at + 1 :])
    return found


def without_refused(words: Sequence[str]) -> list[str]:
    """A command line's words without the flags that are refused and their values."""
    return _without(words, refused_flags(words))


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
