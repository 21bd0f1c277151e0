"""Tiny models of every family with random weights: as Hugging Face folders, and as Megatron models."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 131
"""Prime, so that Megatron pads it at every tensor-parallel size."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-untied": (
        "llama",
        {"max_position_embeddings": 131072, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False},
    ),
    "llama-tied-mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral-head-dim": ("mistral", {"head_dim": 12, "sliding_window": 64, "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False, "num_hidden_layers": 4}),
}
"""Name to model type and what differs from `_COMMON`."""

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-unnormalized": (
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", {"num_key_value_heads": 4, "num_local_experts": 4}),
}
"""The same of mixtures of experts. The first has three layers, which two pipeline stages can't share evenly, and two
key/value heads, which four tensor-parallel ranks can't have one each of."""

ROUTER_SCALE = 6.0
"""Spreads the routers' logits, so that no token is close to another choice of experts."""


def save_hf_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, **save_options: Any) -> Any:
    """Writes a model of `MODELS` or `MIXTURES` with random weights, biases and norms; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = {**MODELS, **MIXTURES}[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **changes})
    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                scale = ROUTER_SCALE if key.endswith("mlp.gate.weight") else 1.5
                parameter.copy_(noise * (1.0 if "embed" in key else scale / parameter.shape[-1] ** 0.5))
            else:
                parameter.copy_(noise * 0.3 + (1.0 if "norm" in key else 0.0))
    model.save_pretrained(folder, **save_options)
    return model


def build_megatron_model(
    flags: dict[str, Any],
    virtual_stages: int | None = None,
    vp_stage: int | None = None,
    layers: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Any:
    """A `GPTModel` (or one of its chunks) of Megatron-Core's local layer spec from the flags of `model_flags`.

    Written apart from the project's own way from flags to models, to test one against the other. `layers` makes
    another spec of the config; `settings` are further ones of Megatron's `TransformerConfig`.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    experts = {name: value for name, value in flags.items() if name.startswith("moe_")}
    stages = {name: value for name, value in flags.items() if name.startswith("account_for_")}
    config = TransformerConfig(
        num_moe_experts=flags.get("num_experts"),
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        **experts,
        **stages,
        **settings,
        num_layers=flags["num_layers"],
        hidden_size=flags["hidden_size"],
        ffn_hidden_size=flags["ffn_hidden_size"],
        num_attention_heads=flags["num_attention_heads"],
        num_query_groups=flags["num_query_groups"],
        kv_channels=flags["kv_channels"],
        normalization=flags["normalization"],
        layernorm_epsilon=flags["norm_epsilon"],
        gated_linear_unit=flags["swiglu"],
        activation_func=torch.nn.functional.silu,
        add_bias_linear=not flags["disable_bias_linear"],
        add_qkv_bias=flags["add_qkv_bias"],
        qk_layernorm=flags["qk_layernorm"],
        attention_dropout=flags["attention_dropout"],
        hidden_dropout=flags["hidden_dropout"],
        attention_softmax_in_fp32=flags["attention_softmax_in_fp32"],
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=virtual_stages,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=flags["normalization"],
        qk_layernorm=flags["qk_layernorm"],
    )
    if config.num_moe_experts:  # the checkpoint's keys are Transformer Engine's
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    unit = flags["make_vocab_size_divisible_by"] * config.tensor_model_parallel_size
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec if layers is None else layers(config),
        vocab_size=-(-flags["vocab_size"] // unit) * unit,
        max_sequence_length=flags["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=not flags["untie_embeddings_and_output_weights"],
        position_embedding_type=flags["position_embedding_type"],
        rotary_percent=flags["rotary_percent"],
        rotary_base=flags["rotary_base"],
        rope_scaling=flags.get("use_rope_scaling", False),
        rope_scaling_factor=flags.get("rope_scaling_factor", 8.0),
    )
    return model.eval()


def set_layout(
    tensor_parallel: int,
    pipeline_parallel: int,
    virtual_stages: int | None = None,
    expert_parallel: int = 1,
    **settings: Any,
) -> None:
    """Megatron's process groups for a layout; ranks left over are DP replicas. Experts are never split.

    A layout that is set already stays: Megatron never closes the groups of the one before, and each has threads.
    """
    from megatron_erpd.platform import enable_cpu

    enable_cpu()
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    wanted = (tensor_parallel, pipeline_parallel, virtual_stages, expert_parallel)
    if state.is_initialized():
        sizes = (state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size())
        chunks = state.get_virtual_pipeline_model_parallel_world_size()
        if wanted == (*sizes, chunks, state.get_expert_model_parallel_world_size()):
            return
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_parallel,
        pipeline_parallel,
        virtual_stages,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        **settings,
    )
    model_parallel_cuda_manual_seed(1234)


def load_checkpoint(chunks: Sequence[Any], folder: Path) -> None:
    """Has Megatron load a checkpoint into this rank's chunks of a model."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(
        {str(i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}, str(folder)
    )
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(i)])


def save_checkpoint(chunks: Sequence[Any], folder: Path) -> None:
    """Has Megatron save this rank's chunks of a model."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # What this process writes itself needs no queue between processes, for which Megatron would start an interpreter.
    filesystem_async._results_queue = queue.Queue()
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save({str(i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}, str(folder))
