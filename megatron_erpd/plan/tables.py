"""A plan's figures for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_erpd.plan.gpu_fit import GpuFit
from megatron_erpd.plan.resources import Resources, StageRow
from megatron_erpd.plan.saves import warnings_of
from megatron_erpd.units import counted, duration, size

_MANY = 4
"""So many inputs are named, then counted."""


def tables(found: Resources) -> RenderableType:
    """All of a plan, one table under the other."""
    sections = [_stages(found), *_learning_rates(found), *_data(found), *_memory(found)]
    sections += [*_packs(found), *_gpus(found), *_times(found)]
    sections += [*_cache(found), *_disk(found), *_saves(found)]
    sections += [Text(f"not known or assumed: {note}", "yellow") for note in found.notes]
    return Group(*(piece for section in sections for piece in (section, Text())))


def show(found: Resources, console: Console | None = None) -> None:
    (console or Console()).print(tables(found))


def describe(found: Resources) -> str:
    """The main figures in a line."""
    done = sum(row.is_done for row in found.stages)
    again = sum(row.verdict.startswith("again") for row in found.stages)
    undecided = sum(row.verdict.startswith("undecided") for row in found.stages)
    words = [f"{found.name}: {counted(len(found.stages), 'stage')}, {done} done" + f", {again} again" * (again > 0)]
    words += [f"{undecided} kept if their inputs come out the same"] if undecided else []
    if found.memory:
        worst = max(found.memory, key=lambda row: row.total)
        words.append(f"largest process {_gib(worst.total)} GiB ({worst.stage})")
    words.append(f"{'' if found.disk.is_complete else 'at least '}{_size(found.disk.needed)} still to be written")
    return "; ".join(words)


def _stages(found: Resources) -> Group:
    table = _table(f"{found.name}: stages", "stage", "command", "processes", "layout", "reads")
    for row in found.stages:
        name = Text(row.name, "dim" if row.is_done else "") + Text(" (done)" if row.is_done else "")
        table.add_row(name, row.command, str(row.num_processes), row.layout, _reads(row))
    verdicts = [Text(f"{row.name}: {row.verdict}") for row in found.stages if row.verdict != "new" and not row.is_done]
    return Group(table, *verdicts)


def _reads(row: StageRow) -> str:
    more = len(row.reads) - _MANY
    return ", ".join(row.reads[:_MANY]) + (f" and {more} more" if more > 0 else "")


def _learning_rates(found: Resources) -> list[RenderableType]:
    """A line for each rate, with the trainings that take it."""
    stages: dict[str, list[str]] = {}
    for name, rate in found.learning_rates.items():
        stages.setdefault(rate, []).append(name)
    lines = [f"learning rate of {', '.join(names)}: {rate}" for rate, names in stages.items()]
    return [Text("\n".join(lines))] if lines else []


def _data(found: Resources) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if model := found.model:
        lines.append(
            Text(
                f"model: {model.architecture}, {model.parameters:,} parameters, hidden size {model.hidden_size}, "
                f"vocabulary {model.vocab_size:,}"
            )
        )
    if data := found.data:
        prompt = "" if data.prompt_tokens is None else f", {data.prompt_tokens:,} prompt tokens"
        how = "at most (upper bound: " if data.is_upper_bound else "counted ("
        text = f"{data.num_rollouts:,} rollouts with {data.response_tokens:,} response tokens{prompt}"
        longest = f"{'at most ' * data.is_upper_bound}{data.longest:,} tokens in the longest"
        lines.append(Text(f"data of a round: {text}, {how}{data.source}); {longest}"))
    return lines


def _memory(found: Resources) -> list[RenderableType]:
    if not found.memory:
        return []
    columns = ("stage", "weights", "gradients", "optimizer", "frozen", "output layer", "activations", "sum")
    table = _table("memory of the largest process, GiB", *columns)
    for row in found.memory:
        cells = (row.weights, row.gradients, row.optimizer, row.frozen, row.output_layer)
        activations = "unknown" if row.activations is None else _gib(row.activations)
        table.add_row(row.stage, *(_gib(cell) for cell in cells), activations, _gib(row.total))
    legend = (
        "Gradients: Megatron's fp32 buffer. Optimizer: Adam's moments and, with bf16, fp32 weights (sharded over the "
        "data-parallel ranks with --use-distributed-optimizer). Frozen: policies that only run forward; on policy also "
        "the model of the sampler. Output layer: a chunk of logits (head_chunk_mib), in training also the fp32 "
        "gradient of its weight, unless it is added to the buffer (with Transformer Engine or Apex). Activations: of "
        "micro-batches of the longest rollouts, or of packs (micro_batch_tokens), in Transformer Engine's fused "
        "layers; attention's scores count in fp32 on GPUs alone. The largest process is of the first pipeline stage or "
        "of the last."
    )
    return [table, Text(legend, "dim")]


def _packs(found: Resources) -> list[RenderableType]:
    if not found.packs:
        return []
    columns = ("stage", "tokens", "packs", "full", "padding", "longest / mean", "over budget")
    table = _table("packs of a rank and step, of the rollouts that are there", *columns)
    for name, row in found.packs.items():
        shares = (f"{row.filled:.1%}", f"{row.padding:.1%}", f"{row.spread:.3f}")
        table.add_row(name, f"{row.budget:,}", str(row.packs), *shares, f"{row.over_budget:,}")
    legend = (
        "Tokens: that a pack may hold, micro_batch_tokens x context_parallel. Packs: as many as the step that needs "
        "the most; of precompute, of its one pass. Full: tokens of all packs over what they may hold. Longest / mean: "
        "work of the data-parallel rank with the most over that of all. Over budget: rollouts with a pack of their own."
    )
    return [table, Text(legend, "dim")]


def _gpus(found: Resources) -> list[RenderableType]:
    """What fits, what would, and the layouts that do."""
    fit = found.gpus
    if fit is None:
        return []
    gpus = fit.gpus
    usable = f"{_gib(gpus.usable)} of {_gib(gpus.memory)} GiB"
    table = _table(f"{gpus.count} x {gpus.name}: {usable}", "stage", "GiB", "fits", "what would fit")
    for row in fit.stages:
        remedies = "; or ".join(row.remedies) or ("" if row.fits else "no change on so many GPUs of this layout")
        if not row.enough_gpus:
            remedies = "; ".join(filter(None, (remedies, f"its layout needs {row.num_processes} GPUs")))
        good = row.fits and row.enough_gpus
        table.add_row(row.stage, _gib(row.total), Text("yes" if good else "no", "" if good else "bold red"), remedies)
    return [table, *_proposals(fit)]


def _proposals(fit: GpuFit) -> list[RenderableType]:
    gpus = fit.gpus
    if not fit.proposals:
        more = f"{fit.enough} are enough" if fit.enough else "nor do more of them up to 4,096"
        return [Text(f"No layout of {gpus.count} x {gpus.name} fits every stage; {more}.", "bold red")]
    columns = ("TP", "PP", "CP", "EP", "DP", "tokens", "recompute", "GiB", "of stage", "work")
    table = _table("layouts that fit, the best first", *columns)
    for option in fit.proposals:
        sizes = [option.layout[f"{name}_parallel"] for name in ("tensor", "pipeline", "context", "expert", "data")]
        recompute = option.megatron.get("recompute-granularity", "none")
        cells = [*sizes, option.layout["micro_batch_tokens"], recompute, _gib(option.total), option.stage]
        table.add_row(*map(str, cells), f"{option.work:.2f}")
    best = fit.proposals[0]
    legend = (
        "Least work first (a full recomputation is a third more, the ends of a pipeline are (PP - 1) / packs; "
        "exchanges are not counted); then the most DP, the least TP, PP, CP and EP, and the most tokens in a rank's "
        "forward pass (micro_batch_tokens), which hold the longest rollout. TP "
        "stays within a node of 8 and has sequence parallelism, the distributed optimizer is on with data or "
        "context parallelism, and a tenth of the memory stays free."
    )
    return [table, Text(legend, "dim"), Text(f"layout: {_inline(best.layout)}\nmegatron: {_inline(best.megatron)}")]


def _inline(section: Mapping[str, Any]) -> str:
    """As a recipe has it, in one line."""
    text = yaml.safe_dump(dict(section), default_flow_style=True, sort_keys=False, width=sys.maxsize)
    return text.strip()


def _times(found: Resources) -> list[RenderableType]:
    if not found.times:
        return []
    table = _table("time", "stage", "takes", "1e15 operations")
    for row in found.times:
        takes = "unknown" if row.seconds is None else duration(row.seconds) + " (done)" * row.is_done
        table.add_row(row.stage, takes, "-" if row.flop is None else f"{row.flop / 1e15:,.1f}")
    left = [row for row in found.times if not row.is_done]
    known = sum(row.seconds for row in left if row.seconds is not None)
    least = "at least " if any(row.seconds is None for row in left) else ""
    legend = (
        f"At {found.teraflops_per_device:.4g} teraflop/s on every device ({found.speed_source}). Not known: sampling, "
        "training on policy, conversions, a warm-up on its own demonstrations."
    )
    return [table, Text(f"still to come, one stage after another: {least}{duration(known)}"), Text(legend, "dim")]


def _cache(found: Resources) -> list[RenderableType]:
    advice: list[RenderableType] = [Text(f"Teacher cache: {found.recommendation}")] if found.recommendation else []
    if not found.cache:
        return advice
    columns = ("kept", "bytes/token", "whole", "written", "read/epoch", "read")
    table = _table("teacher cache of a round (* as the recipe has it)", *columns)
    for option in found.cache:
        table.add_row(
            option.name + " *" * option.chosen,
            f"{option.bytes_per_token:,}",
            _size(option.total_bytes),
            _rate(option.written_per_second),
            _size(option.read_bytes),
            _rate(option.read_per_second),
        )
    legend = (
        f"Rates assume {found.teraflops_per_device:.4g} teraflop/s on every device of the layout "
        f"(--teraflops-per-device; {found.speed_source}), 2 x parameters floating-point operations per token and "
        "policy forward and 6 x in training. Written: by precompute. Read: by stage 2, its target or the log-probs of "
        "the signal."
    )
    return [table, Text(legend, "dim"), *advice]


def _disk(found: Resources) -> list[RenderableType]:
    disk = found.disk
    table = _table("disk", "artifact", "holds", "size")
    for item in disk.items:
        table.add_row(item.stage, item.what, _size(item.bytes) + (" (done)" if item.is_there else ""))
    least = "" if disk.is_complete else "at least "
    needed = f"{least}{_size(disk.needed)}" if disk.needed or disk.is_complete else "unknown"
    line = f"still to be written: {needed}; free where {disk.folder} lies: {_size(disk.free)}"
    lines: list[RenderableType] = [table, Text(line)]
    if not disk.fits:
        lines.append(
            Text(
                f"WARNING: the run does not fit: {_size(disk.needed - disk.free)} more are needed; free space, give "
                "another --output, or keep fewer checkpoints",
                "bold red",
            )
        )
    return lines


def _saves(found: Resources) -> list[RenderableType]:
    """What there is to say of saves before a job's time limit."""
    return [Text(f"WARNING: {line}", "bold red") for line in warnings_of(found.saves)]


def _table(title: str, *headings: str) -> Table:
    """The first column of words, and those after it of numbers where they hold any."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    words = ("stage", "command", "layout", "reads", "kept", "artifact", "holds", "fits", "what would fit", "of stage")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", overflow="fold")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}" if size == 0 or size >= 0.01 * 2**30 else "<0.01"


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else size(num_bytes)


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else _size(round(per_second)) + "/s"
