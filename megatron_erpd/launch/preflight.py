"""Checks a recipe before anything runs and reports all problems at once.

`run`, `submit` and their dry runs ask the same. What depends on the machine that a stage will run on (GPUs, what is
installed in a container) is judged where that is known: for `run` here; for a job only what holds on every machine.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.files import check_output
from megatron_erpd.launch.preflight_tasks import Task, task_problems
from megatron_erpd.launch.processes import Slots
from megatron_erpd.launcher import missing_interface
from megatron_erpd.manifest import MANIFEST
from megatron_erpd.recipe.recipe import Imported, Recipe
from megatron_erpd.recipe.refused_flags import refused_keys
from megatron_erpd.recipe.requests import (
    Import,
    ImportRollouts,
    ModelRequest,
    Precompute,
    Sample,
    TrainingRequest,
    TrainOnPolicy,
)
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings.megatron_flags import without_refused
from megatron_erpd.sources.names import is_there, local_path

if TYPE_CHECKING:
    from megatron_erpd.plan.budgets import StageRollouts

_TRIED_ROWS = 64
"""Of a file of rollouts, rows that are read for a trial."""


def check_recipe(recipe: Recipe, stages: Sequence[Stage], slots: Slots | None, *, prepared: bool | None = None) -> None:
    """Checks paths, folders, the model and its layouts, batch sizes, Megatron's flags, prompts, verifiers, lengths,
    engines, processes, disk and monitoring.

    What `prepare` will write is checked when it is there. Takes seconds: those of loading the tokenizer and each
    verifier, and of importing Megatron where it is given flags.

    Args:
        slots: what this machine has, where the stages run on it; None for jobs.
        prepared: whether what lies in the folder of `prepare` is what it will be; default: whether it is an artifact.

    Raises:
        RecipeError: a line for each problem.
    """
    from megatron_erpd.plan.budgets import packed

    made = [s.output for s in stages if s.command == "prepare"]
    if prepared or (prepared is None and all((folder / MANIFEST).is_file() for folder in made)):
        made = []
    model = _model(stages, made)
    asked, stages = stages, [packed(stage) if _runs_on_gpus(stage, slots) else stage for stage in stages]
    problems = [
        *_output_problems(recipe, stages),
        *_told_once(_missing_paths(stages, made)),
        *_model_problems(model),
        *_told_once(_layout_problems(stages, model)),
        *_disk_problems(recipe, stages, model),
        *_told_once(_batch_problems(stages)),
        *_told_once(_prompt_problems(recipe, asked, made)),
        *_told_once(_precision_problems(stages)),
        *_told_once(_device_problems(stages, slots)),
        *_interface_problems(stages, slots),
        *_flag_problems(recipe, stages, slots, model),
        *_data_problems(recipe, stages, slots, model, made),
        *([f"monitoring.{recipe.monitoring.problem}"] if recipe.monitoring.problem else []),
    ]
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise RecipeError(f"{recipe.name}: the run can't start:\n{lines}")


def recipe_warnings(recipe: Recipe, stages: Sequence[Stage], slots: Slots | None) -> list[str]:
    """What people should know of a recipe that can run: fp32 on GPUs, and imported rollouts over a token budget. Takes
    what `check_recipe` takes."""
    from megatron_erpd.plan.budgets import over_budget, precision_warning

    fp32 = precision_warning([stage for stage in stages if _runs_on_gpus(stage, slots)])
    rollouts = _imported(recipe, stages, ())
    found = [(stage, over_budget(stage.layout, rollouts)) for stage in _readers(stages) if rollouts]
    return [*filter(None, [fp32]), *_told_once((stage, line) for stage, line in found if line)]


def _runs_on_gpus(stage: Stage, slots: Slots | None) -> bool:
    return bool(stage.slurm.gpus_per_node if slots is None else slots.gpus)


def _told_once(found: Iterable[tuple[Stage, str]]) -> Iterator[str]:
    """A line for each problem, with the names of all stages that have it before it."""
    names: dict[str, list[str]] = {}
    for stage, problem in found:
        names.setdefault(problem, []).append(stage.name)
    for problem, stages in names.items():
        yield f"{', '.join(stages)}: {problem}"


def _output_problems(recipe: Recipe, stages: Sequence[Stage]) -> Iterator[str]:
    """Folders that can't be written."""
    folders = {"output": [recipe.folder, *(stage.output for stage in stages)]}
    if recipe.monitoring.wandb_dir:
        folders["monitoring.wandb_dir"] = [Path(recipe.monitoring.wandb_dir)]
    for key, places in folders.items():
        for folder in places:
            try:
                check_output(folder)
            except RecipeError as error:
                yield f"{key}: {error}"
                break  # of many folders in one that can't be written, one is enough


