"""A training that recomputes activations is the one that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.tiny import write_model, write_random_rollouts
from tests.tolerances import LAYOUT

KINDS: dict[str, list[str]] = {
    "kept": [],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    "selective": ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp"],
}


@pytest.mark.parametrize("context_parallel", [1, pytest.param(2, marks=pytest.mark.long)])
def test_recomputed_activations(context_parallel: int, tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    write_random_rollouts(tmp_path / "rollouts.parquet")
    stages: Stages = [("import", ["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"])]
    data = ["--base", f"{tmp_path}/base", "--rollouts", f"{tmp_path}/rollouts.parquet", "--loss", "sft"]
    settings = ["--learning-rate", "1e-2", "--global-batch-size", "16", "--micro-batch-tokens", "80", "--epochs", "2"]
    settings += ["--context-parallel", f"{context_parallel}"]
    for name, flags in KINDS.items():
        stages.append(("train", [*data, *settings, "--output", f"{tmp_path}/{name}", "--", *flags]))
    run_ranks(run_stages, context_parallel, stages)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in KINDS
    }
    for name, found in rows.items():
        for row, kept in zip(found, rows["kept"], strict=True):
            for metric in ("stage1/loss", "grad-norm"):
                LAYOUT.assert_close(row[metric], kept[metric], f"{name}, {metric} of step {row['iteration']}")
    assert len(rows["kept"]) >= 3
