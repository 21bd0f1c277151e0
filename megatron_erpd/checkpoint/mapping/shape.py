"""What sets a family of models apart, and the sizes that make a model of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_erpd.checkpoint.mapping.param_map import Entry


@dataclass(frozen=True)
class Mixture:
    """The words of a family of mixtures of experts. The number of experts is `num_experts` in transformers for all."""

    ffn_size_key: str
    """Key of `config.json` with the rows of an expert's gate projection."""
    block: str
    """Module of a layer that holds the router (`BLOCK.gate`) and the experts (`BLOCK.experts.N`)."""
    gate: str
    up: str
    down: str
    """An expert's projections."""


@dataclass(frozen=True)
class Family:
    """An architecture: which parts it has of those that its table knows, the table, and how its `config.json` is read.

    `path`, the first argument of the functions, is that of `config.json`, for messages; `config` is what transformers
    reads from it. All raise `CheckpointError` for a key that Megatron has no exact counterpart for.
    """

    name: str
    """Its `model_type`."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias."""
    qk_norm: bool = False
    """Queries and keys are normalised per head, before the rotary embedding."""
    mixture: Mixture | None = None
    """Every feed-forward layer is a mixture of experts."""
    table: tuple[Entry, ...] = field(kw_only=True, repr=False, compare=False)
    """Its parameters, in the order in which they are exported."""
    read_shape: Callable[[Path, Family, Any], ModelShape] = field(kw_only=True, repr=False, compare=False)
    context_length: Callable[[Path, Any, int | None], int] = field(kw_only=True, repr=False, compare=False)
    """Up to how many tokens Megatron computes what the model does; the last argument is the longest sequence."""
    flags: Callable[[Path, ModelShape, Any, int | None], dict[str, object]] = field(
        kw_only=True, repr=False, compare=False
    )
    """Megatron's arguments for the architecture."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes and switches that decide every parameter's name and shape."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Rows of the gate projection of a dense layer; in a mixture, which has none, without effect."""
    num_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the Hugging Face folder, without Megatron's padding rows."""
    tied_embeddings: bool
    num_experts: int = 0
    """Of every layer; 0 in a dense model, as the next two."""
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    """Rows of an expert's gate projection."""

    @property
    def query_size(self) -> int:
        """Rows of the query projection; need not be `hidden_size`."""
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_query_groups * self.head_dim
