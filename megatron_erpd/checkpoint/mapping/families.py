"""The supported architectures, and the sizes that make a model of one of them.

A new architecture whose parts are known is a line of `FAMILIES`; a tensor that no family had before is a line of
`param_map.TABLE` too.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    """What sets an architecture apart from a plain Llama."""

    name: str
    qkv_bias: bool = False
    """Query, key and value projections have a bias."""
    qk_norm: bool = False
    """Queries and keys are normalised per head, before the rotary embedding."""
    mixture: Mixture | None = None
    """Every feed-forward layer is a mixture of experts."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        qk_norm=True,
        mixture=Mixture("moe_intermediate_size", "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    "MixtralForCausalLM": Family(
        "mixtral", mixture=Mixture("intermediate_size", "block_sparse_moe", gate="w1", up="w3", down="w2")
    ),
}
"""Supported architectures, as `config.json` names them."""

_GEMMA = (
    "it has no option for the norms after attention and after the feed-forward layer, which {}; nothing close to the "
    "model would be the model"
)
REFUSED: dict[str, str] = {
    "Gemma2ForCausalLM": _GEMMA.format("Gemma 2 has, nor for its soft-capped attention scores and logits"),
    "Gemma3ForCausalLM": _GEMMA.format("Gemma 3 has, nor for a second rotary base of the layers with a sliding window"),
    "Gemma3ForConditionalGeneration": _GEMMA.format(
        "Gemma 3 has, nor for a second rotary base of the layers with a sliding window"
    ),
}
"""Architectures that were looked into, and what Megatron-Core 0.19 lacks for them."""


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
