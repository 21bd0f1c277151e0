"""What the `config.json` of Llama and its relatives means to Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_erpd.checkpoint.mapping.shape import Family, ModelShape
from megatron_erpd.errors import CheckpointError

_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3's rope parameters that Megatron-Core 0.19 has as constants (`RotaryEmbedding._apply_scaling`)."""


def read_shape(path: Path, family: Family, config: Any) -> ModelShape:
    _refuse_inexpressible(path, family, config)
    moe = family.mixture
    return ModelShape(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        tied_embeddings=bool(config.tie_word_embeddings),
        num_experts=config.num_experts if moe else 0,
        experts_per_token=config.num_experts_per_tok if moe else 0,
        expert_ffn_hidden_size=getattr(config, moe.ffn_size_key) if moe else 0,
    )


def context_length(path: Path, config: Any, max_length: int | None) -> int:
    """Up to how many tokens full attention computes what the model does."""
    context = int(config.max_position_embeddings)
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        window = None
    if max_length is not None and max_length > context:
        raise CheckpointError(
            f"{path}: max_position_embeddings is {context}, but sequences have up to {max_length} tokens; "
            "leave out the longer ones"
        )
    if max_length is not None and window is not None and max_length > window:
        raise CheckpointError(
            f"{path}: sliding_window is {window}, but sequences have up to {max_length} tokens; attention is computed "
            "over the whole sequence, which is exact only up to the window: leave out the longer ones"
        )
    return context if window is None else min(context, int(window))


def flags(path: Path, shape: ModelShape, config: Any, max_length: int | None) -> dict[str, object]:
    """Megatron's architecture arguments (`config.model_flags`)."""
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "norm_epsilon": float(config.rms_norm_eps),
        "swiglu": True,
        "disable_bias_linear": True,
        "add_qkv_bias": shape.family.qkv_bias,
        "qk_layernorm": shape.family.qk_norm,
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
        "max_position_embeddings": context_length(path, config, max_length),
        "vocab_size": shape.vocab_size,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # transformers computes the attention's softmax in fp32 whatever the model's precision.
        "attention_softmax_in_fp32": True,
        **_mixture_flags(shape, config),
        **_rope_flags(path, config),
    }


def _refuse_inexpressible(path: Path, family: Family, config: Any) -> None:
    """Keys that the supported architectures know and that Megatron has no exact counterpart for."""
    if family.mixture:
        _refuse_mixture(path, config)
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"{path}: hidden_act is {config.hidden_act!r}; only 'silu' (SwiGLU) is supported")
    if getattr(config, "attention_bias", False):
        raise CheckpointError(
            f"{path}: attention_bias is true, which puts a bias on o_proj too; Megatron has one switch for that bias "
            "and the feed-forward layer's, so it can't be expressed"
        )
    if getattr(config, "mlp_bias", False):
        raise CheckpointError(f"{path}: mlp_bias is true; Megatron can't express it without a bias on o_proj")
    layer_types = set(getattr(config, "layer_types", None) or [])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise CheckpointError(f"{path}: layer_types holds {sorted(unknown)}; only full and sliding attention are known")


def _refuse_mixture(path: Path, config: Any) -> None:
    """Keys that make a mixture something other than equal layers of routed experts."""
    for key in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        if getattr(config, key, None):
            raise CheckpointError(
                f"{path}: {key} is {getattr(config, key)}; experts shared by all tokens are not supported"
            )
    if getattr(config, "mlp_only_layers", None):
        raise CheckpointError(
            f"{path}: mlp_only_layers is {config.mlp_only_layers}; layers with and without experts can't be mixed"
        )
    if getattr(config, "decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            f"{path}: decoder_sparse_step is {config.decoder_sparse_step}, so that some layers have no experts; only 1 "
            "is supported"
        )
    if getattr(config, "router_jitter_noise", 0):
        raise CheckpointError(
            f"{path}: router_jitter_noise is {config.router_jitter_noise}; a policy whose training is noisy is not the "
            "one that was sampled from: set it to 0"
        )
    experts, chosen = config.num_experts, config.num_experts_per_tok
    if experts < 2:
        raise CheckpointError(f"{path}: num_experts is {experts}; a mixture has at least 2")
    if not 1 <= chosen <= experts:
        raise CheckpointError(f"{path}: num_experts_per_tok is {chosen}; it must be from 1 to the {experts} experts")
    if chosen == 1 and _renormalizes(config):
        raise CheckpointError(
            f"{path}: num_experts_per_tok is 1 and its weight is normalised to 1, which leaves the router without a "
            "gradient; Megatron refuses it"
        )


def _renormalizes(config: Any) -> bool:
    """Whether the chosen experts' weights are divided by their sum; Mixtral has no key for it and always does."""
    return bool(getattr(config, "norm_topk_prob", True))


def _mixture_flags(shape: ModelShape, config: Any) -> dict[str, object]:
    """Routing as transformers computes it: softmax in fp32 over all experts, the largest probabilities, renormalised or
    not. Renormalised, that is Megatron's default, the softmax over the largest logits. No load balancing: the objective
    is the loss alone."""
    if not shape.num_experts:
        return {}
    return {
        "num_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn_hidden_size,
        "moe_layer_freq": 1,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not _renormalizes(config),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _rope_flags(path: Path, config: Any) -> dict[str, object]:
    """Rotary embedding. `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (4) read alike."""
    rope: dict[str, Any] = config.rope_parameters
    theta = float(rope["rope_theta"])
    if theta != int(theta):
        raise CheckpointError(f"{path}: rope_theta is {theta}; Megatron's --rotary-base takes whole numbers only")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']}; only 1 is supported")
    flags: dict[str, object] = {
        "position_embedding_type": "rope",
        "rotary_base": int(theta),
        "rotary_percent": 1.0,
    }
    kind = rope["rope_type"]
    if kind == "default":
        return flags
    if kind != "llama3":
        raise CheckpointError(f"{path}: rope_type is {kind!r}; supported: 'default' and 'llama3'")
    for key, value in _LLAMA3_CONSTANTS.items():
        if float(rope[key]) != value:
            raise CheckpointError(
                f"{path}: the rope's {key} is {rope[key]}; Megatron's Llama 3 scaling has it fixed at {value:g}"
            )
    return {**flags, "use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
