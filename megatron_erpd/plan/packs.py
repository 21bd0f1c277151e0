"""How full the packs of a run's stages will be, of rollouts that are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_erpd.checkpoint.mapping.parallel_layout import read_schedule
from megatron_erpd.checkpoint.mapping.parameter_count import attention_length
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.data.batch import packer
from megatron_erpd.data.pack_figures import PackFigures, precompute_packs, training_packs
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollouts import PROMPT, RESPONSE
from megatron_erpd.recipe.recipe import Imported
from megatron_erpd.recipe.requests import Precompute, ReplayRequest
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.sources.files import source_files
from megatron_erpd.sources.names import local_path


def imported_files(section: Imported, source: str) -> tuple[list[Path], dict[str, str]]:
    """The files of the user's rollouts, none where they are not there yet, and their columns of token ids as
    `count_rollouts` takes them."""
    path, names = local_path(source), {"prompt": PROMPT, "response": RESPONSE}
    files = source_files(source) if path is None or path.exists() else []
    return files, {name: section.fields.get(ours, ours) for name, ours in names.items()}


def reads_the_rollouts(stage: Stage) -> bool:
    """Whether a stage runs a round's rollouts through the model; the warm-up has others."""
    return isinstance(stage.request, ReplayRequest | Precompute) and stage.name != "warm-up"


def stage_packs(stages: Sequence[Stage], shape: ModelShape, lengths: np.ndarray) -> dict[str, PackFigures]:
    """Of each stage with a token budget that reads a round's rollouts, as it will deal them.

    Args:
        lengths: int64 `[N]`, tokens of each rollout, prompt and response.
    """
    found, same = {}, dict[tuple[object, ...], PackFigures]()
    for stage in stages:
        if not reads_the_rollouts(stage) or stage.layout.pack_tokens is None:
            continue
        key = _key(stage)
        if key not in same:
            same[key] = _packs(stage, shape, lengths)
        found[stage.name] = same[key]
    return found


def _key(stage: Stage) -> tuple[object, ...]:
    """Stages that have it in common deal alike."""
    settings = stage.request.settings if isinstance(stage.request, ReplayRequest) else None
    sizes = settings and (settings.global_batch_size, settings.epochs, settings.seed)
    return stage.layout.model_dump_json(), stage.megatron, sizes


def _packs(stage: Stage, shape: ModelShape, lengths: np.ndarray) -> PackFigures:
    layout = stage.layout
    packing = packer(layout, lengths, attention_length(shape))
    if not isinstance(stage.request, ReplayRequest):
        return precompute_packs(packing.fill(np.arange(len(lengths))), packing, layout, lengths)
    settings = stage.request.settings
    order = BatchOrder(lengths, settings.global_batch_size, settings.seed)
    steps = settings.num_batches(len(lengths))
    schedule = read_schedule(stage.megatron, shape.num_layers, layout.pipeline_parallel)
    count = schedule.whole_groups(order.most_packs(packing, steps, layout.data_parallel))
    return training_packs(order, packing, layout, count, steps)
