"""Flags of Megatron's that compute nothing else: a training with them is the one without."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_erpd.checkpoint.torch_dist.iterations import iteration_folder, latest_iteration
from megatron_erpd.checkpoint.torch_dist.recovery import INTEGRITY, damage
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.tiny import write_model, write_random_rollouts

FLAGS = [
    *("--log-params-norm", "--log-num-zeros-in-grad", "--timing-log-level", "2"),
    *("--manual-gc", "--manual-gc-interval", "2", "--verify-integrity"),
    *("--check-weight-hash-across-dp-replicas-interval", "2"),
]


def test_the_same_training(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    write_random_rollouts(tmp_path / "rollouts.parquet")
    stages: Stages = [("import", ["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"])]
    data = ["--base", f"{tmp_path}/base", "--rollouts", f"{tmp_path}/rollouts.parquet", "--loss", "sft"]
    settings = ["--learning-rate", "1e-2", "--global-batch-size", "16", "--micro-batch-size", "8", "--epochs", "2"]
    for name, flags in {"plain": [], "flags": FLAGS}.items():
        output = ["--data-parallel", "2", "--output", f"{tmp_path}/{name}"]
        stages.append(("train", [*data, *settings, *output, "--", *flags]))
    run_ranks(run_stages, 2, stages)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "flags")
    }
    assert len(rows["plain"]) >= 3
    for metric in ("stage1/loss", "grad-norm"):
        assert [row[metric] for row in rows["flags"]] == [row[metric] for row in rows["plain"]]
    checkpoint = tmp_path / "flags" / "megatron"
    saved = iteration_folder(checkpoint, latest_iteration(checkpoint))
    assert (saved / INTEGRITY).is_file() and damage(saved, checksums=True) is None
