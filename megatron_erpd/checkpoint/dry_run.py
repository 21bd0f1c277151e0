"""What a conversion and a layout would do with a model, from its `config.json` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.parallel_layout import pipeline_flags
from megatron_erpd.checkpoint.mapping.param_map import Split, Unit, units
from megatron_erpd.checkpoint.mapping.parameter_count import VOCABULARY_MULTIPLE, count_parameters
from megatron_erpd.checkpoint.mapping.rank_shards import RankCoordinates, Sharding
from megatron_erpd.errors import CheckpointError
from megatron_erpd.settings import Layout

READ_BYTES_PER_SECOND = 1e9
"""What a process is taken to read from disk in a second: an NVMe drive, or its share of a network file system."""

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PRECISION_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of every layer (or of the model).

    Attributes:
        key: Megatron's key, layers and experts that are alike written once: `decoder.layers.[0-79].mlp...`.
        hf_names: its source tensors, written alike.
        rows: which of their rows, in Megatron's order.
        global_shape: of Megatron's tensor; layers and experts are its first axes.
        local_shape: of one layer and expert in one rank; a gated projection's two parts are one tensor.
        split: how ranks divide it.
    """

    key: str
    hf_names: list[str]
    rows: str
    global_shape: list[int]
    local_shape: list[int]
    split: str


@dataclass(frozen=True)
class StagePlan:
    """The first process of one pipeline stage. The others hold as much; those with padding rows of the vocabulary read
    less.

    Attributes:
        stage: from 0.
        layers: first and last layer of every chunk.
        parameters: with padding rows of the vocabulary.
        weight_bytes: of them in the layout's precision, without gradients and optimizer.
        read_bytes: of the source tensors that it needs, in the type that they are stored in.
        read_seconds: for that, at the stated rate.
    """

    stage: int
    layers: list[tuple[int, int]]
    parameters: int
    weight_bytes: int
    read_bytes: int
    read_seconds: float


@dataclass(frozen=True)
class DryRun:
    """All of it.

    Attributes:
        layout: the sizes, by their names in a recipe's `layout`, and `virtual_stages`.
        num_processes: TP x PP x CP x DP.
        parameters: of the Hugging Face model.
        source_dtype: that the weights are stored in, as `config.json` says.
        source_bytes: of all weights.
        import_seconds: for an import whose processes read the same share each.
        bytes_per_second: the rate that times are computed with, of one process.
        megatron_flags: of layers that the stages can't share evenly.
    """

    architecture: str
    parameters: int
    source_dtype: str
    source_bytes: int
    layout: dict[str, int]
    precision: str
    num_processes: int
    bytes_per_second: float
    import_seconds: float
    megatron_flags: dict[str, object]
    tensors: list[TensorPlan]
    stages: list[StagePlan]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(
    hf_folder: Path | str,
    layout: Layout,
    virtual_stages: int = 1,
    bytes_per_second: float = READ_BYTES_PER_SECOND,
    vocabulary_multiple: int = VOCABULARY_MULTIPLE,
) -> DryRun:
    """Works out the mapping and every rank's share. Nothing is built, and no weights are needed.

    Args:
        hf_folder: with `config.json`.
        virtual_stages: chunks of layers in each pipeline stage (Megatron's interleaved schedule).
        bytes_per_second: that one process reads, for the times.
        vocabulary_multiple: Megatron pads the vocabulary to a multiple of this times the tensor-parallel size.

    Raises:
        CheckpointError: the model isn't supported, or `config.json` doesn't say in which type it is stored.
        LayoutError: the layout doesn't fit it.
    """
    shape = read_model_shape(hf_folder)
    sharding = Sharding(shape, layout, virtual_stages, vocabulary_multiple)
    dtype = _stored_dtype(Path(hf_folder) / "config.json")
    parameters = count_parameters(shape)
    source_bytes = parameters * ELEMENT_BYTES[dtype]
    names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel", "expert_parallel")
    return DryRun(
        architecture=shape.family.name,
        parameters=parameters,
        source_dtype=dtype,
        source_bytes=source_bytes,
        layout={name: getattr(layout, name) for name in names} | {"virtual_stages": virtual_stages},
        precision=layout.precision,
        num_processes=layout.num_processes,
        bytes_per_second=bytes_per_second,
        import_seconds=source_bytes / layout.num_processes / bytes_per_second,
        megatron_flags=pipeline_flags(shape.num_layers, layout.pipeline_parallel, virtual_stages),
        tensors=[_tensor_plan(alike, sharding) for alike in _alike(units(shape))],
        stages=[
            _stage_plan(stage, sharding, ELEMENT_BYTES[dtype], bytes_per_second)
            for stage in range(layout.pipeline_parallel)
        ],
    )


