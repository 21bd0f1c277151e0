"""A mixture of experts through all stages: one process, and experts spread over the ranks of tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.checkpoint import compare_weights
from megatron_erpd.errors import LayoutError
from megatron_erpd.teacher_cache.reader import CacheReader
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.test_layouts import assert_same_gradients, assert_same_rows, assert_same_training, metrics
from tests.integration.tiny import write_mixture, write_random_rollouts

PARALLEL = {
    "tensor": ["--tensor-parallel", "2", "--sequence-parallel", "--micro-batch-tokens", "60"],
    "context": ["--context-parallel", "2", "--micro-batch-size", "4"],
    "packed-context": ["--context-parallel", "2", "--micro-batch-tokens", "60"],
    "data": ["--data-parallel", "2", "--micro-batch-tokens", "60"],
}
"""Two ranks: half of every attention layer and half of the tokens between layers, half of the tokens, or half of the
rollouts; and two of the four experts each."""

LONG = [name if name == "tensor" else pytest.param(name, marks=pytest.mark.long) for name in PARALLEL]

TRAINING = ["--global-batch-size", "16", "--learning-rate", "1e-3", "--epochs", "0.8"]


def stages(inputs: Path, output: Path, layout: list[str]) -> Stages:
    """All stages, each with the artifacts in `inputs`, so that it is compared by itself."""
    data = ["--base", f"{inputs}/base", "--rollouts", f"{inputs}/rollouts.parquet"]
    scored = [*data, *TRAINING, "--base-log-probs", f"{inputs}/base-log-probs"]
    target = ["--policy", f"teacher={inputs}/teacher", "--k", "8", "--delta", "0.05", "--topk-dtype", "float32"]
    live = ["--teacher", "live", "--policy", f"teacher={inputs}/teacher", "--delta", "0.05"]
    once = ["--epochs", "0.4"]
    found: Stages = [
        ("import", ["--hf", f"{inputs}/hf", "--output", f"{output}/base"]),
        ("precompute", [*data, "--kind", "token", "--output", f"{output}/base-log-probs"]),
        ("train", [*scored, "--loss", "ce", "--checkpoints", "2", "--output", f"{output}/teacher"]),
        ("precompute", [*data, *target, "--output", f"{output}/cache"]),
        ("distill", [*scored, "--cache", f"{inputs}/cache", "--checkpoints", "2", "--output", f"{output}/student"]),
        ("train", [*scored, "--loss", "ppo", *once, "--output", f"{output}/ppo"]),
        ("distill", [*scored, *live, *once, "--output", f"{output}/live"]),
        ("export", ["--checkpoint", f"initial={output}/base", "--output", f"{output}/export"]),
    ]
    runs_the_model = ("precompute", "train", "distill")
    return [(command, [*argv, *layout] if command in runs_the_model else argv) for command, argv in found]


def run_and_resume(rank: int, world_size: int, todo: Stages, alone: Path, spread: Path) -> None:
    """Runs stages, then asks from whose checkpoints a training could go on with which sizes."""
    run_stages(rank, world_size, todo)
    from megatron_erpd.model.model import check_optimizer_fits

    for artifact, other in ((alone, 2), (spread, 1)):
        with pytest.raises(LayoutError, match=f"can't give its optimizer's state to one with {other}"):
            check_optimizer_fits(artifact / "megatron", other)
    check_optimizer_fits(alone / "megatron", 1)
    check_optimizer_fits(spread / "megatron", 4)


@pytest.mark.parametrize("parallel", LONG)
def test_experts_over_ranks_give_the_result_of_one_process(parallel: str, tmp_path: Path) -> None:
    layout = [*PARALLEL[parallel], "--expert-parallel", "2"]
    one, many = tmp_path / "one", tmp_path / "many"
    write_mixture(one / "hf")
    write_random_rollouts(one / "rollouts.parquet")
    run_ranks(run_stages, 1, stages(one, one, ["--micro-batch-size", "16"]))
    run_ranks(run_and_resume, 2, stages(one, many, layout), one / "teacher", many / "teacher", timeout=240)

    for name in ("teacher", "student", "ppo", "live"):
        assert_same_training(metrics(many / name), metrics(one / name), name)
        assert_same_gradients(many / name, one / name, name)
    for name in ("base-log-probs", "cache"):
        assert_same_rows(CacheReader(many / name), CacheReader(one / name))
    for folder in (one, many):
        assert compare_weights(one / "hf", folder / "export" / "initial") == []
