"""The table of parameters: which rows of which Hugging Face tensors make up which Megatron tensor.

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

from megatron_erpd.checkpoint.mapping.families import ModelShape


@dataclass(frozen=True)
class Segment:
    """`count` rows from row `start` of source tensor number `tensor`."""

    tensor: int
    start: int
    count: int


class Split(Enum):
    """What tensor parallelism gives to each of its ranks."""

    WHOLE = "whole"
    """Everything, on every rank."""
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


def _hidden(shape: ModelShape) -> int:
    return shape.hidden_size


def _ffn(shape: ModelShape) -> int:
    return shape.ffn_hidden_size


def _expert_ffn(shape: ModelShape) -> int:
    return shape.expert_ffn_hidden_size


def _experts(shape: ModelShape) -> int:
    return shape.num_experts


def _queries(shape: ModelShape) -> int:
    return shape.query_size


def _head_dim(shape: ModelShape) -> int:
    return shape.head_dim


def _vocabulary(shape: ModelShape) -> int:
    return shape.vocab_size


def _always(shape: ModelShape) -> bool:
    return True


def _is_dense(shape: ModelShape) -> bool:
    return shape.family.mixture is None


def _is_mixture(shape: ModelShape) -> bool:
    return shape.family.mixture is not None


def _has_qkv_bias(shape: ModelShape) -> bool:
    return shape.family.qkv_bias


def _has_qk_norm(shape: ModelShape) -> bool:
    return shape.family.qk_norm


def _is_untied(shape: ModelShape) -> bool:
    return not shape.tied_embeddings


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Args:
        key: Megatron's global key.
        hf_names: source tensors; `{layer}` and `{expert}` stand for numbers, `{moe.NAME}` for the family's own word
            (`hf_config.Mixture`).
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
    split: Split = Split.WHOLE
    present: Callable[[ModelShape], bool] = _always
    padded: bool = False

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf_names[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.hf_names[0]


_ATTENTION = "decoder.layers.self_attention"
_MLP = "decoder.layers.mlp"
_EXPERTS = "decoder.layers.mlp.experts.experts"
_HF_LAYER = "model.layers.{layer}"
_HF_ATTENTION = "model.layers.{layer}.self_attn"
_HF_MLP = "model.layers.{layer}.mlp"
_HF_MOE = "model.layers.{layer}.{moe.block}"
_HF_EXPERT = "model.layers.{layer}.{moe.block}.experts.{expert}"


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF_ATTENTION}.{projection}_proj.{kind}" for projection in "qkv")


EMBEDDING_KEY = "embedding.word_embeddings.weight"
EMBEDDING_HF_NAME = "model.embed_tokens.weight"
HEAD_HF_NAME = "lm_head.weight"

_Q_NORM, _K_NORM = (f"{_HF_ATTENTION}.q_norm.weight",), (f"{_HF_ATTENTION}.k_norm.weight",)
_POST_ATTENTION_NORM = (f"{_HF_LAYER}.post_attention_layernorm.weight",)
_GATE_AND_UP = (f"{_HF_MLP}.gate_proj.weight", f"{_HF_MLP}.up_proj.weight")
_EXPERT_GATE_AND_UP = (f"{_HF_EXPERT}.{{moe.gate}}.weight", f"{_HF_EXPERT}.{{moe.up}}.weight")
_EXPERT_DOWN = (f"{_HF_EXPERT}.{{moe.down}}.weight",)
_ROWS, _EACH, _COLUMNS = Split.ROWS, Split.ROWS_OF_EACH, Split.COLUMNS

TABLE: tuple[Entry, ...] = (
    Entry(EMBEDDING_KEY, (EMBEDDING_HF_NAME,), plain(_vocabulary), _hidden, _ROWS, padded=True),
    # attention
    Entry(f"{_ATTENTION}.linear_qkv.layer_norm_weight", (f"{_HF_LAYER}.input_layernorm.weight",), plain(_hidden)),
    Entry(f"{_ATTENTION}.linear_qkv.weight", _qkv("weight"), by_query_group, _hidden, _ROWS),
    Entry(f"{_ATTENTION}.linear_qkv.bias", _qkv("bias"), by_query_group, None, _ROWS, _has_qkv_bias),
    Entry(f"{_ATTENTION}.q_layernorm.weight", _Q_NORM, plain(_head_dim), present=_has_qk_norm),
    Entry(f"{_ATTENTION}.k_layernorm.weight", _K_NORM, plain(_head_dim), present=_has_qk_norm),
    Entry(f"{_ATTENTION}.linear_proj.weight", (f"{_HF_ATTENTION}.o_proj.weight",), plain(_hidden), _queries, _COLUMNS),
    # feed-forward layer
    Entry(f"{_MLP}.linear_fc1.layer_norm_weight", _POST_ATTENTION_NORM, plain(_hidden), present=_is_dense),
    Entry(f"{_MLP}.linear_fc1.weight", _GATE_AND_UP, gate_then_up(_ffn), _hidden, _EACH, _is_dense),
    Entry(f"{_MLP}.linear_fc2.weight", (f"{_HF_MLP}.down_proj.weight",), plain(_hidden), _ffn, _COLUMNS, _is_dense),
    # mixture of experts
    Entry("decoder.layers.pre_mlp_layernorm.weight", _POST_ATTENTION_NORM, plain(_hidden), present=_is_mixture),
    Entry(f"{_MLP}.router.weight", (f"{_HF_MOE}.gate.weight",), plain(_experts), _hidden, present=_is_mixture),
    Entry(f"{_EXPERTS}.linear_fc1.weight", _EXPERT_GATE_AND_UP, gate_then_up(_expert_ffn), _hidden, _EACH, _is_mixture),
    Entry(f"{_EXPERTS}.linear_fc2.weight", _EXPERT_DOWN, plain(_hidden), _expert_ffn, _COLUMNS, _is_mixture),
    # after the layers
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), plain(_hidden)),
    Entry("output_layer.weight", (HEAD_HF_NAME,), plain(_vocabulary), _hidden, _ROWS, _is_untied, padded=True),
)
"""All parameters of all supported architectures, in the order in which they are exported."""

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
    present = [entry for entry in TABLE if entry.present(shape)]
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
