"""How a model's layers, heads and experts are split over the ranks of a layout, and layouts that don't fit.

An expert is not split: Megatron's expert tensor parallelism is always 1 here, so that expert parallelism takes its
ranks from tensor, context and data parallelism together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.errors import LayoutError
from megatron_erpd.settings import Layout
from megatron_erpd.settings.megatron_flags import (
    LAYERS_PER_VIRTUAL_STAGE,
    MICRO_BATCH_GROUP,
    VIRTUAL_STAGES,
    value_of,
)


class Schedule(NamedTuple):
    """How micro-batches go through the pipeline stages: one forward, one backward; interleaved with virtual stages."""

    virtual_stages: int = 1
    """Chunks of layers in each pipeline stage."""
    group: int = 1
    """Micro-batches that run through a chunk before the next chunk; of the interleaved schedule alone."""

    def whole_groups(self, num_micro_batches: int) -> int:
        """At least so many micro-batches, with which the schedule runs."""
        return -(-num_micro_batches // self.group) * self.group


def check_layout(
    shape: ModelShape,
    tensor_parallel: int,
    pipeline_parallel: int,
    expert_parallel: int = 1,
    virtual_stages: int = 1,
) -> None:
    """Refuses sizes that don't divide what they split.

    Raises:
        LayoutError: names the size, what it must divide and the values that would do.
    """
    undivided = _undivided(shape, tensor_parallel)
    if undivided is not None:
        good = [str(n) for n in range(1, shape.num_heads + 1) if _undivided(shape, n) is None]
        raise LayoutError(f"tensor parallel size {tensor_parallel} does not divide {undivided}; use {_either(good)}")
    if expert_parallel != 1 and not shape.num_experts:
        raise LayoutError(
            f"expert parallel size {expert_parallel}, but {shape.family.name} is no mixture of experts; use 1"
        )
    if shape.num_experts and (expert_parallel < 1 or shape.num_experts % expert_parallel):
        raise LayoutError(
            f"expert parallel size {expert_parallel} does not divide the model's {shape.num_experts} experts; "
            f"use {_choices(shape.num_experts)}"
        )
    if virtual_stages > 1 and pipeline_parallel == 1:
        raise LayoutError(f"{virtual_stages} chunks per pipeline stage need pipeline parallelism; use 1")
    stage_layers(shape.num_layers, pipeline_parallel, virtual_stages)


def _undivided(shape: ModelShape, tensor_parallel: int) -> str | None:
    """What of a model can't be split by tensor parallelism.

    Key/value heads may be fewer than ranks: Megatron splits their projections all the same, and gathers the outputs.
    """
    heads, groups = shape.num_heads, shape.num_query_groups
    if tensor_parallel < 1 or heads % tensor_parallel:
        return f"the model's {heads} attention heads"
    if groups % tensor_parallel and tensor_parallel % groups:
        return f"the model's {groups} key/value heads, nor is it a multiple of them"
    if (rows := shape.query_size + 2 * shape.key_value_size) % tensor_parallel:
        return f"the {rows} rows of the query, key and value projections"
    if not shape.num_experts and shape.ffn_hidden_size % tensor_parallel:
        return f"the model's {shape.ffn_hidden_size} rows of the feed-forward layer"
    return None


def check_expert_groups(shape: ModelShape, layout: Layout, trains: bool) -> None:
    """Refuses a layout whose ranks can't be grouped by experts, or under which Megatron won't train a mixture.

    Raises:
        LayoutError: expert parallelism doesn't divide the ranks of a pipeline stage, or a mixture is to be trained
            under tensor parallelism without sequence parallelism.
    """
    ranks = layout.num_processes // layout.pipeline_parallel
    if ranks % layout.expert_parallel:
        raise LayoutError(
            f"expert parallel size {layout.expert_parallel} does not divide the {ranks} processes of a pipeline stage "
            f"(TP {layout.tensor_parallel} x CP {layout.context_parallel} x DP {layout.data_parallel}); use "
            f"{_choices(ranks)}, or more data parallelism"
        )
    if trains and shape.num_experts and layout.tensor_parallel > 1 and not layout.sequence_parallel:
        raise LayoutError(
            "Megatron trains a mixture of experts under tensor parallelism only with sequence parallelism (every rank "
            "would route all tokens otherwise); set sequence_parallel: true (--sequence-parallel)"
        )


def stage_layers(num_layers: int, pipeline_parallel: int, virtual_stages: int = 1) -> list[list[range]]:
    """The layers of every pipeline stage, chunk by chunk, as Megatron distributes them.

    Chunk `i` of all stages comes before chunk `i + 1` of any. Where the layers can't be split evenly, the last chunk
    has one less, or the first and the last have: `pipeline_flags` tells Megatron.

    Raises:
        LayoutError: neither gives every chunk a layer.
    """
    found = _split_layers(num_layers, pipeline_parallel, virtual_stages)
    if found is not None:
        return found
    words = f"pipeline parallel size {pipeline_parallel}"
    if virtual_stages != 1:
        words += f" with {virtual_stages} chunks each"
    good = [str(n) for n in range(1, num_layers + 1) if _split_layers(num_layers, n, virtual_stages)]
    raise LayoutError(
        f"{words} does not divide the model's {num_layers} layers, nor with one layer less on the last stage or on the "
        f"first and last; use {_either(good) if good else 'fewer chunks'}"
    )


def read_schedule(megatron: Sequence[str], num_layers: int, pipeline_parallel: int) -> Schedule:
    """The schedule that Megatron's flags ask for.

    Raises:
        LayoutError: they don't go together, or not with this many layers and stages; names the flag.
    """
    chunks, layers, group = (
        _size(megatron, flag) for flag in (VIRTUAL_STAGES, LAYERS_PER_VIRTUAL_STAGE, MICRO_BATCH_GROUP)
    )
    if chunks is not None and layers is not None:
        raise LayoutError(f"{LAYERS_PER_VIRTUAL_STAGE}: {VIRTUAL_STAGES} is given too; remove one of them")
    if chunks is None and layers is None:
        if group is not None:
            raise LayoutError(f"{MICRO_BATCH_GROUP}: there are no virtual stages; add {VIRTUAL_STAGES}, or remove it")
        return Schedule()
    given = LAYERS_PER_VIRTUAL_STAGE if chunks is None else VIRTUAL_STAGES
    if pipeline_parallel == 1:
        raise LayoutError(f"{given}: needs pipeline parallelism; raise pipeline_parallel, or remove it")
    if chunks is None:
        assert layers is not None
        fitting = [n for n in range(1, num_layers + 1) if _layers_per_chunk(num_layers, pipeline_parallel, n) == layers]
        if not fitting:
            raise LayoutError(
                f"{given} {layers}: the model's {num_layers} layers can't be split into chunks of {layers} on "
                f"{pipeline_parallel} pipeline stages; change it, or give {VIRTUAL_STAGES}"
            )
        (chunks,) = fitting
    try:
        stage_layers(num_layers, pipeline_parallel, chunks)
    except LayoutError as error:
        raise LayoutError(f"{given}: {error}") from None
    return Schedule(chunks, group or pipeline_parallel)


def check_schedule(schedule: Schedule, pipeline_parallel: int, num_micro_batches: int) -> None:
    """Refuses numbers of micro-batches with which Megatron's interleaved schedule doesn't run.

    Raises:
        LayoutError: there are fewer than stages or than in a group, or the last group has fewer than stages.
    """
    group, last = schedule.group, num_micro_batches % schedule.group
    if schedule.virtual_stages == 1:
        return
    if group < pipeline_parallel:
        raise LayoutError(
            f"{MICRO_BATCH_GROUP} {group}: is less than pipeline_parallel {pipeline_parallel}; raise it, or remove it"
        )
    if num_micro_batches < group or 0 < last < pipeline_parallel:
        raise LayoutError(
            f"virtual pipeline stages: {num_micro_batches} micro-batches of an optimizer step can't go through in "
            f"groups of {group} ({MICRO_BATCH_GROUP}, by default pipeline_parallel), of which the last may have no "
            f"fewer than pipeline_parallel {pipeline_parallel}; take a micro_batch_size or data_parallel that makes "
            f"them a multiple of {group}"
        )


def _size(megatron: Sequence[str], flag: str) -> int | None:
    value = value_of(megatron, flag)
    if value is not None and (not value.isdigit() or int(value) < 1):
        raise LayoutError(f"{flag} {value}: give a number of at least 1")
    return None if value is None else int(value)


def _layers_per_chunk(num_layers: int, pipeline_parallel: int, virtual_stages: int) -> int | None:
    """With those that the embedding and the output layer stand for; None where they can't be split so."""
    spare = _spare(num_layers, pipeline_parallel, virtual_stages)
    return None if spare is None else (num_layers + spare) // (pipeline_parallel * virtual_stages)


