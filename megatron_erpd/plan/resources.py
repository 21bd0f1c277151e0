"""The plan of a recipe: its stages, memory, time, teacher cache and disk.

Read are the recipe, the model's `config.json`, the prompts, and the footers of Parquet files with rollouts, as far as
they are there. What can't be known yet is told, and the rest is planned.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_erpd import platform
from megatron_erpd.checkpoint.mapping.config import ModelShape, read_model_shape
from megatron_erpd.checkpoint.mapping.parameter_count import active_parameters, count_parameters
from megatron_erpd.data.pack_figures import PackFigures
from megatron_erpd.errors import LayoutError, RecipeError
from megatron_erpd.manifest import MANIFEST
from megatron_erpd.plan.budgets import (
    StageRollouts,
    check_prompts,
    chosen_budget,
    has_no_size,
    least_budget,
    over_budget,
    packed,
    precision_warning,
    with_budget,
)
from megatron_erpd.plan.cache import (
    CacheOption,
    Speed,
    cache_options,
    forward_flop,
    recommendation,
    training_flop,
)
from megatron_erpd.plan.disk import DiskPlan, disk_plan
from megatron_erpd.plan.gpu_fit import GpuFit, Gpus, gpu_fit
from megatron_erpd.plan.memory import StageMemory, frozen_policies, reads_hidden, stage_memory, uncounted_flags
from megatron_erpd.plan.packs import imported_files, reads_the_rollouts, stage_packs
from megatron_erpd.plan.saves import SaveTime, save_times
from megatron_erpd.plan.times import RolloutSize, StageTime, measured_speed, stage_times
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Imported, Recipe
from megatron_erpd.recipe.refused_flags import refused_keys
from megatron_erpd.recipe.requests import Import, ImportRollouts, ModelRequest, Precompute, Sample, TrainingRequest
from megatron_erpd.recipe.stages import Stage, dependencies
from megatron_erpd.recipe.verdicts import Verdict, judge_all
from megatron_erpd.settings.learning_rates import describe_rates
from megatron_erpd.sources.names import is_there

TERAFLOPS_PER_DEVICE = 400.0
"""What an H100 reaches in bf16 at 40% of its peak of 989."""
_HF_TYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class StageRow:
    """A stage as it will run."""

    name: str
    command: str
    num_processes: int
    layout: str
    reads: list[str]
    is_done: bool
    verdict: str
    """What `run` would do with it, and why: `again, because epochs: 1.0 -> 2.0`."""


@dataclass(frozen=True)
class DataSize:
    """A round's rollouts; `is_upper_bound` where the responses aren't sampled yet.

    Attributes:
        longest: tokens of the longest, with its prompt.
    """

    num_rollouts: int
    prompt_tokens: int | None
    response_tokens: int
    longest: int
    is_upper_bound: bool
    source: str

    @property
    def response_share(self) -> float:
        """Response tokens among all that run through the model; 1 where the prompts aren't known."""
        return self.response_tokens / (self.response_tokens + (self.prompt_tokens or 0))

    @property
    def mean_tokens(self) -> float:
        """Of a rollout, with its prompt where that is known."""
        return (self.response_tokens + (self.prompt_tokens or 0)) / max(1, self.num_rollouts)


@dataclass(frozen=True)
class ModelSize:
    """The base model, without padding rows of the vocabulary."""

    architecture: str
    parameters: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Resources:
    """What a run will need. Sizes are in bytes; the cache is that of one round."""

    name: str
    stages: list[StageRow]
    model: ModelSize | None
    data: DataSize | None
    memory: list[StageMemory]
    packs: dict[str, PackFigures]
    """Of stages with a token budget, where the rollouts are there."""
    times: list[StageTime]
    gpus: GpuFit | None
    """Where GPUs were asked about."""
    teraflops_per_device: float
    """Of the times and the rates."""
    speed_source: str
    """Where that is from, in words."""
    cache: list[CacheOption]
    recommendation: str | None
    disk: DiskPlan
    saves: list[SaveTime]
    """Of trainings that jobs of a cluster run."""
    learning_rates: dict[str, str]
    """Of each training: the rate, and whether it is given or why it is chosen."""
    notes: list[str]
    """What isn't known, and what is assumed."""

    def to_json(self) -> dict[str, Any]:
        """All figures, with the sums that the tables show."""
        found = asdict(self)
        for row, memory in zip(found["memory"], self.memory, strict=True):
            row["total"] = memory.total
        if self.gpus:
            found["gpus"] = self.gpus.to_json()
        for row, save in zip(found["saves"], self.saves, strict=True):
            row |= {"seconds": save.seconds, "allowed": save.allowed}
        return found | {"disk": found["disk"] | {"needed": self.disk.needed, "fits": self.disk.fits}}


