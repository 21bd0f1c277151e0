"""The parameters of Llama and its relatives."""

from __future__ import annotations

from operator import attrgetter

from megatron_erpd.checkpoint.mapping.param_map import (
    EMBEDDING_HF_NAME,
    EMBEDDING_KEY,
    HEAD_HF_NAME,
    Entry,
    Split,
    by_query_group,
    gate_then_up,
    plain,
)
from megatron_erpd.checkpoint.mapping.shape import ModelShape

_hidden, _head_dim, _queries = attrgetter("hidden_size"), attrgetter("head_dim"), attrgetter("query_size")
_vocabulary, _ffn = attrgetter("vocab_size"), attrgetter("ffn_hidden_size")
_experts, _expert_ffn = attrgetter("num_experts"), attrgetter("expert_ffn_hidden_size")
_has_qkv_bias, _has_qk_norm = attrgetter("family.qkv_bias"), attrgetter("family.qk_norm")


def _is_mixture(shape: ModelShape) -> bool:
    return shape.family.mixture is not None


def _is_dense(shape: ModelShape) -> bool:
    return shape.family.mixture is None


def _is_untied(shape: ModelShape) -> bool:
    return not shape.tied_embeddings


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
"""All parameters of all these architectures, in the order in which they are exported."""
