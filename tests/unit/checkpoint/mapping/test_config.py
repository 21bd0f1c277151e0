"""What `config.json` means, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.mapping.config import flags_to_argv, model_flags, read_model_shape
from megatron_erpd.errors import CheckpointError, LayoutError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_flags_of_a_llama(tmp_path: Path) -> None:
    flags = model_flags(write(tmp_path, {**LLAMA, "rope_scaling": LLAMA3_SCALING}), 2, 3)
    assert flags == {
        "num_layers": 6,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "disable_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 131072,
        "vocab_size": 131,
        "make_vocab_size_divisible_by": 128,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rotary_percent": 1.0,
        "use_rope_scaling": True,
        "rope_scaling_factor": 32.0,
    }


def test_what_sets_the_families_apart(tmp_path: Path) -> None:
    qwen2 = model_flags(write(tmp_path, {**QWEN2, "tie_word_embeddings": True}))
    assert qwen2["add_qkv_bias"] and not qwen2["qk_layernorm"] and qwen2["kv_channels"] == 8
    assert not qwen2["untie_embeddings_and_output_weights"]
    qwen3 = model_flags(write(tmp_path, QWEN3))
    assert qwen3["qk_layernorm"] and not qwen3["add_qkv_bias"] and qwen3["kv_channels"] == 32
    assert read_model_shape(tmp_path).query_size == 256


def test_flags_of_mixtures(tmp_path: Path) -> None:
    dense = model_flags(write(tmp_path, QWEN3))
    qwen3 = model_flags(write(tmp_path, QWEN3_MOE))
    added = {name: value for name, value in qwen3.items() if name not in dense}
    assert added == {
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_layer_freq": 1,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
    assert {name: qwen3[name] for name in dense} == dense
    assert model_flags(write(tmp_path, {**QWEN3_MOE, "norm_topk_prob": False}))["moe_router_pre_softmax"]
    mixtral = model_flags(write(tmp_path, MIXTRAL))
    assert (mixtral["num_experts"], mixtral["moe_ffn_hidden_size"], mixtral["moe_router_topk"]) == (4, 96, 2)
    assert not mixtral["moe_router_pre_softmax"] and not mixtral["qk_layernorm"]


def test_rope_of_both_generations_of_config_files_reads_alike(tmp_path: Path) -> None:
    old = model_flags(write(tmp_path, {**LLAMA, "rope_scaling": LLAMA3_SCALING}))
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    parameters = {**LLAMA3_SCALING, "rope_theta": 500000.0}
    assert model_flags(write(tmp_path, {**new, "rope_parameters": parameters})) == old


def test_a_sliding_window_bounds_the_length(tmp_path: Path) -> None:
    folder = write(tmp_path, {**MISTRAL, "sliding_window": 4096})
    assert model_flags(folder, max_length=4096)["max_position_embeddings"] == 4096
    with pytest.raises(CheckpointError, match="sliding_window is 4096, but sequences have up to 4097 tokens"):
        model_flags(folder, max_length=4097)
    assert model_flags(write(tmp_path, {**MISTRAL, "sliding_window": None}))["max_position_embeddings"] == 131072


def test_qwen2_slides_only_when_switched_on(tmp_path: Path) -> None:
    switched_off = {**QWEN2, "sliding_window": 128, "use_sliding_window": False, "max_window_layers": 3}
    assert model_flags(write(tmp_path, switched_off))["max_position_embeddings"] == 131072
    assert model_flags(write(tmp_path, {**switched_off, "use_sliding_window": True}))["max_position_embeddings"] == 128
    late = {**switched_off, "use_sliding_window": True, "max_window_layers": 6}
    assert model_flags(write(tmp_path, late))["max_position_embeddings"] == 131072


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAMA, "architectures": ["PhiForCausalLM"]}, "supported: one of LlamaForCausalLM, Mistral"),
        ({**LLAMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "no option .* soft-capped"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({**QWEN3_MOE, "shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size is 32"),
        ({**QWEN3_MOE, "num_experts": 0}, "num_experts is 0"),
        ({**QWEN3_MOE, "num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be from 1 to the 8 experts"),
        ({**MIXTRAL, "num_experts_per_tok": 1}, "num_experts_per_tok is 1 and its weight is normalised"),
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ({**LLAMA, "architectures": None}, "architectures is"),
        ({**LLAMA, "model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({**LLAMA, "attention_bias": True}, "attention_bias is true"),
        ({**QWEN3, "attention_bias": True}, "attention_bias is true"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias is true"),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
        ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "own.Model"}}, "auto_map is set"),
        ({**LLAMA, "rope_theta": 10000.5}, "rope_theta is 10000.5"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            "rope_type is 'yarn'",
        ),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (
            {**LLAMA, "rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 2.0}},
            "low_freq_factor is 2.0; .* fixed at 1",
        ),
        (
            {**LLAMA, "rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": 4096}},
            "original_max_position_embeddings is 4096",
        ),
        ({**LLAMA, "hidden_size": "64"}, "transformers does not accept it"),
    ],
)
def test_what_megatron_can_not_express_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        model_flags(write(tmp_path, config))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_and_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        model_flags(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        model_flags(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        model_flags(tmp_path)


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        (LLAMA, (16, 1), "size 16 does not divide the model's 8 attention heads; use 1, 2, 4 or 8"),
        (
            {**LLAMA, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
            (3, 1),
            "2 key/value heads, nor",
        ),
        ({**LLAMA, "intermediate_size": 100}, (8, 1), "the model's 100 rows of the feed-forward layer; use 1, 2 or 4"),
        (LLAMA, (3, 1), "size 3 does not divide"),
        (LLAMA, (0, 1), "size 0 does not divide"),
        (LLAMA, (1, 5), "size 5 does not divide the model's 6 layers, .*; use 1, 2, 3, 4 or 6"),
        (LLAMA, (1, 0), "size 0 does not divide"),
        (LLAMA, (1, 1, 2), "expert parallel size 2, but llama is no mixture of experts"),
        (QWEN3_MOE, (1, 1, 3), "size 3 does not divide the model's 8 experts; use 1, 2, 4 or 8"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(
    tmp_path: Path, config: dict[str, Any], layout: tuple[int, ...], words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        model_flags(write(tmp_path, config), *layout)


def test_layers_that_can_not_be_shared_evenly_are_told_to_megatron(tmp_path: Path) -> None:
    folder = write(tmp_path, {**LLAMA, "num_hidden_layers": 7})
    even = model_flags(folder)
    added = [{name: f[name] for name in f.keys() - even} for f in (model_flags(folder, 1, pp) for pp in (2, 3, 7))]
    last, first = "account_for_loss_in_pipeline_split", "account_for_embedding_in_pipeline_split"
    assert added == [{last: True}, {last: True, first: True}, {}]


def test_flags_to_argv() -> None:
    flags = {"num_layers": 2, "swiglu": True, "bf16": False, "load": None, "norm_epsilon": 1e-6, "split": [99, 1]}
    assert flags_to_argv(flags) == ["--num-layers", "2", "--swiglu", "--norm-epsilon", "1e-06", "--split", "99", "1"]
