"""A tiny random model and random scored rollouts for it: small enough to run every stage in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_erpd.data.rollouts import write_rollouts
from megatron_erpd.data.schema import Rollout

VOCAB_SIZE = 37
"""Odd on purpose: tensor parallelism has to pad it."""


def write_model(folder: Path, seed: int = 0, tied: bool = True, num_layers: int = 2) -> Path:
    """A Qwen3 (of two layers) with random weights, whose logits are far from uniform."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def write_mixture(folder: Path, seed: int = 0, num_layers: int = 2) -> Path:
    """A Qwen3-MoE (of two layers) with random weights, two of four experts for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        initializer_range=0.3,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def write_random_rollouts(
    path: Path,
    num_prompts: int = 10,
    group_size: int = 4,
    seed: int = 0,
    reward: float | None = None,
    shortest: int = 1,
) -> Path:
    """Prompts and responses (of `shortest` to 19 tokens) of many lengths, with rewards of 0 and 1, or this reward."""
    generator = np.random.default_rng(seed)
    rows = []
    for group in range(num_prompts):
        prompt = generator.integers(0, VOCAB_SIZE, generator.integers(2, 8))
        for _ in range(group_size):
            response = generator.integers(0, VOCAB_SIZE, generator.integers(shortest, 20))
            drawn = float(generator.random() < 0.5)
            rows.append(
                Rollout(
                    prompt_token_ids=prompt,
                    response_token_ids=response,
                    group_id=group,
                    reward=drawn if reward is None else reward,
                )
            )
    write_rollouts(path, rows)
    return path