def _missing_paths(stages: Sequence[Stage], to_be_prepared: Sequence[Path]) -> Iterator[tuple[Stage, str]]:
    pending = [*to_be_prepared, *(s.output for s in stages if s.command != "prepare")]
    first_name: dict[Path, str] = {}  # of a path that several stages have under several names
    for stage in stages:
        for name, given in stage.inputs.items():
            path = local_path(given) if name in ("prompts", "source") else given
            if path is not None and not path.exists() and not _is_in(path, pending):
                name = first_name.setdefault(path, name)
                yield stage, f"{name} {path}: no such file or folder; check the path in the recipe"


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _model(stages: Sequence[Stage], to_be_prepared: Sequence[Path]) -> Path | None:
    """The Hugging Face folder of the first base, where there is one already."""
    folder = next(Path(stage.request.hf) for stage in stages if isinstance(stage.request, Import))
    return folder if folder.is_dir() and not _is_in(folder, to_be_prepared) else None


def _model_problems(model: Path | None) -> Iterator[str]:
    """Whether the model can be read."""
    if model is None:
        return
    if not (model / "config.json").is_file():
        yield f"model {model}: has no config.json; give a Hugging Face folder"
        return
    from megatron_erpd.model_folder import read_tensors
    from megatron_erpd.sources.tokenizer import load_tokenizer

    for check in (read_tensors, load_tokenizer):
        try:
            check(model)
        except ErpdError as error:
            yield f"model: {error}"


def _layout_problems(stages: Sequence[Stage], model: Path | None) -> Iterator[tuple[Stage, str]]:
    """Whether the model can be converted, and divides over every layout."""
    from megatron_erpd.checkpoint.mapping.config import model_flags, read_model_shape
    from megatron_erpd.checkpoint.mapping.parallel_layout import check_expert_groups, check_schedule, read_schedule
    from megatron_erpd.plan.memory import micro_batches

    if model is None or not (model / "config.json").is_file():
        return
    for stage in stages:
        if not isinstance(stage.request, ModelRequest | Import):
            continue
        layout, trains = stage.layout, isinstance(stage.request, TrainingRequest)
        try:
            shape, stages_of = read_model_shape(model), layout.pipeline_parallel
            schedule = read_schedule(stage.megatron, shape.num_layers, stages_of)
            chunks = schedule.virtual_stages
            model_flags(model, layout.tensor_parallel, stages_of, layout.expert_parallel, virtual_stages=chunks)
            if isinstance(stage.request, ModelRequest):
                check_expert_groups(shape, layout, trains)
                check_schedule(schedule, stages_of, micro_batches(stage, schedule))
        except ErpdError as error:
            yield stage, str(error)


def _disk_problems(recipe: Recipe, stages: Sequence[Stage], model: Path | None) -> Iterator[str]:
    """A disk on which the checkpoints and exports that are still to be written can't all be. Caches aren't counted:
    their size follows from the rollouts."""
    from megatron_erpd.checkpoint.mapping.config import read_model_shape
    from megatron_erpd.checkpoint.mapping.parameter_count import count_parameters
    from megatron_erpd.model_folder import read_tensors
    from megatron_erpd.plan.disk import disk_plan

    if model is None:
        return
    try:
        shape = read_model_shape(model)
        files = {stored.path for stored in read_tensors(model).values()}
    except ErpdError:
        return  # told of the model
    per_parameter = round(sum(path.stat().st_size for path in files) / count_parameters(shape))
    done = {stage.name for stage in stages if (stage.output / MANIFEST).is_file()}
    found = disk_plan(recipe.folder, stages, done, shape, per_parameter, None)
    begun = [stage.output for stage in stages if stage.name not in done]
    written = (p for folder in begun for p in folder.rglob("*") if p.is_file() and ".damaged" not in p.parts)
    needed = found.needed - sum(path.stat().st_size for path in written)
    if needed > found.free:
        yield (
            f"output: {recipe.folder}: the run's checkpoints and exports still take {needed / 1e9:.3g} GB, and "
            f"{found.free / 1e9:.3g} GB are free on its disk; make room, give another folder, or keep fewer checkpoints"
        )


