"""The jobs of a run: a stage each, or an array of slices and the job that joins them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.recipe.requests import REQUESTS, ModelRequest, Precompute, Request, Sample
from megatron_erpd.recipe.stages import RUNS_MODEL, Stage, dependencies
from megatron_erpd.settings import Layout
from megatron_erpd.slices import Slice
from megatron_erpd.sources.names import is_there

SLICED = ("precompute", "sample")
"""Commands whose work an array of jobs can share."""
USES_GPU = (*RUNS_MODEL, "sample", "select", "evaluate")
"""Commands that a GPU makes faster; the others get none."""


@dataclass(frozen=True)
class Job:
    """One submission to SLURM."""

    name: str
    """`teacher`, `controls-sft`, `cache-slices`: of its script, its log and its lock."""
    stage: Stage
    needs: tuple[str, ...] = ()
    """Names of the jobs that it waits for."""
    kind: Literal["whole", "slices", "merge"] = "whole"

    @property
    def processes(self) -> int:
        """Processes of all nodes; a merge reads and writes files in one."""
        return 1 if self.kind == "merge" else self.stage.num_processes

    @property
    def uses_gpus(self) -> bool:
        return self.stage.command in USES_GPU and self.kind != "merge"

    @property
    def nodes(self) -> int:
        """Nodes that the processes are spread over, evenly.

        Raises:
            RecipeError: they can't be, or a process needs more GPUs than a node has.
        """
        slurm = self.stage.slurm
        if slurm.gpus_per_node and self.stage.gpus_per_process > slurm.gpus_per_node:
            raise RecipeError(
                f"{self.stage.name}: tensor_parallel {self.stage.gpus_per_process}: a sampler's GPUs are of one node, "
                f"and slurm.gpus_per_node is {slurm.gpus_per_node}; change one of them"
            )
        if self.processes == 1:
            return 1
        nodes = slurm.nodes or math.ceil(self.processes / (slurm.gpus_per_node or self.processes))
        each = self.processes // nodes
        if self.processes % nodes or each > (slurm.gpus_per_node or each):
            raise RecipeError(
                f"{self.stage.name}: {self.processes} processes can't be spread over {nodes} node{'s'[: nodes > 1]}"
                + (f" of {slurm.gpus_per_node} GPUs" if slurm.gpus_per_node else "")
                + "; change slurm.nodes, slurm.gpus_per_node or the layout"
            )
        return nodes

    def record(self) -> dict[str, Any]:
        """What the job must know to judge its artifact, as JSON (`JobRecord`)."""
        stage, slurm = self.stage, self.stage.slurm
        return {
            "name": self.name,
            "stage": stage.name,
            "command": stage.command,
            "request": stage.request.model_dump(mode="json"),
            "slices": slurm.slices if self.kind == "slices" else 1,
            "requeues": slurm.requeues,
            "hang_minutes": slurm.hang_minutes,
            "signal_seconds": slurm.signal_seconds,
        }


@dataclass(frozen=True)
class JobRecord:
    """A submitted job as its folder keeps it: what is run does not change when the recipe does."""

    name: str
    stage: str
    request: Request
    slices: int
    requeues: int
    hang_minutes: float
    signal_seconds: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `StageError` for a file that is missing or not one of `Job.record`."""
        try:
            record = json.loads(path.read_text())
            request = REQUESTS[record.pop("command")].model_validate(record.pop("request"))
            return cls(request=request, **record)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StageError(f"{path}: can't be read ({error}); submit the run again") from None

    def as_stage(self) -> Stage:
        """The stage, as far as its artifact goes."""
        return Stage(self.stage, self.request)

    def as_slice(self, number: int) -> Stage:
        """The artifact of one slice, which lies in that of the whole."""
        own = Slice(number, self.slices)
        return Stage(f"{self.stage} {own}", self.request).changed(slice=own)


def jobs_of(stages: Sequence[Stage]) -> list[Job]:
    """The jobs of all stages, each after those that it waits for.

    Raises:
        RecipeError: processes or GPUs that can't be spread over nodes, or slices of a stage that has none or not so
            many.
    """
    jobs: list[Job] = []
    for stage in stages:
        name = job_name(stage.name)
        needs = tuple(job_name(other) for other in dependencies(stage, list(stages)))
        if stage.name != "prepare" and stages[0].name == "prepare" and not needs:
            needs = (job_name("prepare"),)
        if stage.command in SLICED and stage.slurm.slices > 1:
            _check_slices(stage)
            jobs.append(Job(f"{name}-slices", stage, needs, "slices"))
            merged = stage
            if isinstance(stage.request, ModelRequest):
                # Only the precision of a layout is part of the cache; the merge runs in one process.
                merged = stage.changed(layout=Layout(precision=stage.layout.precision))
            jobs.append(Job(name, merged, (f"{name}-slices",), "merge"))
        else:
            jobs.append(Job(name, stage, needs))
    for job in jobs:
        _ = job.nodes  # raises
    return jobs


def job_name(stage: str) -> str:
    return stage.replace("/", "-")


def _check_slices(stage: Stage) -> None:
    request = stage.request
    if isinstance(request, Sample) and is_there(stage.inputs.get("prompts")):  # else the slices themselves say it
        from megatron_erpd.sampling.parts import refuse_empty_slices
        from megatron_erpd.sampling.prompts import load_prompts

        prompts = load_prompts(request.prompts, request.num_prompts)
        refuse_empty_slices(f"{stage.name}: slurm.slices {stage.slurm.slices}", stage.slurm.slices, len(prompts))
    if isinstance(request, Precompute) and request.settings.has_signal and request.settings.projection == "global":
        raise RecipeError(
            f"{stage.name}: slurm.slices {stage.slurm.slices}: projection global looks for one eta for all rollouts, "
            "which no slice sees; take cache.projection per_token, or stages.cache.slurm.slices 1"
        )


def slurm_folder(root: Path) -> Path:
    """Where a run keeps its scripts, what was submitted, and the locks of its jobs."""
    return root / "slurm"
