"""Whether a run's stages fit the memory of given GPUs, changes that make them fit, and layouts that do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from megatron_erpd.checkpoint.mapping.parallel_layout import check_expert_groups, check_layout
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.errors import LayoutError, RecipeError
from megatron_erpd.plan.activations import MicroBatch, Recompute, recompute_of
from megatron_erpd.plan.budgets import budgets, least_budget, usable_bytes, waiting, with_budget
from megatron_erpd.plan.memory import DISTRIBUTED_OPTIMIZER, global_batch_size, stage_memory
from megatron_erpd.recipe.recipe import MegatronFlags
from megatron_erpd.recipe.stages import Stage, flags_of
from megatron_erpd.settings import Layout
from megatron_erpd.settings.megatron_flags import without_virtual_stages

GPU_GIB = {"h100": 79.6, "h200": 140.4, "a100-80": 80.0, "b200": 179.1}
"""Memory that nvidia-smi shows, in GiB."""
NODE_GPUS = 8
"""Tensor parallelism stays inside a node: it exchanges activations in every layer."""
SHORTEST_SHARD = 2048
"""Tokens: context parallelism with less per process waits for its exchanges."""
SHOWN = 5
"""Proposals at most."""
MOST_GPUS = 4096
"""Where the search for a number of GPUs that is enough ends."""
_FULL = Recompute("full")


@dataclass(frozen=True)
class Gpus:
    """A number of GPUs of a kind."""

    name: str
    memory: int
    """Bytes of one."""
    count: int

    @property
    def usable(self) -> int:
        """Bytes that a process may plan to use."""
        return usable_bytes(self.memory)


@dataclass(frozen=True)
class StageFit:
    """Whether one stage fits under the recipe's layout.

    Attributes:
        total: bytes of its largest process.
        remedies: changes each of which would make it fit; or, if none does alone, one entry with all that are needed.
    """

    stage: str
    total: int
    fits: bool
    num_processes: int
    enough_gpus: bool
    remedies: list[str]


@dataclass(frozen=True)
class Proposal:
    """A layout for all stages, as the recipe's `layout` and `megatron` sections have it.

    Attributes:
        stage: that needs the most memory.
        total: bytes of its largest process.
        work: time of a training step over one without recomputation and without waiting in the pipeline.
    """

    layout: dict[str, Any]
    megatron: MegatronFlags
    stage: str
    total: int
    work: float


@dataclass(frozen=True)
class GpuFit:
    """All that is said about GPUs.

    Attributes:
        stages: those that run a model in Megatron.
        proposals: the best first (see `propose`).
        enough: the least number of GPUs, `gpus.count` doubled until it is enough, that has a proposal; None up to
            `MOST_GPUS`.
    """

    gpus: Gpus
    stages: list[StageFit]
    proposals: list[Proposal]
    enough: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"usable": self.gpus.usable}


def parse_gpus(name: str, count: int) -> Gpus:
    """GPUs from what `--gpu` and `--gpus` were given.

    Raises:
        RecipeError: neither a known kind nor a number of GiB, or less than one.
    """
    kind = name.lower()
    try:
        gib = GPU_GIB[kind] if kind in GPU_GIB else float(kind)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e6:
        raise RecipeError(f"--gpu {name}: give {', '.join(GPU_GIB)}, or the memory of one in GiB, as 48")
    if count < 1:
        raise RecipeError(f"--gpus {count}: give 1 or more")
    return Gpus(kind if kind in GPU_GIB else f"{gib:g} GiB", int(gib * 2**30), count)


def gpu_fit(
    stages: Sequence[Stage], shape: ModelShape, longest: int, gpus: Gpus, mean_tokens: float | None = None
) -> GpuFit:
    """Checks the stages that run a model, and looks for layouts.

    Args:
        longest: tokens of the longest rollout.
        mean_tokens: of a rollout; None: all are taken to be that long.
    """
    fits = [_stage_fit(stage, shape, longest, gpus) for stage in stages]
    proposals = propose(stages, shape, longest, gpus, mean_tokens)
    enough, count = (gpus.count if proposals else None), gpus.count
    while enough is None and (count := 2 * count) <= MOST_GPUS:
        if propose(stages, shape, longest, replace(gpus, count=count), mean_tokens, most=1):
            enough = count
    return GpuFit(gpus, fits, proposals, enough)


def propose(
    stages: Sequence[Stage],
    shape: ModelShape,
    longest: int,
    gpus: Gpus,
    mean_tokens: float | None = None,
    most: int = SHOWN,
) -> list[Proposal]:
    """Layouts of exactly `gpus.count` processes under which every stage fits with `SPARE` left, the best first.

    Micro-batches are packs, whose budget holds the longest rollout. The best has the least work: full recomputation
    costs a third more, and a pipeline's ends cost (PP - 1) / packs; what processes exchange is not counted. Among
    equals it is that with the most DP (so the fewest processes for a copy of the model), then the least TP, PP, CP and
    EP, then the largest budget. TP stays within a node and gets sequence parallelism; the distributed optimizer is on
    wherever there is another copy to share with; there are no virtual pipeline stages.
    """
    found: list[tuple[tuple[float, ...], Proposal]] = []
    mean_tokens = mean_tokens or longest
    fitting = partial(_fitting, stages, shape, longest, gpus, mean_tokens)
    trains_most = max(stages, key=lambda stage: global_batch_size(stage) or 0)
    for layout in _layouts(stages, shape, longest, gpus.count):
        for recompute in (Recompute(), _FULL):
            tried = budgets(trains_most.changed(layout=layout), longest, mean_tokens)
            fit = (fitting(layout.changed({"micro_batch_tokens": budget}), recompute) for budget in tried)
            # Of the budgets that fit, the one with the least work; of equals the largest, which comes last.
            proposal = min(reversed([found for found in fit if found]), key=lambda option: option.work, default=None)
            if proposal:
                chosen = proposal.layout
                names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel")
                sizes = [chosen[name] for name in names]
                key = (round(proposal.work, 9), -chosen["data_parallel"], *sizes, -chosen["micro_batch_tokens"])
                found.append((key, proposal))
    return [proposal for _, proposal in sorted(found, key=lambda pair: pair[0])[:most]]


def _layouts(stages: Sequence[Stage], shape: ModelShape, longest: int, count: int) -> Iterator[Layout]:
    """Layouts of `count` processes that the model can be split by; their token budget is still open."""
    first = stages[0].layout
    for tensor in (n for n in (1, 2, 4, 8) if n <= min(NODE_GPUS, count)):
        for pipeline in (n for n in range(1, shape.num_layers + 1) if count % (tensor * n) == 0):
            for context in (n for n in (1, 2, 4, 8, 16) if n == 1 or longest >= n * SHORTEST_SHARD):
                data, rest = divmod(count, tensor * pipeline * context)
                if rest:
                    continue
                for expert in _expert_sizes(shape, tensor * context * data):
                    layout = first.model_copy(
                        update={
                            "tensor_parallel": tensor,
                            "pipeline_parallel": pipeline,
                            "context_parallel": context,
                            "data_parallel": data,
                            "expert_parallel": expert,
                            "sequence_parallel": tensor > 1,
                        }
                    )
                    if _can_be(shape, layout):
                        yield layout


def _expert_sizes(shape: ModelShape, ranks: int) -> list[int]:
    """Powers of two that divide the experts and the ranks of a pipeline stage."""
    sizes = [2**n for n in range(shape.num_experts.bit_length())] or [1]
    return [n for n in sizes if n == 1 or (shape.num_experts % n == 0 and ranks % n == 0)]


def _can_be(shape: ModelShape, layout: Layout) -> bool:
    try:
        check_layout(shape, layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel)
        check_expert_groups(shape, layout, trains=True)
    except LayoutError:
        return False
    return True


def _fitting(
    stages: Sequence[Stage],
    shape: ModelShape,
    longest: int,
    gpus: Gpus,
    mean_tokens: float,
    layout: Layout,
    recompute: Recompute,
) -> Proposal | None:
    """This layout for all stages, if they fit."""
    megatron: MegatronFlags = dict(recompute.flags())
    if layout.data_parallel * layout.context_parallel > 1:
        megatron["use-distributed-optimizer"] = True
    largest, work = None, 1.0
    for stage in stages:
        tried = _changed(stage, None, recompute, "use-distributed-optimizer" in megatron)
        tried = tried.changed(layout=layout, megatron=without_virtual_stages(tried.megatron))
        batch = global_batch_size(tried)
        if batch and batch % layout.batch_unit:
            return None
        memory = stage_memory(tried, shape, longest)
        if memory.total > gpus.usable:
            return None
        largest = memory if largest is None or memory.total > largest.total else largest
        if batch:
            ends = waiting(tried, shape, mean_tokens)
            work = max(work, (4 / 3 if recompute.granularity == "full" else 1.0) * (1 + ends))
    if largest is None:
        return None
    named = {name: value for name, value in layout if value != Layout.model_fields[name].default}
    sizes = {"tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel", "expert_parallel"}
    kept = named | {name: getattr(layout, name) for name in (*sizes, "micro_batch_tokens", "precision")}
    ordered = {name: kept[name] for name in Layout.model_fields if name in kept}
    return Proposal(ordered, megatron, largest.stage, largest.total, work)


def _stage_fit(stage: Stage, shape: ModelShape, longest: int, gpus: Gpus) -> StageFit:
    total = stage_memory(stage, shape, longest).total
    enough, fits = stage.num_processes <= gpus.count, total <= gpus.usable
    remedies = [] if fits else _remedies(stage, shape, longest, gpus)
    return StageFit(stage.name, total, fits, stage.num_processes, enough, remedies)


def _remedies(stage: Stage, shape: ModelShape, longest: int, gpus: Gpus) -> list[str]:
    """Changes that make a stage fit without another number of processes: of each kind the smallest that does alone;
    where none does, the largest of as many kinds as it takes, in one entry. Empty where all together don't."""

    def fits(changed: Stage) -> bool:
        try:
            return stage_memory(changed, shape, longest).total <= gpus.usable
        except LayoutError:  # virtual pipeline stages want other numbers of micro-batches
            return False

    alone = [next((words for words, c in kind(stage, shape, longest) if fits(c)), None) for kind in _CHANGES]
    if any(alone):
        return [words for words in alone if words]
    together, said = stage, []
    for kind in _CHANGES:
        for words, changed in list(kind(together, shape, longest))[-1:]:
            together = changed
            said.append(words)
            if fits(together):
                return [", ".join(said)]
    return []


