"""Memory of a stage's process: weights, gradients, optimizer, output layer, activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_erpd.checkpoint.mapping.parallel_layout import (
    Schedule,
    check_expert_groups,
    check_schedule,
    read_schedule,
    stage_layers,
)
from megatron_erpd.checkpoint.mapping.parameter_count import (
    VOCABULARY_MULTIPLE,
    ProcessParameters,
    count_parameters,
    parameters_per_stage,
)
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.errors import LayoutError
from megatron_erpd.plan.activations import (
    MicroBatch,
    head_bytes,
    in_flight,
    layer_bytes,
    recompute_of,
    training_bytes,
)
from megatron_erpd.recipe.requests import Distill, Precompute, ReplayRequest, TrainOnPolicy
from megatron_erpd.recipe.stages import Stage

WEIGHT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4
"""Megatron's buffer of gradients is fp32 for both (bf16 turns on `accumulate_allreduce_grads_in_fp32`)."""
OPTIMIZER_BYTES: Mapping[str, int] = {"fp32": 8, "bf16": 12}
"""Adam's two moments in fp32; beside bf16 weights the fp32 copy of them that is updated."""
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"
UNCOUNTED_FLAGS = (
    *("--use-precision-aware-optimizer", "--optimizer-cpu-offload", "--optimizer", "--grad-reduce-in-bf16"),
    *("--use-megatron-fsdp", "--use-torch-fsdp2"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
    *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers", "--fp8-param-gather"),
    *("--recompute-modules", "--distribute-saved-activations", "--cpu-offloading", "--attention-backend"),
    *("--fp8-format", "--tp-comm-overlap", "--moe-expert-capacity-factor"),
)
"""Flags of Megatron's that change the figures in ways that are not counted here."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the process that holds the most: one of the pipeline stage `pipeline_stage`.

    That is the last one, which has the output layer, or the first, which in training keeps the activations of the
    most micro-batches.

    Attributes:
        parameters: of one policy, in this process.
        weights, gradients, optimizer: of the policy in training; 0 where none is.
        num_frozen: policies beside it that only run forward.
        frozen: their weights; on policy the sampler's whole model; for targets from cached hidden states the output
            layers of their policies. Precompute has one policy at a time, and the output layers of the others.
        output_layer: a chunk of logits; in training also the fp32 sum of the layer's gradient, which there is unless
            it is added to the buffer of gradients (gradient accumulation fusion, which wants Transformer Engine or
            Apex).
        activations: of the longest micro-batch; None where the length of the rollouts isn't known.
    """

    stage: str
    precision: str
    pipeline_stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    num_frozen: int
    frozen: int
    output_layer: int
    activations: int | None

    @property
    def total(self) -> int:
        """All that is known."""
        known = self.weights + self.gradients + self.optimizer + self.frozen + self.output_layer
        return known + (self.activations or 0)


def stage_memory(stage: Stage, shape: ModelShape, longest: int | None = None, on_gpu: bool = True) -> StageMemory:
    """The memory of a stage that runs the model.

    Args:
        longest: tokens of the longest rollout; None leaves the activations open.
        on_gpu: whether it runs on GPUs, where attention in fp32 keeps more.

    Raises:
        LayoutError: its layout doesn't fit the model; names the stage.
        RecipeError: its flags ask for a recomputation that Megatron doesn't know.
    """
    layout = stage.layout
    try:
        schedule = read_schedule(stage.megatron, shape.num_layers, layout.pipeline_parallel)
        sizes = (layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel)
        held = parameters_per_stage(shape, *sizes, schedule.virtual_stages)
        check_expert_groups(shape, layout, stage.command != "precompute")
        check_schedule(schedule, layout.pipeline_parallel, micro_batches(stage, schedule))
    except LayoutError as error:
        raise LayoutError(f"{stage.name}: {error}") from None
    found = [_process_memory(stage, shape, schedule, number, here, longest, on_gpu) for number, here in enumerate(held)]
    return max(reversed(found), key=lambda process: process.total)


def _process_memory(
    stage: Stage,
    shape: ModelShape,
    schedule: Schedule,
    number: int,
    held: ProcessParameters,
    longest: int | None,
    on_gpu: bool,
) -> StageMemory:
    """Of a process of one pipeline stage."""
    layout = stage.layout
    weight_bytes, trains = WEIGHT_BYTES[layout.precision], stage.command != "precompute"
    is_last = number == layout.pipeline_parallel - 1
    parameters, updated = held.total, held.total
    if DISTRIBUTED_OPTIMIZER in stage.megatron:  # shards its state over the replicas of a parameter
        copies = layout.data_parallel * layout.context_parallel
        updated = -(-held.dense // copies) - (
            -held.experts // (copies * layout.tensor_parallel // layout.expert_parallel)
        )
    sampler = count_parameters(shape) if stage.command == "train-on-policy" else 0
    output_layer = is_last * _output_layer(shape, layout.tensor_parallel)
    num_frozen = frozen_policies(stage)
    if trains:
        models, layers = num_frozen, num_policies(stage) if reads_hidden(stage) else 0
    else:
        models, layers = 1, num_frozen - 1
    return StageMemory(
        stage=stage.name,
        precision=layout.precision,
        pipeline_stage=number,
        parameters=parameters,
        weights=trains * weight_bytes * parameters,
        gradients=trains * GRADIENT_BYTES * parameters,
        optimizer=trains * OPTIMIZER_BYTES[layout.precision] * updated,
        num_frozen=num_frozen,
        frozen=weight_bytes * (models * parameters + sampler + layers * output_layer),
        output_layer=is_last * layout.head_chunk_mib * 2**20 + trains * 4 * output_layer,
        activations=None if longest is None else _activations(stage, shape, schedule, number, longest, on_gpu),
    )


def _activations(stage: Stage, shape: ModelShape, schedule: Schedule, number: int, longest: int, on_gpu: bool) -> int:
    """Of the largest micro-batch; without a backward pass those of a single layer."""
    layout, batch = stage.layout, MicroBatch.largest(stage.layout, longest)
    is_last, trains = number == layout.pipeline_parallel - 1, stage.command != "precompute"
    hidden = num_policies(stage) if reads_hidden(stage) else frozen_policies(stage)
    head = head_bytes(shape, layout, batch, trains, hidden) if is_last else 0
    if not trains:
        return head + layer_bytes(shape, layout, batch, on_gpu=on_gpu)
    chunks = stage_layers(shape.num_layers, layout.pipeline_parallel, schedule.virtual_stages)[number]
    layers = max(map(len, chunks))
    waiting = in_flight(layout.pipeline_parallel, number, micro_batches(stage, schedule), *schedule)
    return head + training_bytes(shape, layout, batch, recompute_of(stage.megatron), layers, waiting, on_gpu)


def global_batch_size(stage: Stage) -> int | None:
    """Rollouts in an optimizer step; None for a stage that doesn't train."""
    if isinstance(stage.request, ReplayRequest | TrainOnPolicy):
        return stage.request.settings.global_batch_size
    return None


def micro_batches(stage: Stage, schedule: Schedule, mean_tokens: float | None = None) -> int:
    """Micro-batches of an optimizer step per data-parallel rank; 1 for a stage that doesn't train.

    Args:
        schedule: for which packs are made as many as it wants.
        mean_tokens: of a rollout, by which packs are estimated; None: the most that there may be, one of each rollout.
    """
    batch, layout = global_batch_size(stage), stage.layout
    if batch is None:
        return 1
    if layout.pack_tokens is None:
        return max(1, batch // layout.batch_unit)
    count = -(-batch // layout.data_parallel)
    if mean_tokens is not None:
        count = min(count, math.ceil(batch * mean_tokens / (layout.data_parallel * layout.pack_tokens)))
    return schedule.whole_groups(max(1, count))


def frozen_policies(stage: Stage) -> int:
    """Policies that a stage runs forward only: all of precompute's, live teachers, the base of an exact KL."""
    match stage.request:
        case Precompute():
            return num_policies(stage)
        case TrainOnPolicy(settings=settings):
            return int(settings.kl_coefficient > 0)
    return num_policies(stage) if num_policies(stage) > 1 and not reads_hidden(stage) else 0


def num_policies(stage: Stage) -> int:
    """Policies that a stage is given by name, and the base."""
    return 1 + len(stage.request.policies) if isinstance(stage.request, Precompute | Distill) else 1


def reads_hidden(stage: Stage) -> bool:
    """Whether a stage makes its target of hidden states in the cache."""
    return isinstance(stage.request, Distill) and stage.request.settings.teacher == "hidden"


def uncounted_flags(stages: list[Stage]) -> list[str]:
    """What the stages are told that these figures don't know of."""
    given = {word.split("=")[0] for stage in stages for word in stage.megatron}
    return [flag for flag in UNCOUNTED_FLAGS if flag in given]


def _output_layer(shape: ModelShape, tensor_parallel: int) -> int:
    """Parameters of the output layer in a process, padding rows included."""
    multiple = VOCABULARY_MULTIPLE * tensor_parallel
    return -(-shape.vocab_size // multiple) * VOCABULARY_MULTIPLE * shape.hidden_size