def estimate(
    recipe: Recipe,
    teraflops_per_device: float | None = None,
    gpus: Gpus | None = None,
    sequence_length: int | None = None,
) -> Resources:
    """Plans a recipe. Nothing is run, and nothing is written.

    Args:
        teraflops_per_device: what a device reaches, in units of 1e12 operations per second; for rates and times.
            Default: what a finished training of the run has measured, else `TERAFLOPS_PER_DEVICE`.
        gpus: to check the stages' memory against, and to propose layouts for.
        sequence_length: tokens of the longest rollout. Default: counted, else bounded by the recipe.

    Raises:
        RecipeError, CheckpointError, LayoutError: the recipe, one of its Megatron flags, the model or a layout can't be
            used (see `plan`).
    """
    if teraflops_per_device is not None and not teraflops_per_device > 0:
        raise RecipeError(f"--teraflops-per-device {teraflops_per_device:g}: give a number above 0")
    if sequence_length is not None and sequence_length < 1:
        raise RecipeError(f"--sequence-length {sequence_length}: give 1 or more")
    stages, notes = plan(recipe), list[str]()
    if refused := refused_keys(recipe, stages):
        raise RecipeError("\n  ".join(refused))
    verdicts = judge_all(stages, Artifacts(recipe.folder, checksums=False))
    # What comes back from `replaced/` is counted as if it were still to be made.
    done = {stage.name for stage in stages if verdicts[stage.name].folder == stage.output}
    shape, hf_dtype, context = _model(stages, notes)
    data, lengths = _data(recipe, stages, verdicts, notes, context)
    longest = sequence_length or (data.longest if data else None)
    mean = data.mean_tokens if data else None
    on_gpus = {s.name for s in stages if gpus or s.slurm.gpus_per_node or not platform.is_cpu()}
    stages, left_open = _with_budgets(stages, shape, longest, mean, gpus, on_gpus, notes)
    counts = (data.num_rollouts, data.response_tokens) if data else None
    disk = disk_plan(recipe.folder, stages, done, shape, hf_dtype, counts)
    rollouts = RolloutSize(data.num_rollouts, data.mean_tokens) if data else None
    speed, source = _speed(teraflops_per_device, [stage for stage in stages if stage.name in done], shape, rollouts)
    cache, advice = _cache(recipe, stages, shape, data, disk, speed)
    with_model = [stage for stage in stages if isinstance(stage.request, ModelRequest)]
    sized = [stage for stage in with_model if stage.name not in left_open]
    packs = stage_packs(sized, shape, lengths.lengths) if shape and lengths else {}
    notes += _budget_notes(sized, lengths)
    if warning := precision_warning([stage for stage in with_model if stage.name in on_gpus]):
        notes.append(warning)
    if ignored := uncounted_flags(stages):
        notes.append(f"{', '.join(ignored)} of Megatron's change the memory in ways that are not counted")
    return Resources(
        name=recipe.name,
        stages=[_row(stage, stages, verdicts[stage.name]) for stage in stages],
        model=ModelSize(shape.family.name, count_parameters(shape), shape.hidden_size, shape.vocab_size)
        if shape
        else None,
        data=data,
        memory=[
            stage_memory(stage, shape, None if stage.name in left_open else longest, stage.name in on_gpus)
            for stage in with_model
        ]
        if shape
        else [],
        packs=packs,
        times=stage_times(stages, done, shape, rollouts, speed, {name: row.packs for name, row in packs.items()})
        if shape
        else [],
        gpus=_gpus(with_model, shape, longest, mean, gpus, notes),
        teraflops_per_device=speed,
        speed_source=source,
        cache=cache,
        recommendation=advice,
        disk=disk,
        saves=save_times(stages, shape) if shape else [],
        learning_rates=_learning_rates(stages, shape),
        notes=notes,
    )


def _with_budgets(
    stages: Sequence[Stage],
    shape: ModelShape | None,
    longest: int | None,
    mean_tokens: float | None,
    gpus: Gpus | None,
    on_gpus: Collection[str],
    notes: list[str],
) -> tuple[list[Stage], list[str]]:
    """The stages, those on GPUs that leave the size of their micro-batches open with the budget that they would take
    by the memory of these GPUs; and the names of those for which it isn't known."""
    chosen, left_open = dict[str, Stage](), list[str]()
    for stage in stages:
        if not isinstance(stage.request, ModelRequest) or not has_no_size(stage.layout) or stage.name not in on_gpus:
            continue
        if gpus is None or shape is None or longest is None:
            left_open.append(stage.name)
            chosen[stage.name] = packed(stage)
            continue
        budget = chosen_budget(stage, shape, longest, mean_tokens, gpus.memory)
        chosen[stage.name] = with_budget(stage, budget or least_budget(stage.layout, longest))
    sizes: dict[int, list[str]] = {}
    for name, stage in chosen.items():
        if name in left_open:
            continue
        sizes.setdefault(stage.layout.micro_batch_tokens or 0, []).append(name)
    notes += [
        f"{', '.join(names)}: no size of micro-batches is given; by the memory of {gpus and gpus.name} it is "
        f"micro_batch_tokens {size}"
        for size, names in sizes.items()
    ]
    if left_open:
        notes.append(
            f"{', '.join(left_open)}: no size of micro-batches is given; on a GPU a token budget is chosen by its "
            "memory, and --gpu says which"
        )
    return [chosen.get(stage.name, stage) for stage in stages], left_open