Changes = Iterator[tuple[str, Stage]]
"""What is changed, as a recipe has it, and the stage with it; the smallest change first."""


def _share_optimizer(stage: Stage, shape: ModelShape, longest: int) -> Changes:
    copies = stage.layout.data_parallel * stage.layout.context_parallel
    if stage.command != "precompute" and copies > 1 and DISTRIBUTED_OPTIMIZER not in stage.megatron:
        yield "use-distributed-optimizer: true", _changed(stage, shares=True)


def _split_sequence(stage: Stage, shape: ModelShape, longest: int) -> Changes:
    if stage.layout.tensor_parallel > 1 and not stage.layout.sequence_parallel:
        yield "sequence_parallel: true", _changed(stage, {"sequence_parallel": True})


def _smaller_micro_batch(stage: Stage, shape: ModelShape, longest: int) -> Changes:
    batch, data = global_batch_size(stage) or 0, stage.layout.data_parallel
    if stage.layout.pack_tokens is not None:
        return
    for size in range(stage.layout.rows - 1, 0, -1):
        if batch % (size * data) == 0:
            yield f"micro_batch_size: {size}", _changed(stage, {"micro_batch_size": size})


def _smaller_budget(stage: Stage, shape: ModelShape, longest: int) -> Changes:
    """Down to the one that holds the longest rollout."""
    held = -(-MicroBatch.largest(stage.layout, longest).tokens // stage.layout.context_parallel)
    budget = 2 ** (held - 1).bit_length() if held > 1 else 1
    while (budget := budget // 2) > least_budget(stage.layout, longest):
        yield f"micro_batch_tokens: {budget}", with_budget(stage, budget)
    if (budget := least_budget(stage.layout, longest)) < held:
        yield f"micro_batch_tokens: {budget}", with_budget(stage, budget)


def _recompute(stage: Stage, shape: ModelShape, longest: int) -> Changes:
    if stage.command != "precompute" and recompute_of(stage.megatron).granularity != "full":
        words = ", ".join(f"{name}: {value}" for name, value in _FULL.flags().items())
        yield words, _changed(stage, recompute=_FULL)


def _more_tensor_parallel(stage: Stage, shape: ModelShape, longest: int) -> Changes:
    sizes = stage.layout
    for size in (2, 4, 8):
        data, rest = divmod(sizes.data_parallel * sizes.tensor_parallel, size)
        if sizes.tensor_parallel < size <= NODE_GPUS and not rest:
            update = {"tensor_parallel": size, "data_parallel": data, "sequence_parallel": True}
            if _can_be(shape, sizes.model_copy(update=update)):
                words = f"tensor_parallel: {size}, data_parallel: {data}, sequence_parallel: true"
                yield words, _changed(stage, update)


_CHANGES = (
    *(_share_optimizer, _split_sequence, _smaller_micro_batch, _smaller_budget, _recompute, _more_tensor_parallel),
)


def _changed(
    stage: Stage,
    layout: Mapping[str, Any] | None = None,
    recompute: Recompute | None = None,
    shares: bool | None = None,
) -> Stage:
    """A stage with other fields of its layout, other recomputation, or with or without the distributed optimizer."""
    shares = DISTRIBUTED_OPTIMIZER in stage.megatron if shares is None else shares
    recompute = recompute_of(stage.megatron) if recompute is None else recompute
    ours = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers")
    before = ("", *stage.megatron)
    gone = (DISTRIBUTED_OPTIMIZER, "--recompute-activations", *ours)
    kept = [w for w, last in zip(stage.megatron, before, strict=False) if w not in gone and last not in ours]
    wanted = flags_of({**recompute.flags(), "use-distributed-optimizer": shares})
    return stage.changed(layout=stage.layout.changed(layout or {}), megatron=(*kept, *wanted))
