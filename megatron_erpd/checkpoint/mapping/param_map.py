"""What a family's table of parameters says: which rows of which Hugging Face tensors make up which Megatron tensor.

Megatron's names are the global keys of `model.sharded_state_dict()`. They are the same for the local and for the
Transformer Engine layer spec: both store a layer's norms under the name of the projection that follows
(`linear_qkv.layer_norm_weight`), because Transformer Engine fuses the two. A mixture's experts are no single
projection, so the norm before them keeps its own name. Decoder layers are a leading axis of the global tensor, not
part of its key, and experts are a second one; `SequentialMLP` and Transformer Engine's `TEGroupedMLP` give the same
keys and axes (`megatron/core/transformer/moe/experts.py`).

Every difference between the two layouts is a rearrangement of rows, so a tensor's layout is a sequence of `Segment`s:
from Megatron's row 0 onwards, which rows of which source tensor. Import and export both walk the segments; neither
knows of attention or feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from megatron_erpd.checkpoint.mapping.shape import ModelShape


@dataclass(frozen=True)
class Segment:
    """`count` rows from row `start` of source tensor number `tensor`."""

    tensor: int
    start: int
    count: int


class Split(Enum):
    """What tensor parallelism gives to each of its ranks."""

    REPLICATED = "replicated"
    """Every rank has all of it."""
    ROWS = "rows"
    """A range of Megatron's rows (column-parallel: each rank computes some of the outputs)."""
    ROWS_OF_EACH = "rows of each"
    """The same range of rows of every source tensor, one after another (a gated layer's gate and up projection)."""
    COLUMNS = "columns"
    """A range of the columns (row-parallel: each rank takes some of the inputs, and the outputs are summed)."""


RowLayout = Callable[[ModelShape], tuple[Segment, ...]]
Size = Callable[[ModelShape], int]


def plain(rows: Size) -> RowLayout:
    """One source tensor, as it is."""
    return lambda shape: (Segment(0, 0, rows(shape)),)


def gate_then_up(rows: Size) -> RowLayout:
    """SwiGLU's two projections as one: all rows of the gate, then all rows of the up projection."""
    return lambda shape: (Segment(0, 0, rows(shape)), Segment(1, 0, rows(shape)))


def by_query_group(shape: ModelShape) -> tuple[Segment, ...]:
    """Query, key and value projections, interleaved: per query group its queries, then its key, then its value."""
    queries = shape.num_heads // shape.num_query_groups * shape.head_dim
    dim = shape.head_dim
    segments: list[Segment] = []
    for group in range(shape.num_query_groups):
        segments += [Segment(0, group * queries, queries), Segment(1, group * dim, dim), Segment(2, group * dim, dim)]
    return tuple(segments)


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Args:
        key: Megatron's global key.
        hf_names: source tensors; `{layer}` and `{expert}` stand for numbers, `{moe.NAME}` for the family's own word
            (`shape.Mixture`).
        rows: how their rows make up Megatron's.
        columns: size of the second dimension; None for a vector.
        split: what each tensor-parallel rank has of it. Experts are split by the expert-tensor-parallel size instead.
        present: whether a model of this shape has the parameter.
        padded: Megatron may append rows (of zeros here) after the last segment; they are never exported.
    """

    key: str
    hf_names: tuple[str, ...]
    rows: RowLayout
    columns: Size | None = None
    split: Split = Split.REPLICATED
    present: Callable[[ModelShape], bool] = lambda shape: True
    padded: bool = False

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf_names[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.hf_names[0]


EMBEDDING_KEY = "embedding.word_embeddings.weight"
EMBEDDING_HF_NAME = "model.embed_tokens.weight"
HEAD_HF_NAME = "lm_head.weight"

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Tensors in older Hugging Face folders that follow from `config.json`; neither imported nor exported."""


JOINED_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
"""Ends of names under which transformers 5 holds a layer's experts in memory, and saves them if it is told to."""


