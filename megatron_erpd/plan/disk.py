"""Disk space of a run: checkpoints, exports, caches."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.checkpoint.mapping.parameter_count import count_parameters
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.plan.memory import DISTRIBUTED_OPTIMIZER, OPTIMIZER_BYTES, WEIGHT_BYTES
from megatron_erpd.recipe.requests import Export, Import, Precompute, TrainingRequest, TrainOnPolicy
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.teacher_cache.sizes import cache_size


@dataclass(frozen=True)
class DiskItem:
    """An artifact, in bytes; None where that can't be known. `is_there`: it is finished and takes no further space."""

    stage: str
    what: str
    bytes: int | None
    is_there: bool


@dataclass(frozen=True)
class DiskPlan:
    """All artifacts of the run, and the free bytes of the file system of `folder`, where it will be."""

    folder: str
    items: list[DiskItem]
    free: int

    @property
    def needed(self) -> int:
        """Bytes still to be written, as far as they are known."""
        return sum(item.bytes or 0 for item in self.items if not item.is_there)

    @property
    def is_complete(self) -> bool:
        """Whether every size is known."""
        return all(item.bytes is not None for item in self.items)

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


def disk_plan(
    folder: Path,
    stages: Sequence[Stage],
    done: Collection[str],
    shape: ModelShape | None,
    hf_dtype: int,
    counts: tuple[int, int] | None,
) -> DiskPlan:
    """What the stages write.

    Args:
        folder: of the run.
        done: names of the stages that are. What is made anew takes its space beside the former artifact.
        shape: the model's, where it is known.
        hf_dtype: bytes per parameter in the Hugging Face folder, and so in its import and in exports.
        counts: rollouts and response tokens of a round, where they are known.
    """
    items = []
    for stage in stages:
        size, what = None, ""
        match stage.request:
            case Precompute() as request:
                what = f"{request.settings.kind} cache"
                size = _cache(request, shape, counts) if shape and counts else None
            case Export() as request:
                copies = _exported(request, stages)
                what = f"{copies} Hugging Face model{'s' * (copies > 1)}"
                size = copies * count_parameters(shape) * hf_dtype if shape else None
            case Import():
                size, what = count_parameters(shape) * hf_dtype if shape else None, "weights"
            case TrainingRequest(settings=settings) as request:
                # A save is complete before the one that it replaces is removed; at a time limit there is one more.
                replaces = settings.save_interval is not None or stage.slurm.time is not None
                # One that is written while the training goes on may not be complete when the next one begins.
                saved = settings.checkpoints + replaces + request.layout.async_save
                what = f"{saved} checkpoint{'s' * (saved > 1)}"
                size = saved * checkpoint_bytes(request, shape) if shape else None
                if isinstance(request, TrainOnPolicy) and size is not None and shape:
                    what += ", sampler"
                    size += count_parameters(shape) * WEIGHT_BYTES[request.layout.precision]
            case _:
                continue  # little beside these
        items.append(DiskItem(stage.name, what, size, stage.name in done))
    return DiskPlan(str(folder), items, shutil.disk_usage(_existing(folder)).free)


def checkpoint_bytes(request: TrainingRequest, shape: ModelShape) -> int:
    """Bytes of one checkpoint of a training: weights, and what the optimizer needs to resume."""
    precision = request.layout.precision
    # The distributed optimizer saves fp32 weights once more, as its own.
    again = 4 if precision == "fp32" and DISTRIBUTED_OPTIMIZER in request.megatron else 0
    return (WEIGHT_BYTES[precision] + OPTIMIZER_BYTES[precision] + again) * count_parameters(shape)


def _exported(request: Export, stages: Sequence[Stage]) -> int:
    """Models that an export writes; `all` stands for the checkpoints that the training keeps."""
    trainings = [s.request for s in stages if isinstance(s.request, TrainingRequest)]
    kept = {training.output: training.settings.checkpoints for training in trainings}
    return sum(kept.get(one.folder, 1) if one.iteration == "all" else 1 for one in request.named.values())


def _cache(request: Precompute, shape: ModelShape, counts: tuple[int, int]) -> int:
    settings = request.settings
    size = cache_size(
        ["base", *request.policies],
        settings.kind,
        vocab_size=shape.vocab_size,
        k=settings.k,
        topk_dtype=settings.topk_dtype,
        keep_hidden=settings.keep_hidden,
        hidden_size=shape.hidden_size,
    )
    return size.total(*counts)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
