"""The supported architectures.

A new architecture whose parts are known is a line of `FAMILIES`; a tensor that no family had before is a line of
`llama.table` too. One that shares little with Llama is a folder beside `llama/`, with a table and a reader of its own.
"""

from __future__ import annotations

from megatron_erpd.checkpoint.mapping.llama import config, table
from megatron_erpd.checkpoint.mapping.shape import Family, Mixture


def _llama(name: str, qkv_bias: bool = False, qk_norm: bool = False, mixture: Mixture | None = None) -> Family:
    return Family(
        name,
        qkv_bias,
        qk_norm,
        mixture,
        table=table.TABLE,
        read_shape=config.read_shape,
        context_length=config.context_length,
        flags=config.flags,
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _llama("llama"),
    "MistralForCausalLM": _llama("mistral"),
    "Qwen2ForCausalLM": _llama("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": _llama("qwen3", qk_norm=True),
    "Qwen3MoeForCausalLM": _llama(
        "qwen3_moe",
        qk_norm=True,
        mixture=Mixture("moe_intermediate_size", "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    "MixtralForCausalLM": _llama(
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
