"""Megatron's deterministic mode: it is on in every step, and asks for what it needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_erpd.errors import RecipeError
from tests.distributed.harness import run_ranks
from tests.integration.stages import make_round, run_stages
from tests.tolerances import LAYOUT


def trained_in_it(rank: int, world_size: int, folder: str) -> list[bool]:
    """Trains without and with it; returns whether PyTorch's was on, by the step."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron.training import training

    train_step, seen = training.train_step, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train_step(*args, **kwargs)

    training.train_step = watched
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    cache = [*data, "--signal", "none", "--k", "8", "--output", f"{folder}/cache"]
    student = [*data, "--base-log-probs", f"{folder}/base-log-probs", "--cache", f"{folder}/cache", "--epochs", "1"]
    student += ["--learning-rate", "1e-2", "--global-batch-size", "8", "--micro-batch-size", "4", "--output"]
    run_stages(rank, world_size, [("precompute", cache), ("distill", [*student, f"{folder}/plain"])])
    deterministic = ["--", "--deterministic-mode"]
    run_stages(rank, world_size, [("distill", [*student, f"{folder}/deterministic", *deterministic])])
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    os.environ["NCCL_ALGO"] = "Tree"
    with pytest.raises(RecipeError, match="Megatron refuses these settings: NCCL_ALGO='Tree'"):
        run_stages(rank, world_size, [("distill", [*student, f"{folder}/tree", *deterministic])])
    return seen


def test_a_deterministic_training(tmp_path: Path) -> None:
    make_round(tmp_path, num_prompts=4)
    (seen,) = run_ranks(trained_in_it, 1, str(tmp_path))
    assert seen == [False] * 2 + [True] * 2
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "deterministic")
    ]
    for plain, deterministic in zip(*rows, strict=True):
        for name in ("stage2/loss", "grad-norm"):
            LAYOUT.assert_close(deterministic[name], plain[name], f"{name} of step {plain['iteration']}")
