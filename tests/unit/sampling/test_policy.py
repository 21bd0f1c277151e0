"""New weights for a loaded policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.errors import CheckpointError
from megatron_erpd.sampling.policy import load_policy, reload_weights
from tests.unit.sampling.tiny_model import write_model

TOKENS = torch.tensor([[1, 2, 3, 4]])


def test_it_is_the_other_policy(model_folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path, seed=8)
    policy = load_policy(model_folder, "cpu")
    before = policy.model(TOKENS).logits
    reload_weights(policy, other)
    assert torch.equal(policy.model(TOKENS).logits, load_policy(other, "cpu").model(TOKENS).logits)
    assert not torch.equal(policy.model(TOKENS).logits, before)


def write_mixture(folder: Path, model_folder: Path, seed: int) -> Path:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        eos_token_id=tokenizer.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_experts_of_a_mixture_are_taken_over_too(model_folder: Path, tmp_path: Path) -> None:
    first, second = (write_mixture(tmp_path / name, model_folder, seed) for seed, name in enumerate("ab"))
    policy = load_policy(first, "cpu")
    before = policy.model(TOKENS).logits
    reload_weights(policy, second)
    assert torch.equal(policy.model(TOKENS).logits, load_policy(second, "cpu").model(TOKENS).logits)
    assert not torch.equal(policy.model(TOKENS).logits, before)
    weights = load_file(second / "model.safetensors")
    for name in ("model.layers.0.block_sparse_moe.experts.1.w2.weight", "model.norm.weight"):
        remaining = {key: value for key, value in weights.items() if key != name}
        save_file(remaining, second / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="doesn't fit the policy"):
            reload_weights(policy, second)


def test_what_does_not_fit_is_named(model_folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path, seed=8)
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    policy = load_policy(model_folder, "cpu")
    for changed, expected in (
        ({n: w for n, w in weights.items() if n != name}, f"{name} is missing"),
        ({**weights, "more": torch.zeros(1)}, "more is unknown"),
        ({**weights, name: weights[name][:-1].clone()}, f"{name} is unknown or of another shape"),
    ):
        save_file(changed, other / "model.safetensors")
        with pytest.raises(CheckpointError, match=expected):
            reload_weights(policy, other)
