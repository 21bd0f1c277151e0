"""Disk space of a run: checkpoints, exports, caches."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.checkpoint.mapping.parameter_count import count_parameters
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.plan.memory import DISTRIBUTED_OPTIMIZER, OPTIMIZER_BYTES, WEIGHT_BYTES
from megatron_erpd.recipe.stages import TRAINS, Stage
from megatron_erpd.teacher_cache.sizes import cache_size

WRITES = (*TRAINS, "import", "export", "precompute")
"""Commands whose artifacts are counted; the others write little beside them."""


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
        if stage.command not in WRITES:
            continue
        size, what = None, ""
        if stage.command == "precompute":
            what = f"{stage.settings['kind']} cache"
            size = _cache(stage, shape, counts) if shape and counts else None
        elif stage.command == "export":
            copies = _exported(stage, stages)
            what = f"{copies} Hugging Face model{'s' * (copies > 1)}"
            size = copies * count_parameters(shape) * hf_dtype if shape else None
        elif stage.command == "import":
            size, what = count_parameters(shape) * hf_dtype if shape else None, "weights"
        else:
            saved, what = _checkpoints(stage)
            size = saved * _checkpoint(stage, shape) if shape else None
            if stage.command == "train-on-policy" and size is not None and shape:
                size, what = size + count_parameters(shape) * WEIGHT_BYTES[stage.layout.precision], what + ", sampler"
        items.append(DiskItem(stage.name, what, size, stage.name in done))
    return DiskPlan(str(folder), items, shutil.disk_usage(_existing(folder)).free)


def _checkpoint(stage: Stage, shape: ModelShape) -> int:
    """Bytes of one checkpoint of a training: weights, and what the optimizer needs to go on."""
    precision = stage.layout.precision
    # The distributed optimizer saves fp32 weights once more, as its own.
    again = 4 if precision == "fp32" and DISTRIBUTED_OPTIMIZER in stage.megatron else 0
    return (WEIGHT_BYTES[precision] + OPTIMIZER_BYTES[precision] + again) * count_parameters(shape)


def _checkpoints(stage: Stage) -> tuple[int, str]:
    """How many checkpoints there are at the most at one time."""
    # A save is complete before the one that it replaces is removed.
    saved = stage.settings["checkpoints"] + (stage.settings["save_interval"] is not None)
    return saved, f"{saved} checkpoint{'s' * (saved > 1)}"


def _exported(stage: Stage, stages: Sequence[Stage]) -> int:
    """Models that an export writes; `all` stands for the checkpoints that the training keeps."""
    kept = {s.output: s.settings["checkpoints"] for s in stages if s.command in TRAINS}
    iterations = stage.settings["iterations"]
    return sum(kept.get(stage.inputs[name], 1) if which == "all" else 1 for name, which in iterations.items())


def _cache(stage: Stage, shape: ModelShape, counts: tuple[int, int]) -> int:
    settings = stage.settings
    policies = ["base", *(name.removeprefix("policy-") for name in stage.inputs if name.startswith("policy-"))]
    size = cache_size(
        policies,
        settings["kind"],
        vocab_size=shape.vocab_size,
        k=settings["k"],
        topk_dtype=settings.get("topk_dtype", "float16"),
        keep_hidden=settings.get("keep_hidden", False),
        hidden_size=shape.hidden_size,
    )
    return size.total(*counts)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