def pipeline_flags(num_layers: int, pipeline_parallel: int, virtual_stages: int = 1) -> dict[str, object]:
    """Megatron's arguments for layers that aren't split evenly: the embedding and the output layer count as layers."""
    spare = _spare(num_layers, pipeline_parallel, virtual_stages) or 0
    flags = ("account_for_loss_in_pipeline_split", "account_for_embedding_in_pipeline_split")
    return dict.fromkeys(flags[:spare], True)


def _spare(num_layers: int, pipeline_parallel: int, virtual_stages: int) -> int | None:
    """How many layers short of an even split: 0, 1 (on the last stage) or 2 (on the first too); None if more."""
    chunks = pipeline_parallel * virtual_stages
    if chunks < 1 or virtual_stages < 1:
        return None
    for spare in (0, 1, 2):
        per_chunk, rest = divmod(num_layers + spare, chunks)
        # The first and the last chunk are one when there is one; otherwise each can spare a layer if it has two.
        if rest == 0 and per_chunk > bool(spare):
            return spare
    return None


def _split_layers(num_layers: int, pipeline_parallel: int, virtual_stages: int) -> list[list[range]] | None:
    spare = _spare(num_layers, pipeline_parallel, virtual_stages)
    if spare is None:
        return None
    chunks = pipeline_parallel * virtual_stages
    sizes = [(num_layers + spare) // chunks] * chunks
    sizes[-1] -= spare > 0
    sizes[0] -= spare > 1
    ends = [sum(sizes[: i + 1]) for i in range(chunks)]
    ranges = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [ranges[stage::pipeline_parallel] for stage in range(pipeline_parallel)]


def _choices(*counts: int) -> str:
    return _either([str(n) for n in range(1, min(counts) + 1) if all(count % n == 0 for count in counts)])


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
