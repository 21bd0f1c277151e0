"""Times of a run's stages: operations over speed, which is given or measured by a finished training."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.checkpoint.mapping.parallel_layout import read_schedule
from megatron_erpd.checkpoint.mapping.parameter_count import active_parameters
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.manifest import read_manifest
from megatron_erpd.plan.activations import recompute_of
from megatron_erpd.plan.cache import forward_flop, training_flop
from megatron_erpd.plan.memory import frozen_policies, global_batch_size, micro_batches
from megatron_erpd.recipe.requests import ReplayRequest
from megatron_erpd.recipe.stages import Stage

ITERATION_TIME, WORLD_SIZE = "iteration-time", "world-size"
"""Names of Megatron's in a training's `metrics.jsonl`: seconds of a step, and processes."""


@dataclass(frozen=True)
class RolloutSize:
    """Rollouts of a round, and how many tokens they have on average, the prompt's among them."""

    count: int
    mean_tokens: float


@dataclass(frozen=True)
class StageTime:
    """What a stage will take.

    Attributes:
        seconds: None where it can't be known.
        is_done: the stage has taken this time.
        flop: floating-point operations of all devices; None where they aren't counted.
    """

    stage: str
    seconds: float | None
    is_done: bool
    flop: float | None


@dataclass(frozen=True)
class MeasuredSpeed:
    """What a device reached in a finished training of the run, in units of 1e12 operations per second."""

    stage: str
    teraflops: float


def stage_flop(stage: Stage, shape: ModelShape, rollouts: RolloutSize) -> float | None:
    """Operations of a stage on a round's rollouts; None for stages whose time isn't a matter of operations.

    Forward 2 per parameter and token, and 2 per query element and earlier token for each of attention's two products,
    over the mean of earlier tokens; backward twice that; once more forward where all layers are recomputed.
    """
    tokens = _tokens(stage, rollouts)
    if tokens is None:
        return None
    parameters, frozen = active_parameters(shape), frozen_policies(stage)
    attention = 2 * shape.num_layers * shape.query_size * rollouts.mean_tokens  # half of the square is masked
    if stage.command == "precompute":
        return tokens * (forward_flop(parameters, frozen) + frozen * attention)
    again = recompute_of(stage.megatron).granularity == "full"
    per_token = training_flop(parameters, frozen) + again * forward_flop(parameters)
    return tokens * (per_token + (3 + again + frozen) * attention)


def bubble(stage: Stage, shape: ModelShape, rollouts: RolloutSize, packs: int | None = None) -> float:
    """Time of a pipeline's pass over that without waiting at its ends: 1 + (PP - 1) / (micro-batches x virtual stages)
    (Narayanan et al., 2021, arXiv 2104.04473, section 2.2). A pass is an optimizer step; of precompute, all
    rollouts.

    Args:
        packs: of a rank in a pass, where they are counted; None estimates them by the mean of the rollouts.
    """
    layout, stages = stage.layout, stage.layout.pipeline_parallel
    schedule = read_schedule(stage.megatron, shape.num_layers, stages)
    if packs is not None:
        count = packs
    elif global_batch_size(stage):
        count = micro_batches(stage, schedule, rollouts.mean_tokens)
    elif layout.pack_tokens is None:
        count = math.ceil(rollouts.count / layout.batch_unit)
    else:
        count = math.ceil(rollouts.count * rollouts.mean_tokens / (layout.data_parallel * layout.pack_tokens))
    return 1 + (stages - 1) / (max(1, count) * schedule.virtual_stages)


def stage_times(
    stages: Sequence[Stage],
    done: Collection[str],
    shape: ModelShape,
    rollouts: RolloutSize | None,
    teraflops: float,
    packs: Mapping[str, int],
) -> list[StageTime]:
    """Times of all stages; done ones as their manifests have them.

    Args:
        done: names of those.
        teraflops: that a device reaches.
        packs: of a rank in a pass, by the names of stages for which they are counted.
    """
    found = []
    for stage in stages:
        took = _took(stage.output) if stage.name in done else None
        flop, estimated = stage_flop(stage, shape, rollouts) if rollouts else None, None
        if rollouts and flop is not None:
            waits = bubble(stage, shape, rollouts, packs.get(stage.name))
            estimated = flop * waits / (teraflops * 1e12 * stage.num_processes)
        found.append(StageTime(stage.name, estimated if took is None else took, took is not None, flop))
    return found


def measured_speed(done: Sequence[Stage], shape: ModelShape, rollouts: RolloutSize | None) -> MeasuredSpeed | None:
    """The speed of the last finished training on fixed rollouts that has logged its steps; None where none has.

    The median step counts: the first ones are slow, and a save now and then is.
    """
    for stage in reversed(done):
        metrics = stage.output / "metrics.jsonl"
        if rollouts is None or not isinstance(stage.request, ReplayRequest) or not metrics.is_file():
            continue
        rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if ITERATION_TIME in row]
        flop = stage_flop(stage, shape, rollouts)
        if not rows or flop is None or any(WORLD_SIZE not in row for row in rows):
            continue
        seconds = statistics.median(row[ITERATION_TIME] * row[WORLD_SIZE] for row in rows)
        step = flop * bubble(stage, shape, rollouts) / stage.request.settings.num_batches(rollouts.count)
        return MeasuredSpeed(stage.name, step / seconds / 1e12)
    return None


def _tokens(stage: Stage, rollouts: RolloutSize) -> float | None:
    """That run through the model."""
    if stage.command == "precompute":
        return rollouts.count * rollouts.mean_tokens
    if isinstance(stage.request, ReplayRequest) and stage.name != "warm-up":  # which reads other rollouts
        settings = stage.request.settings
        return settings.num_batches(rollouts.count) * settings.global_batch_size * rollouts.mean_tokens
    return None  # on policy the sampling takes most of the time


def _took(output: Path) -> float | None:
    seconds = read_manifest(output).summary.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None