def _budget_notes(stages: Sequence[Stage], rollouts: StageRollouts | None) -> list[str]:
    """On rollouts that are longer than a stage's budget.

    Raises:
        LayoutError: a prompt is; names the stage.
    """
    found: dict[str, list[str]] = {}
    for stage in stages:
        if rollouts is None or not reads_the_rollouts(stage):
            continue
        try:
            check_prompts(stage.layout, rollouts)
            line = over_budget(stage.layout, rollouts)
        except LayoutError as error:
            raise LayoutError(f"{stage.name}: {error}") from None
        if line:
            found.setdefault(line, []).append(stage.name)
    return [f"{', '.join(names)}: {line}" for line, names in found.items()]


def _learning_rates(stages: Sequence[Stage], shape: ModelShape | None) -> dict[str, str]:
    found = {}
    for stage in stages:
        if not isinstance(stage.request, TrainingRequest):
            continue
        rate, warmup = stage.request.settings.learning_rate, stage.request.settings.warmup_fraction
        known = shape is not None or rate is not None
        size = count_parameters(shape) if shape else 0
        unknown = "by the model's size, which isn't known yet"
        found[stage.name] = describe_rates(rate, warmup, size) if known else unknown
    return found


def _speed(
    given: float | None, done: Sequence[Stage], shape: ModelShape | None, rollouts: RolloutSize | None
) -> tuple[float, str]:
    """What a device reaches, in teraflop/s, and where that is from. `done`: the stages that are."""
    if given is not None:
        return given, "given"
    measured = measured_speed(done, shape, rollouts) if shape else None
    if measured:
        return measured.teraflops, f"measured by {measured.stage}, which is done"
    return TERAFLOPS_PER_DEVICE, "assumed: bf16 on an H100 at 40% of its peak"


def _gpus(
    stages: Sequence[Stage],
    shape: ModelShape | None,
    longest: int | None,
    mean_tokens: float | None,
    gpus: Gpus | None,
    notes: list[str],
) -> GpuFit | None:
    if gpus is None:
        return None
    if shape is None or longest is None:
        missing = "model" if shape is None else "length of the rollouts (--sequence-length)"
        notes.append(f"whether the stages fit {gpus.count} x {gpus.name} can't be known without the {missing}")
        return None
    return gpu_fit(stages, shape, longest, gpus, mean_tokens)


def _row(stage: Stage, stages: Sequence[Stage], verdict: Verdict) -> StageRow:
    before = dependencies(stage, list(stages))
    outputs = [s.output for s in stages]
    own = [str(path) for path in stage.inputs.values() if not any(path.is_relative_to(o) for o in outputs)]
    sizes = stage.layout
    parts = {"TP": sizes.tensor_parallel, "PP": sizes.pipeline_parallel, "CP": sizes.context_parallel}
    parts |= {"DP": sizes.data_parallel, "EP": sizes.expert_parallel}
    words = [f"{name} {size}" for name, size in parts.items() if size > 1] + [sizes.precision]
    layout = ", ".join(words) if isinstance(stage.request, ModelRequest) else ""
    if stage.gpus_per_process > 1:  # a sampler's, in one process
        layout = f"TP {stage.gpus_per_process}"
    reads = [*before, *own]
    return StageRow(stage.name, stage.command, stage.num_processes, layout, reads, verdict.is_done, verdict.describe())


