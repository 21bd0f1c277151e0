"""The table of parameters: which rows of which Hugging Face tensors make up which Megatron tensor.

Megatron's names are the global keys of `model.sharded_state_dict()`. They are the same for the local and for the
Transformer Engine layer spec: both store a layer's norms under the name of the projection that follows
(`linear_qkv.layer_norm_weight`), because Transformer Engine fuses the two. Decoder layers are a leading axis of the
global tensor, not part of its key.

Every difference between the two layouts is a rearrangement of rows, so a tensor's layout is a sequence of `Segment`s:
from Megatron's row 0 onwards, which rows of which source tensor. Import and export both walk the segments; neither
knows of attention or feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_erpd.checkpoint.hf_config import ModelShape


@dataclass(frozen=True)
class Segment:
    """`count` rows from row `start` of source tensor number `tensor`."""

    tensor: int
    start: int
    count: int


RowLayout = Callable[[ModelShape], tuple[Segment, ...]]
Size = Callable[[ModelShape], int]


def plain(rows: Size) -> RowLayout:
    """One source tensor, as it is."""
    return lambda shape: (Segment(0, 0, rows(shape)),)


def gate_then_up(shape: ModelShape) -> tuple[Segment, ...]:
    """SwiGLU's two projections as one: all rows of the gate, then all rows of the up projection."""
    return (Segment(0, 0, shape.ffn_hidden_size), Segment(1, 0, shape.ffn_hidden_size))


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


def _queries(shape: ModelShape) -> int:
    return shape.query_size


def _head_dim(shape: ModelShape) -> int:
    return shape.head_dim


def _vocabulary(shape: ModelShape) -> int:
    return shape.vocab_size


def _always(shape: ModelShape) -> bool:
    return True


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
        hf_names: source tensors, `{layer}` standing for the layer's number.
        rows: how their rows make up Megatron's.
        columns: size of the second dimension; None for a vector.
        present: whether a model of this shape has the parameter.
        padded: Megatron may append rows (of zeros here) after the last segment; they are never exported.
    """

    key: str
    hf_names: tuple[str, ...]
    rows: RowLayout
    columns: Size | None = None
    present: Callable[[ModelShape], bool] = _always
    padded: bool = False

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf_names[0]


_ATTENTION = "decoder.layers.self_attention"
_MLP = "decoder.layers.mlp"
_HF_LAYER = "model.layers.{layer}"
_HF_ATTENTION = "model.layers.{layer}.self_attn"
_HF_MLP = "model.layers.{layer}.mlp"


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF_ATTENTION}.{projection}_proj.{kind}" for projection in "qkv")


EMBEDDING_KEY = "embedding.word_embeddings.weight"
EMBEDDING_HF_NAME = "model.embed_tokens.weight"
HEAD_HF_NAME = "lm_head.weight"

TABLE: tuple[Entry, ...] = (
    Entry(EMBEDDING_KEY, (EMBEDDING_HF_NAME,), plain(_vocabulary), _hidden, padded=True),
    Entry(f"{_ATTENTION}.linear_qkv.layer_norm_weight", (f"{_HF_LAYER}.input_layernorm.weight",), plain(_hidden)),
    Entry(f"{_ATTENTION}.linear_qkv.weight", _qkv("weight"), by_query_group, _hidden),
    Entry(f"{_ATTENTION}.linear_qkv.bias", _qkv("bias"), by_query_group, present=_has_qkv_bias),
    Entry(
        f"{_ATTENTION}.q_layernorm.weight", (f"{_HF_ATTENTION}.q_norm.weight",), plain(_head_dim), present=_has_qk_norm
    ),
    Entry(
        f"{_ATTENTION}.k_layernorm.weight", (f"{_HF_ATTENTION}.k_norm.weight",), plain(_head_dim), present=_has_qk_norm
    ),
    Entry(f"{_ATTENTION}.linear_proj.weight", (f"{_HF_ATTENTION}.o_proj.weight",), plain(_hidden), _queries),
    Entry(f"{_MLP}.linear_fc1.layer_norm_weight", (f"{_HF_LAYER}.post_attention_layernorm.weight",), plain(_hidden)),
    Entry(
        f"{_MLP}.linear_fc1.weight", (f"{_HF_MLP}.gate_proj.weight", f"{_HF_MLP}.up_proj.weight"), gate_then_up, _hidden
    ),
    Entry(f"{_MLP}.linear_fc2.weight", (f"{_HF_MLP}.down_proj.weight",), plain(_hidden), _ffn),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), plain(_hidden)),
    Entry("output_layer.weight", (HEAD_HF_NAME,), plain(_vocabulary), _hidden, present=_is_untied, padded=True),
)
"""All parameters of all supported architectures, in the order in which they are exported."""

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Tensors in older Hugging Face folders that follow from `config.json`; neither imported nor exported."""


@dataclass(frozen=True)
class Unit:
    """One Megatron tensor of one layer (or of the model), with its source tensors' real names.

    Megatron's global tensor has the leading axes `axes` (its layers), and this unit is its part at the indices `at`.
    """

    key: str
    at: tuple[int, ...]
    axes: tuple[int, ...]
    hf_names: tuple[str, ...]
    segments: tuple[Segment, ...]
    columns: int | None
    padded: bool

    @property
    def layer(self) -> int | None:
        return self.at[0] if self.at else None

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

    def __str__(self) -> str:
        return self.key if self.layer is None else f"{self.key} of layer {self.layer}"


def units(shape: ModelShape) -> list[Unit]:
    """All tensors of a model of this shape: before the layers, layer by layer, after the layers."""
    present = [entry for entry in TABLE if entry.present(shape)]
    layered = [entry for entry in present if entry.per_layer]
    first = present.index(layered[0])
    before = [entry for entry in present[:first] if not entry.per_layer]
    after = [entry for entry in present[first:] if not entry.per_layer]
    layers = [_unit(entry, shape, layer) for layer in range(shape.num_layers) for entry in layered]
    return [*(_unit(e, shape, None) for e in before), *layers, *(_unit(e, shape, None) for e in after)]


def _unit(entry: Entry, shape: ModelShape, layer: int | None) -> Unit:
    columns = None if entry.columns is None else entry.columns(shape)
    names = tuple(name.format(layer=layer) for name in entry.hf_names)
    at, axes = ((), ()) if layer is None else ((layer,), (shape.num_layers,))
    return Unit(entry.key, at, axes, names, entry.rows(shape), columns, entry.padded)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor that a Hugging Face folder of this model must hold, in the order of export."""
    return {name: size for unit in units(shape) for name, size in unit.hf_shapes().items()}


def is_ignored(name: str) -> bool:
    """Whether a Hugging Face tensor carries nothing that isn't in `config.json`."""
    return name.endswith(IGNORED_SUFFIXES)
