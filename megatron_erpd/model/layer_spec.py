"""Megatron's local layer spec with a norm that also works under sequence parallelism, and with `CausalAttention`.

The local spec's own norm (`WrappedTorchNorm`) asserts that sequence parallelism is off, because nothing tells
Megatron to sum the gradient of its weight over the tensor-parallel ranks. Marking the weight `sequence_parallel`
does: `finalize_model_grads` then adds it up. With Transformer Engine its own spec is taken and this file is not used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_erpd.model.attention import CausalAttention


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed by PyTorch.

    Input and output `[..., hidden_size]`, no collective. Under sequence parallelism each rank sees its own tokens,
    so the weight's gradient is a partial sum: the attribute `sequence_parallel` has Megatron add it over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's spec from Megatron-Core's own PyTorch modules and `RMSNorm`, for this pipeline stage."""
    submodules = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    attention = submodules.self_attention
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=attention.module,
        params=attention.params,
        submodules=replace(
            attention.submodules, core_attention=CausalAttention, q_layernorm=qk_norm, k_layernorm=qk_norm
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=replace(
            submodules,
            input_layernorm=RMSNorm,
            pre_mlp_layernorm=RMSNorm,
            self_attention=attention,
            sharded_state_dict_keys_map=_checkpoint_keys(config, submodules.sharded_state_dict_keys_map),
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _checkpoint_keys(config: TransformerConfig, local: dict[str, str]) -> dict[str, str]:
    """Names in checkpoints, so that those of the Transformer Engine spec load here and the other way round.

    The local spec renames every layer's second norm as if it were fused with `mlp.linear_fc1`. In a mixture Transformer
    Engine's spec has it apart, as `pre_mlp_layernorm` (`get_gpt_layer_with_transformer_engine_submodules`).
    """
    if config.num_moe_experts is None:
        return local
    return {name: key for name, key in local.items() if not name.startswith("pre_mlp_layernorm")}