def _stored_dtype(path: Path) -> str:
    config = json.loads(path.read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    if name not in ELEMENT_BYTES:
        raise CheckpointError(f"{path}: dtype is {name!r}; set it to one of {', '.join(ELEMENT_BYTES)}")
    return str(name)


def _alike(found: Sequence[Unit]) -> list[list[Unit]]:
    """Units by key, in the order of their first."""
    by_key: dict[str, list[Unit]] = {}
    for unit in found:
        by_key.setdefault(unit.key, []).append(unit)
    return list(by_key.values())


def _tensor_plan(alike: Sequence[Unit], sharding: Sharding) -> TensorPlan:
    first, last = alike[0], alike[-1]
    parts = sharding.shards(first, 0)
    span = _span(0, sharding.shape.num_layers - 1)
    return TensorPlan(
        key=first.key.replace("decoder.layers.", f"decoder.layers.{span}."),
        hf_names=[_spanned(a, b) for a, b in zip(first.hf_names, last.hf_names, strict=True)],
        rows=_rows(first),
        global_shape=list(parts[0].global_shape),
        local_shape=[sum(part.rows for part in parts), *parts[0].local_shape[1:]],
        split=_split_words(first, sharding.layout),
    )


def _spanned(first: str, last: str) -> str:
    """Two names that differ in numbers, as one: `model.layers.[0-79].mlp...`."""
    pairs = zip(first.split("."), last.split("."), strict=True)
    return ".".join(a if not a.isdigit() else _span(int(a), int(b)) for a, b in pairs)


def _span(first: int, last: int) -> str:
    return f"[{first}-{last}]" if first != last else str(first)


def _rows(unit: Unit) -> str:
    """The segments in words; a sequence that repeats is told once."""
    names = [name.split(".")[-2] for name in unit.hf_names]
    if len(unit.segments) == 1:
        return "as they are"
    period = len(names)
    counts = [segment.count for segment in unit.segments[:period]]
    told = ", ".join(f"{count} of {name}" for count, name in zip(counts, names, strict=True))
    times = len(unit.segments) // period
    return told if times == 1 else f"{times} times ({told})"


def _split_words(unit: Unit, layout: Layout) -> str:
    if unit.expert is not None:
        groups = layout.expert_parallel
        experts = unit.axes[1] // groups
        return f"{experts} experts each over EP {groups}" if groups > 1 else "whole"
    if unit.split is Split.REPLICATED or layout.tensor_parallel == 1:
        return "whole"
    return f"{unit.split.value} over TP {layout.tensor_parallel}"


def _stage_plan(stage: int, sharding: Sharding, element_bytes: int, bytes_per_second: float) -> StagePlan:
    shards = [shard for chunk in sharding.chunks(RankCoordinates(0, stage, 0)) for shard in chunk]
    parameters = sum(shard.size for shard in shards)
    read = element_bytes * sum(shard.source_size for shard in shards)
    return StagePlan(
        stage=stage,
        layers=[(chunk.start, chunk.stop - 1) for chunk in sharding.layers(stage)],
        parameters=parameters,
        weight_bytes=parameters * PRECISION_BYTES[sharding.layout.precision],
        read_bytes=read,
        read_seconds=read / bytes_per_second,
    )


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