def _model(stages: Sequence[Stage], notes: list[str]) -> tuple[ModelShape | None, int, int | None]:
    """The model's geometry, the bytes of a parameter in its Hugging Face folder, and its context in tokens."""
    folder = next(Path(stage.request.hf) for stage in stages if isinstance(stage.request, Import))
    prepared = any(stage.command == "prepare" and folder.is_relative_to(stage.output) for stage in stages)
    if not (folder / "config.json").is_file():
        if not prepared:
            raise RecipeError(
                f"model {folder}: has no config.json; give the Hugging Face folder (a plan reads this file alone, the "
                "weights may come later)"
            )
        notes.append(f"the model {folder} is not prepared yet: memory, cache and checkpoints can't be known")
        return None, 0, None
    shape = read_model_shape(folder)
    config = json.loads((folder / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in _HF_TYPES:
        notes.append(f"{folder}/config.json names no dtype: exports are taken for float32")
    return shape, _HF_TYPES.get(dtype, 4), config.get("max_position_embeddings")


def _data(
    recipe: Recipe,
    stages: Sequence[Stage],
    verdicts: Mapping[str, Verdict],
    notes: list[str],
    context: int | None,
) -> tuple[DataSize | None, StageRollouts | None]:
    """A round's rollouts: counted where they are there, else bounded by what is to be sampled; and each one's length
    where they are there."""
    from megatron_erpd.data.rollouts import count_rollouts, rollout_lengths

    stage = next(s for s in stages if isinstance(s.request, Sample | ImportRollouts))
    section, place, columns = recipe.rollouts, str(stage.output), dict[str, str]()
    # Imported rollouts count without the file that they came from.
    finished = (stage.output / MANIFEST).is_file() and verdicts[stage.name].word in ("done", "blocked")
    files: Any = stage.output
    if isinstance(section, Imported) and not finished:
        place = str(stage.inputs["source"])
        files, columns = imported_files(section, place)
    if finished or isinstance(section, Imported):
        count = count_rollouts(files, **columns)
        if count:
            prompts, responses = rollout_lengths(files, **columns)
            found = StageRollouts(prompts, prompts + responses, lambda row: f"row {row} of {place}")
            sizes = (count.num_rollouts, count.prompt_tokens, count.response_tokens, found.longest)
            return DataSize(*sizes, is_upper_bound=False, source=place), found
        why = "hold no columns of token ids to count" if files else "are not there yet"
        notes.append(f"the rollouts {place} {why}: the size of the whole data set can't be known")
        return None, None
    num_prompts, longest_prompt = _prompts(stage)
    if num_prompts is None:
        notes.append(
            f"the prompts {stage.inputs['prompts']} are not there yet, and rollouts.num_prompts is not given: the size "
            "of the whole data set can't be known"
        )
        return None, None
    if longest_prompt is None:
        notes.append(f"the prompts {stage.inputs['prompts']} are not there yet: sequences are taken without them")
    rollouts, response = num_prompts * section.num_rollouts, section.max_new_tokens
    longest = min((longest_prompt or 0) + response, context or sys.maxsize)
    source = f"{num_prompts} prompts x {section.num_rollouts} rollouts x {response} tokens"
    return DataSize(rollouts, None, rollouts * response, longest, is_upper_bound=True, source=source), None


def _prompts(stage: Stage) -> tuple[int | None, int | None]:
    """Prompts of a round that is still to be sampled, and a bound on the tokens of the longest: a token is a byte or
    more. None while their file isn't there; a round's number may still be given."""
    from megatron_erpd.sampling.prompts import load_prompts

    assert isinstance(stage.request, Sample)
    wanted = stage.request.num_prompts
    if not is_there(stage.inputs.get("prompts")):
        return wanted, None
    records = load_prompts(stage.request.prompts, wanted)
    return len(records), max(len(json.dumps(record["prompt"], ensure_ascii=False).encode()) for record in records)


def _cache(
    recipe: Recipe,
    stages: Sequence[Stage],
    shape: ModelShape | None,
    data: DataSize | None,
    disk: DiskPlan,
    teraflops: float,
) -> tuple[list[CacheOption], str | None]:
    """The teacher cache of the first round and its alternatives, and which to choose."""
    maker = next((s for s in stages if s.name == "cache"), None)
    if maker is None:
        return [], recommendation(None, [], None, disk.free)
    if shape is None:
        return [], None
    assert isinstance(maker.request, Precompute)
    reader = next(s for s in stages if s.inputs.get("cache") == maker.output)
    parameters, share = active_parameters(shape), data.response_share if data else 1.0
    flop = forward_flop(parameters, frozen_policies(maker)), training_flop(parameters, frozen_policies(reader))
    speeds = [teraflops * 1e12 * s.num_processes / f * share for s, f in zip((maker, reader), flop, strict=True)]
    policies = ["base", *maker.request.policies]
    counts = (data.num_rollouts, data.response_tokens) if data else None
    sizes = (shape.vocab_size, shape.hidden_size)
    options = cache_options(policies, recipe.cache, *sizes, counts, Speed(*speeds), reads_hidden(reader))
    others = sum(item.bytes or 0 for item in disk.items if item.stage != maker.name and not item.is_there)
    form = "projection" if any(d.form == "projection" for d in recipe.distillations().values()) else "policy_gradient"
    return options, recommendation(form, options, others if disk.is_complete else None, disk.free)