def _batch_problems(stages: Sequence[Stage]) -> Iterator[tuple[Stage, str]]:
    from megatron_erpd.plan.memory import global_batch_size

    for stage in stages:
        batch, layout = global_batch_size(stage), stage.layout
        on_policy = isinstance(stage.request, TrainOnPolicy)
        name = "prompts_per_update x num_rollouts =" if on_policy else "global_batch_size"
        if batch and batch % layout.batch_unit:
            yield stage, f"{name} {batch} is not a multiple of {layout.batch_unit_words}; change one of them"


def _prompt_problems(
    recipe: Recipe, stages: Sequence[Stage], to_be_prepared: Sequence[Path]
) -> Iterator[tuple[Stage, str]]:
    """Prompts of imported rollouts that alone are over a stage's token budget."""
    from megatron_erpd.plan.budgets import check_prompts

    try:
        rollouts = _imported(recipe, stages, to_be_prepared)
    except ErpdError:
        return  # told of the file
    if rollouts is None:
        return
    for stage in _readers(stages):
        try:
            check_prompts(stage.layout, rollouts)
        except ErpdError as error:
            yield stage, str(error)


def _readers(stages: Sequence[Stage]) -> list[Stage]:
    from megatron_erpd.plan.packs import reads_the_rollouts

    return [stage for stage in stages if reads_the_rollouts(stage) and stage.layout.pack_tokens is not None]


def _imported(recipe: Recipe, stages: Sequence[Stage], to_be_prepared: Sequence[Path]) -> StageRollouts | None:
    """The user's rollouts where a stage has a token budget, and they are here in files with columns of token ids."""
    from megatron_erpd.data.rollouts import count_rollouts, rollout_lengths
    from megatron_erpd.plan.budgets import StageRollouts
    from megatron_erpd.plan.packs import imported_files

    section = recipe.rollouts
    if not isinstance(section, Imported) or not _readers(stages):
        return None
    source = next(stage for stage in stages if isinstance(stage.request, ImportRollouts)).inputs["source"]
    if local_path(source) is None or _is_in(source, to_be_prepared):
        return None
    files, columns = imported_files(section, str(source))
    if not count_rollouts(files, **columns):
        return None
    prompts, responses = rollout_lengths(files, **columns)
    return StageRollouts(prompts, prompts + responses, lambda row: f"row {row} of {source}")


def _precision_problems(stages: Sequence[Stage]) -> Iterator[tuple[Stage, str]]:
    """Trainings that would read log-probs of another precision than their own."""
    made = {stage.output: stage for stage in stages if isinstance(stage.request, Precompute)}
    for stage in stages:
        for name in ("base-log-probs", "cache"):
            trains = isinstance(stage.request, TrainingRequest)
            source = made.get(stage.inputs[name]) if trains and name in stage.inputs else None
            if source is not None and source.layout.precision != stage.layout.precision:
                yield (
                    stage,
                    f"trains in {stage.layout.precision} on log-probs that {source.name} computes in "
                    f"{source.layout.precision}; give both stages one precision",
                )


def _device_problems(stages: Sequence[Stage], slots: Slots | None) -> Iterator[tuple[Stage, str]]:
    """What the machine that a stage runs on lacks, as far as it is known."""
    for stage in stages:
        if slots is not None and slots.gpus and stage.num_gpus > len(slots.gpus):
            what = "its layout" if stage.gpus_per_process == 1 else "tensor_parallel"
            yield (
                stage,
                f"{what} needs {stage.num_gpus} GPUs, this machine has {len(slots.gpus)}; choose a smaller one",
            )
        if isinstance(stage.request, ModelRequest):
            yield from ((stage, problem) for problem in _lacking(stage, slots))
        is_vllm = isinstance(stage.request, Sample) and stage.request.settings.engine == "vllm"
        if is_vllm and _lacks("vllm", stage, slots):
            yield (
                stage,
                "engine vllm: vLLM isn't installed; pip install 'megatron-erpd[vllm]', or take engine transformers",
            )


def _interface_problems(stages: Sequence[Stage], slots: Slots | None) -> Iterator[str]:
    if slots is not None and any(stage.num_processes > 1 for stage in stages) and (why := missing_interface()):
        yield why


def _lacking(stage: Stage, slots: Slots | None) -> Iterator[str]:
    """What a stage that runs a model needs and the machine has not."""
    layout = stage.layout
    on_cpu = slots is not None and not slots.gpus
    if layout.kernels == "triton" and on_cpu and "TRITON_INTERPRET" not in os.environ:
        yield "kernels triton: needs a GPU, and this machine has none that can be used; take auto"


