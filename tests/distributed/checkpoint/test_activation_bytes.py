"""Counted activations against what autograd keeps of a real model.

Here layers are the local ones, whose norms and SwiGLU keep more than the fused ones of Transformer Engine that are
counted. What differs is known, to the byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.checkpoint import model_flags
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.model.layer_spec import local_block_spec
from megatron_erpd.plan.activations import MicroBatch, layer_bytes
from megatron_erpd.settings import Layout
from tests.distributed.checkpoint.tiny_models import build_megatron_model, set_layout
from tests.distributed.harness import run_cases

LENGTH, ROLLOUTS = 128, 2
TOKENS = LENGTH * ROLLOUTS
CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 704,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}


def kept_bytes(rank: int, world_size: int, source: Path) -> int:
    """Storages that autograd keeps of a forward pass through the layers, but for parameters."""
    set_layout(1, 1)
    model = build_megatron_model(model_flags(source), layers=local_block_spec)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    tokens = torch.arange(TOKENS).reshape(ROLLOUTS, LENGTH) % CONFIG["vocab_size"]
    positions = torch.arange(LENGTH).expand(ROLLOUTS, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.embedding(tokens, positions)
        model.decoder(hidden, attention_mask=None, rotary_pos_emb=model.rotary_pos_emb(LENGTH))
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """A model's folder, and what a third layer keeps more than two do."""
    root = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        for layers in (2, 3):
            (root / f"{name}-{layers}").mkdir()
            config = json.dumps({**CONFIG, **sizes, "num_hidden_layers": layers})
            (root / f"{name}-{layers}" / "config.json").write_text(config)
    cases = [(folder.name, kept_bytes, (folder,)) for folder in sorted(root.iterdir())]
    found = {name: ranks[0] for name, ranks in run_cases(cases, 1).items()}
    return {name: (root / f"{name}-2", found[f"{name}-3"] - found[f"{name}-2"]) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_local_layer_keeps_what_is_counted_and_what_its_unfused_parts_add(
    name: str, measured: dict[str, tuple[Path, int]]
) -> None:
    folder, kept = measured[name]
    shape = read_model_shape(folder)
    heads, groups, width = shape.num_heads, shape.num_query_groups, shape.head_dim
    # Norms keep the input over its mean square besides, and the latter's root; a gate of its own; cosine and sine for
    # queries and for keys.
    elements = TOKENS * (2 * shape.hidden_size + 2 + 2 * shape.ffn_hidden_size) + 4 * LENGTH * width
    if shape.family.qk_norm:
        # Those norms too; and keys and values are views of the whole projection, queries included.
        elements += TOKENS * (heads + groups) * (width + 1) + TOKENS * heads * width
    else:
        # Values are a view of it.
        elements += TOKENS * (heads + groups) * width
    counted = layer_bytes(shape, Layout(), MicroBatch(TOKENS, LENGTH), on_gpu=False)
    assert kept == counted + 4 * elements
    assert kept < 1.65 * counted  # as docs/planning.md says
