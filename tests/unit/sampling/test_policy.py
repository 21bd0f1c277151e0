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
