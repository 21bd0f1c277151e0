"""What a stage computes does not depend on the kernels, nor on whether vocabularies are gathered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_erpd.teacher_cache.reader import CacheReader
from tests.distributed.harness import run_ranks
from tests.integration.stages import make_round, run_stages
from tests.tolerances import LAYOUT

VARIANTS = {
    "plain": ["--kernels", "torch"],
    "triton": ["--kernels", "triton"],
    "gathered": ["--kernels", "torch", "--gather-teacher"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round, a teacher, and for the plain and the Triton kernels a cache."""
    folder = tmp_path_factory.mktemp("round")
    make_round(folder, num_prompts=4)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    policy = ["--policy", f"teacher={folder}/teacher"]
    training = ["--base-log-probs", f"{folder}/base-log-probs", "--loss", "ce", "--epochs", "2"]
    training += ["--global-batch-size", "8", "--micro-batch-size", "4", "--learning-rate", "1e-3"]
    stages = [("train", [*data, *training, "--output", f"{folder}/teacher"])]
    for name in ("plain", "triton"):
        flags = [
            "--k",
            "4",
            "--delta",
            "0.05",
            "--topk-dtype",
            "float32",
            *VARIANTS[name],
            "--output",
            f"{folder}/cache-{name}",
        ]
        stages.append(("precompute", [*data, *policy, *flags]))
    run_ranks(run_stages, 1, stages)
    return folder


def distilled(made: Path, output: Path, *flags: str) -> list[dict[str, float]]:
    """The metrics of a stage 2 with live teachers, two steps."""
    argv = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--teacher", "live"]
    argv += ["--base-log-probs", f"{made}/base-log-probs", "--policy", f"teacher={made}/teacher", "--delta", "0.05"]
    argv += ["--global-batch-size", "8", "--micro-batch-size", "4", "--learning-rate", "1e-3", "--epochs", "1"]
    run_ranks(run_stages, 1, [("distill", [*argv, "--output", str(output), *flags])])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_students(made: Path, tmp_path: Path) -> None:
    results = {name: distilled(made, tmp_path / name, *flags) for name, flags in VARIANTS.items()}
    expected = results.pop("plain")
    assert len(expected) == 2 and expected[0]["stage2/loss"] > 0
    for name, rows in results.items():
        for row, other in zip(rows, expected, strict=True):
            for metric in ("stage2/loss", "stage2/entropy", "grad-norm"):
                assert row[metric] == pytest.approx(other[metric], rel=10 * LAYOUT.rtol), (name, metric)


def test_caches(made: Path) -> None:
    plain, triton = (CacheReader(made / f"cache-{name}") for name in ("plain", "triton"))
    for name in plain.sample_ids():
        for policy in ("base", "teacher"):
            LAYOUT.assert_close(triton.token_row(policy, name).tolist(), plain.token_row(policy, name).tolist())
        LAYOUT.assert_close(triton.topk_row(name).log_probs.tolist(), plain.topk_row(name).log_probs.tolist())