@dataclass(frozen=True)
class Unit:
    """One Megatron tensor of one layer, of one expert in it or of the model, with its source tensors' real names.

    Megatron's global tensor has the leading axes `axes` (layers; experts), and this unit is its part at the indices
    `at`.
    """

    key: str
    at: tuple[int, ...]
    axes: tuple[int, ...]
    hf_names: tuple[str, ...]
    segments: tuple[Segment, ...]
    columns: int | None
    padded: bool
    split: Split

    @property
    def layer(self) -> int | None:
        return self.at[0] if self.at else None

    @property
    def expert(self) -> int | None:
        return self.at[1] if len(self.at) > 1 else None

    @property
    def num_rows(self) -> int:
        """Rows that come from source tensors, i.e. without padding."""
        return sum(segment.count for segment in self.segments)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every source tensor."""
        rows = [0] * len(self.hf_names)
        for segment in self.segments:
            rows[segment.tensor] += segment.count
        tail = () if self.columns is None else (self.columns,)
        return {name: (count, *tail) for name, count in zip(self.hf_names, rows, strict=True)}

    def pieces(self, start: int, count: int) -> list[tuple[int, Segment]]:
        """What lies in Megatron's rows `[start, start + count)`: pairs of a row of that range and the source's rows."""
        found = []
        at = 0
        for segment in self.segments:
            low, high = max(at, start), min(at + segment.count, start + count)
            if low < high:
                found.append((low - start, Segment(segment.tensor, segment.start + low - at, high - low)))
            at += segment.count
        return found

    def places(self, tensor: int, start: int, count: int) -> list[tuple[int, int, int]]:
        """Where rows `[start, start + count)` of a source tensor lie: a row of that range, Megatron's row, how many."""
        found = []
        at = 0
        for segment in self.segments:
            low, high = max(segment.start, start), min(segment.start + segment.count, start + count)
            if segment.tensor == tensor and low < high:
                found.append((low - start, at + low - segment.start, high - low))
            at += segment.count
        return found

    def __str__(self) -> str:
        words = [f"{what} {i}" for what, i in zip(("layer", "expert"), self.at, strict=False)]
        return f"{self.key} of {', '.join(words)}" if words else self.key


def units(shape: ModelShape) -> list[Unit]:
    """All tensors of a model of this shape: before the layers, layer by layer (there expert by expert), after them."""
    present = [entry for entry in shape.family.table if entry.present(shape)]
    layered = [entry for entry in present if entry.per_layer]
    first = present.index(layered[0])
    before = [entry for entry in present[:first] if not entry.per_layer]
    after = [entry for entry in present[first:] if not entry.per_layer]
    layers = [unit for layer in range(shape.num_layers) for unit in _layer_units(layered, shape, layer)]
    return [*(_unit(e, shape) for e in before), *layers, *(_unit(e, shape) for e in after)]


def _layer_units(entries: Sequence[Entry], shape: ModelShape, layer: int) -> list[Unit]:
    found: list[Unit] = []
    for per_expert, group in groupby(entries, key=lambda entry: entry.per_expert):
        places = [(layer, expert) for expert in range(shape.num_experts)] if per_expert else [(layer,)]
        same = list(group)
        found += [_unit(entry, shape, at) for at in places for entry in same]
    return found


def _unit(entry: Entry, shape: ModelShape, at: tuple[int, ...] = ()) -> Unit:
    columns = None if entry.columns is None else entry.columns(shape)
    numbers = dict(zip(("layer", "expert"), at, strict=False))
    names = tuple(name.format(**numbers, moe=shape.family.mixture) for name in entry.hf_names)
    axes = (shape.num_layers, shape.num_experts)[: len(at)]
    return Unit(entry.key, at, axes, names, entry.rows(shape), columns, entry.padded, entry.split)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor that a Hugging Face folder of this model must hold, in the order of export."""
    return {name: size for unit in units(shape) for name, size in unit.hf_shapes().items()}


def is_ignored(name: str) -> bool:
    """Whether a Hugging Face tensor carries nothing that isn't in `config.json`."""
    return name.endswith(IGNORED_SUFFIXES)
