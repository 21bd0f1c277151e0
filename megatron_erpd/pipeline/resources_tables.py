"""A plan's figures for a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_erpd.pipeline.resources import Resources, StageRow

_MANY = 4
"""So many inputs are named, then counted."""


def tables(found: Resources) -> RenderableType:
    """All of a plan, one table under the other."""
    parts = [_stages(found), *_data(found), *_memory(found), *_cache(found), *_disk(found)]
    parts += [Text(f"not known or assumed: {note}", "yellow") for note in found.notes]
    return Group(*(piece for part in parts for piece in (part, Text())))


def show(found: Resources, console: Console | None = None) -> None:
    (console or Console()).print(tables(found))


def _stages(found: Resources) -> Table:
    table = _table(f"{found.name}: stages", "stage", "command", "processes", "layout", "reads")
    for row in found.stages:
        name = Text(row.name, "dim" if row.is_done else "") + Text(" (done)" if row.is_done else "")
        table.add_row(name, row.command, str(row.num_processes), row.layout, _reads(row))
    return table


def _reads(row: StageRow) -> str:
    more = len(row.reads) - _MANY
    return ", ".join(row.reads[:_MANY]) + (f" and {more} more" if more > 0 else "")


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
        lines.append(Text(f"data of a round: {text}, {how}{data.source})"))
    return lines


def _memory(found: Resources) -> list[RenderableType]:
    if not found.memory:
        return []
    columns = ("stage", "weights", "gradients", "optimizer", "frozen", "output layer", "sum")
    table = _table("memory of the largest process, GiB, without activations", *columns)
    for row in found.memory:
        cells = (row.weights, row.gradients, row.optimizer, row.frozen, row.output_layer, row.total)
        table.add_row(row.stage, *(_gib(cell) for cell in cells))
    legend = (
        "Gradients: Megatron's fp32 buffer. Optimizer: Adam's moments and, with bf16, fp32 weights (split over the "
        "copies with --use-distributed-optimizer). Frozen: policies that only run forward; on policy also the model of "
        "the sampler. Output layer: a chunk of logits (head_chunk_mib), in training also the fp32 gradient of its "
        "weight, unless Apex adds it to the buffer. Activations are not included."
    )
    return [table, Text(legend, "dim")]


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
        f"Rates assume {found.teraflops_per_device:g} teraflop/s on every device of the layout "
        "(--teraflops-per-device; 400 is for bf16 on an H100), 2 x parameters floating-point operations per token and "
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


def _table(title: str, *headings: str) -> Table:
    """The first column of words, and those after it of numbers where they hold any."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    words = ("stage", "command", "layout", "reads", "kept", "artifact", "holds")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", overflow="fold")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}" if size == 0 or size >= 0.01 * 2**30 else "<0.01"


def _size(size: int | None) -> str:
    """Bytes in decimal units."""
    if size is None:
        return "unknown"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} PB"


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else _size(round(per_second)) + "/s"