def _is_our_python(stage: Stage, slots: Slots | None) -> bool:
    """Whether a stage runs with this interpreter, so that what is installed is known."""
    return slots is not None or not (stage.slurm.container_image or stage.slurm.python)


def _lacks(module: str, stage: Stage, slots: Slots | None) -> bool:
    return _is_our_python(stage, slots) and importlib.util.find_spec(module) is None


def _flag_problems(recipe: Recipe, stages: Sequence[Stage], slots: Slots | None, model: Path | None) -> Iterator[str]:
    """Megatron's own flags: those that don't work here, and the others as its parser reads them."""
    yield from refused_keys(recipe, stages)
    with_flags = [stage.changed(megatron=tuple(without_refused(stage.megatron))) for stage in stages if stage.megatron]
    with_flags = [stage for stage in with_flags if stage.megatron and _is_our_python(stage, slots)]
    if not with_flags:
        return
    from megatron_erpd.launch.flag_check import Flags, check_flags

    hf = str(model) if model and (model / "config.json").is_file() else None
    asked = {
        stage.name: Flags(
            stage.name, stage.command, stage.request.model_dump(mode="json"), hf, runs_here=slots is not None
        )
        for stage in with_flags
        if not stage.name.startswith("round-")  # which differ by their data alone
    }
    try:
        found = check_flags(list(asked.values()))
    except ErpdError as error:
        yield f"megatron: {error}"
        return
    by_problem: dict[str, list[str]] = {}
    for name, problems in found.items():
        for problem in problems:
            by_problem.setdefault(problem, []).append(name)
    own = _overridden(recipe.stages)
    for problem, names in by_problem.items():
        flag = problem.partition(":")[0].strip("-")
        place = f"stages.{names[0]}.megatron" if flag in own.get(names[0], ()) else "megatron"
        yield f"{place}: {problem} (for {', '.join(names)})"


def _overridden(overrides: Mapping[str, object]) -> dict[str, set[str]]:
    """The names of the flags that stages have of their own, by the stages."""
    return {
        name.replace("_", "-"): {flag.strip("-").replace("_", "-") for flag in getattr(section, "megatron", {})}
        for name, section in overrides.items()
    }


def _data_problems(
    recipe: Recipe, stages: Sequence[Stage], slots: Slots | None, model: Path | None, to_be_prepared: Sequence[Path]
) -> Iterator[str]:
    """Prompts, verifiers and rollouts of the user's own."""
    first = [stage for stage in stages if not stage.name.startswith("round-")]
    found = [(Task.of(stage, recipe.rounds), stage) for stage in first]
    tasks = [(task, stage) for task, stage in found if task is not None]
    # A verifier may want what this machine lacks: a GPU, or what a container has installed.
    runs = slots is not None or all(_is_our_python(s, slots) and not s.slurm.gpus_per_node for _, s in tasks)
    yield from task_problems([task for task, _ in tasks], model, runs, to_be_prepared)
    if isinstance(recipe.rollouts, Imported):
        stage = next(stage for stage in stages if isinstance(stage.request, ImportRollouts))
        if all(is_there(path) and not _is_in(path, to_be_prepared) for path in stage.inputs.values()):
            yield from _import_problems(recipe.rollouts, stage, model)


def _import_problems(section: Imported, stage: Stage, model: Path | None) -> Iterator[str]:
    """Whether the first rows of the user's rollouts can be read, and are no longer than the model takes."""
    from megatron_erpd.checkpoint.mapping.config import context_lengths
    from megatron_erpd.sources.importers import try_rollouts
    from megatron_erpd.sources.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(stage.inputs["tokenizer"])
    except ErpdError as error:
        if stage.inputs["tokenizer"] != model:  # told of the model
            yield f"rollouts.tokenizer: {error}"
        return
    source = str(stage.inputs["source"])
    try:
        length, place = try_rollouts(source, _TRIED_ROWS, section, section.fields, tokenizer)
    except ErpdError as error:
        yield f"rollouts.file: {error}"
        return
    if model is None:
        return
    try:
        positions, _ = context_lengths(model)
    except ErpdError:
        return  # told of the model
    if length > positions:
        yield f"rollouts.file: {place}: has {length} tokens, and the model {positions} positions; leave out such rows"
