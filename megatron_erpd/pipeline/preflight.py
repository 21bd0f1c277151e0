"""What can be known to be wrong before anything runs. All of it is told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.files import check_output
from megatron_erpd.manifest import MANIFEST
from megatron_erpd.pipeline.processes import Slots
from megatron_erpd.pipeline.recipe import Recipe
from megatron_erpd.pipeline.stages import RUNS_MODEL, TRAINS, Stage
from megatron_erpd.sampling.task import prompts_path, verifier_file
from megatron_erpd.source_names import local_path


def check_recipe(recipe: Recipe, stages: Sequence[Stage], slots: Slots) -> None:
    """Checks paths, the model and its layouts, batch sizes, verifiers, processes and monitoring.

    What `prepare` will write is checked when it is there.

    Raises:
        RecipeError: a line for each problem.
    """
    problems = [
        *_output_problems(recipe, stages),
        *_missing_paths(stages),
        *_model_problems(stages),
        *_batch_problems(stages),
        *_precision_problems(stages),
        *_task_problems(stages),
        *_process_problems(stages, slots),
        *([f"monitoring.{recipe.monitoring.problem}"] if recipe.monitoring.problem else []),
    ]
    if problems:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise RecipeError(f"{recipe.name}: the run can't start:\n{lines}")


def _output_problems(recipe: Recipe, stages: Sequence[Stage]) -> Iterator[str]:
    for folder in (recipe.folder, *(stage.output for stage in stages)):
        try:
            check_output(folder)
        except RecipeError as error:
            yield f"output: {error}"
            return  # of many folders in one that can't be written, one is enough


def _missing_paths(stages: Sequence[Stage]) -> Iterator[str]:
    pending = [s.output for s in stages if s.command != "prepare" or not (s.output / MANIFEST).is_file()]
    for stage in stages:
        for name, given in stage.inputs.items():
            path = local_path(given) if name in ("prompts", "source") else given
            if path is not None and not path.exists() and not any(path.is_relative_to(output) for output in pending):
                yield f"{stage.name}: {name} {path}: no such file or folder; check the path in the recipe"


def _model_problems(stages: Sequence[Stage]) -> Iterator[str]:
    """Whether the model is of a family that can be converted, and divides over every layout."""
    models = [stage.inputs["hf"] for stage in stages if stage.command == "import"]
    if not models or not (models[0] / "config.json").is_file():
        if models and models[0].is_dir():
            yield f"model {models[0]}: has no config.json; give a Hugging Face folder"
        return
    from megatron_erpd.checkpoint.hf_config import model_flags

    users: dict[tuple[int, int], str] = {}
    for stage in stages:
        if stage.command in (*RUNS_MODEL, "import"):
            users.setdefault((stage.layout.tensor_parallel, stage.layout.pipeline_parallel), stage.name)
    for (tensor, pipeline), name in users.items():
        try:
            model_flags(models[0], tensor_parallel=tensor, pipeline_parallel=pipeline)
        except ErpdError as error:
            yield f"{name}: {error}"


def _batch_problems(stages: Sequence[Stage]) -> Iterator[str]:
    for stage in stages:
        batch, name, layout = stage.settings.get("global_batch_size"), "global_batch_size", stage.layout
        if stage.command == "train-on-policy":
            batch = stage.settings["prompts_per_update"] * stage.settings["num_rollouts"]
            name = "prompts_per_update x num_rollouts ="
        together = layout.micro_batch_size * layout.data_parallel
        if batch and batch % together:
            yield (
                f"{stage.name}: {name} {batch} is not a multiple of micro_batch_size "
                f"{layout.micro_batch_size} x data_parallel {layout.data_parallel} = {together}; change one of them"
            )


def _precision_problems(stages: Sequence[Stage]) -> Iterator[str]:
    """Trainings that would read log-probs of another precision than their own."""
    made = {stage.output: stage for stage in stages if stage.command == "precompute"}
    for stage in stages:
        for name in ("base-log-probs", "cache"):
            source = made.get(stage.inputs[name]) if stage.command in TRAINS and name in stage.inputs else None
            if source is not None and source.layout.precision != stage.layout.precision:
                yield (
                    f"{stage.name}: trains in {stage.layout.precision} on log-probs that {source.name} computes in "
                    f"{source.layout.precision}; give both stages one precision"
                )


def _task_problems(stages: Sequence[Stage]) -> Iterator[str]:
    """Verifiers that can't be loaded, and files of prompts that can't be read."""
    from megatron_erpd.sampling.prompts import load_prompts
    from megatron_erpd.sampling.verifiers import Verifier

    verifiers = [str(s.settings["verifier"]) for s in stages if "verifier" in s.settings]
    prompts = [(str(s.inputs["prompts"]), s.settings.get("verifier")) for s in stages if "prompts" in s.inputs]
    checks: list[tuple[Callable[[Any], object], Any, Path | None]] = [
        *((Verifier, verifier, verifier_file(verifier)) for verifier in dict.fromkeys(verifiers)),
        *(
            (partial(load_prompts, verifier=verifier), source, prompts_path(source))
            for source, verifier in dict.fromkeys(prompts)
        ),
    ]
    for check, value, file in checks:
        if file is not None and not file.exists():
            continue  # told as a missing path, or still to be prepared
        try:
            check(value)
        except ErpdError as error:
            yield str(error)


def _process_problems(stages: Sequence[Stage], slots: Slots) -> Iterator[str]:
    for stage in stages:
        if slots.gpus and stage.num_gpus > len(slots.gpus):
            what = "its layout" if stage.gpus_per_process == 1 else "tensor_parallel"
            yield (
                f"{stage.name}: {what} needs {stage.num_gpus} GPUs, this machine has {len(slots.gpus)}; choose a "
                "smaller one"
            )
