"""What a process of a stage keeps in memory whatever the batch: weights, gradients, optimizer, the output layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_erpd.checkpoint.families import ModelShape
from megatron_erpd.checkpoint.parallel_layout import check_expert_groups
from megatron_erpd.checkpoint.parameter_count import VOCABULARY_MULTIPLE, count_parameters, parameters_per_process
from megatron_erpd.errors import LayoutError
from megatron_erpd.pipeline.stages import RUNS_MODEL, Stage

WEIGHT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4
"""Megatron's buffer of gradients is fp32 for both (bf16 turns on `accumulate_allreduce_grads_in_fp32`)."""
OPTIMIZER_BYTES: Mapping[str, int] = {"fp32": 8, "bf16": 12}
"""Adam's two moments in fp32; beside bf16 weights the fp32 copy of them that is updated."""
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer"
UNCOUNTED_FLAGS = (
    *("--use-precision-aware-optimizer", "--optimizer-cpu-offload", "--optimizer", "--grad-reduce-in-bf16"),
    *("--use-megatron-fsdp", "--use-torch-fsdp2", "--num-layers-per-virtual-pipeline-stage"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
    *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers", "--fp8-param-gather"),
)
"""Flags of Megatron's that change the figures in ways that are not counted here."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the process that holds the most. Activations are not among them.

    That is one of the last pipeline stage, which has the output layer; its figures are added to the parameters of a
    stage before it where that holds a layer more and so is the larger.

    Attributes:
        parameters: of one policy, in this process.
        weights, gradients, optimizer: of the policy in training; 0 where none is.
        num_frozen: policies beside it that only run forward.
        frozen: their weights; on policy the sampler's whole model; for targets from cached hidden states the output
            layers of their policies.
        output_layer: a chunk of logits; in training also the fp32 sum of the layer's gradient, which there is unless
            Apex adds it to the buffer of gradients.
    """

    stage: str
    precision: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    num_frozen: int
    frozen: int
    output_layer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.frozen + self.output_layer


def stage_memory(stage: Stage, shape: ModelShape) -> StageMemory:
    """The memory of a stage that runs the model.

    Raises:
        LayoutError: its layout doesn't fit the model; names the stage.
    """
    layout = stage.layout
    weight_bytes, trains = WEIGHT_BYTES[layout.precision], stage.command != "precompute"
    try:
        held = parameters_per_process(shape, layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel)
        check_expert_groups(shape, layout, trains)
    except LayoutError as error:
        raise LayoutError(f"{stage.name}: {error}") from None
    parameters, updated = held.total, held.total
    if DISTRIBUTED_OPTIMIZER in stage.megatron:  # splits what it keeps over all copies of a parameter
        copies = layout.data_parallel * layout.context_parallel
        updated = -(-held.dense // copies) - (
            -held.experts // (copies * layout.tensor_parallel // layout.expert_parallel)
        )
    sampler = count_parameters(shape) if stage.command == "train-on-policy" else 0
    num_frozen = frozen_policies(stage)
    output_layer = _output_layer(shape, layout.tensor_parallel)
    layers = (num_policies(stage) if reads_hidden(stage) else 0) * output_layer
    return StageMemory(
        stage=stage.name,
        precision=layout.precision,
        parameters=parameters,
        weights=trains * weight_bytes * parameters,
        gradients=trains * GRADIENT_BYTES * parameters,
        optimizer=trains * OPTIMIZER_BYTES[layout.precision] * updated,
        num_frozen=num_frozen,
        frozen=weight_bytes * (num_frozen * parameters + sampler + layers),
        output_layer=layout.head_chunk_mib * 2**20 + trains * 4 * output_layer,
    )


def frozen_policies(stage: Stage) -> int:
    """Policies that a stage runs forward only: all of precompute's, live teachers, the base of an exact KL."""
    if stage.command == "precompute":
        return num_policies(stage)
    if stage.command == "train-on-policy":
        return int(stage.settings["kl_coefficient"] > 0)
    return num_policies(stage) if num_policies(stage) > 1 and not reads_hidden(stage) else 0


def num_policies(stage: Stage) -> int:
    """Policies that a stage is given by name, and the base."""
    return 1 + sum(name.startswith("policy-") for name in stage.inputs)


def reads_hidden(stage: Stage) -> bool:
    """Whether a stage makes its target of hidden states in the cache."""
    return stage.settings.get("teacher") == "hidden"


def uncounted_flags(stages: list[Stage]) -> list[str]:
    """What the stages are told that these figures don't know of."""
    given = {word.split("=")[0] for stage in stages if stage.command in RUNS_MODEL for word in stage.megatron}
    return [flag for flag in UNCOUNTED_FLAGS if flag in given]


def _output_layer(shape: ModelShape, tensor_parallel: int) -> int:
    """Parameters of the output layer in a process, padding rows included."""
    multiple = VOCABULARY_MULTIPLE * tensor_parallel
    return -(-shape.vocab_size // multiple) * VOCABULARY_MULTIPLE * shape.hidden_size
