"""A dry run's figures for a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_erpd.checkpoint.dry_run import DryRun, StagePlan


def print_dry_run(found: DryRun, console: Console | None = None) -> None:
    """Writes all of it, one table under the other."""
    (console or Console()).print(dry_run_tables(found))


def dry_run_tables(found: DryRun) -> RenderableType:
    parts = (Text(_summary(found)), _mapping(found), _shapes(found), _stages(found), *_notes(found))
    return Group(*(piece for part in parts for piece in (part, Text())))


def _summary(found: DryRun) -> str:
    words = {"tensor": "TP", "pipeline": "PP", "context": "CP", "data": "DP", "expert": "EP", "virtual": "chunks"}
    sizes = [f"{words[name.split('_')[0]]} {size}" for name, size in found.layout.items() if size > 1]
    return (
        f"{found.architecture}: {found.parameters:,} parameters, {_bytes(found.source_bytes)} as {found.source_dtype}\n"
        f"layout: {', '.join(sizes) or 'one process'}, {found.precision}; processes: {found.num_processes}\n"
        f"import: every process reads {_bytes(found.source_bytes / found.num_processes)}, "
        f"{_seconds(found.import_seconds)} at {_bytes(found.bytes_per_second)}/s"
    )


def _mapping(found: DryRun) -> Table:
    table = _table("Megatron's tensors, and the rows that they are made of", "Megatron", "Hugging Face", "rows")
    for tensor in found.tensors:
        table.add_row(tensor.key, "\n".join(tensor.hf_names), tensor.rows)
    return table


def _shapes(found: DryRun) -> Table:
    table = _table("shapes", "Megatron", "whole", "one of them in a process", "split")
    for tensor in found.tensors:
        shapes = [" x ".join(map(str, shape)) for shape in (tensor.global_shape, tensor.local_shape)]
        table.add_row(tensor.key, *shapes, tensor.split)
    return table


def _stages(found: DryRun) -> Table:
    table = _table("a process of each pipeline stage", "stage", "layers")
    for heading in ("parameters", f"weights, {found.precision}", "reads", "time"):
        table.add_column(heading, justify="right")
    for stage in found.stages:
        size, read = _bytes(stage.weight_bytes), _bytes(stage.read_bytes)
        table.add_row(
            str(stage.stage), _layers(stage), f"{stage.parameters:,}", size, read, _seconds(stage.read_seconds)
        )
    return table


def _notes(found: DryRun) -> list[RenderableType]:
    flags = ", ".join("--" + name.replace("_", "-") for name in found.megatron_flags)
    return [Text(f"The stages can't share the layers evenly: Megatron is given {flags}.")] if flags else []


def _layers(stage: StagePlan) -> str:
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in stage.layers)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _bytes(size: float) -> str:
    """In decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
