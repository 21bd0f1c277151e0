"""Checkpoints that are written beside a training are those of one that waits for its saves, bit for bit, and so is the
artifact: at every layout, whatever its last step is, while others are still written."""

from __future__ import annotations

import functools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_erpd.checkpoint.torch_dist.iterations import saved_iterations
from megatron_erpd.manifest import verify_manifest
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.test_bf16_layouts import GPU_RECIPE, in_bf16, tensors
from tests.integration.test_early_stop import bound_crossed_at
from tests.integration.test_on_policy import VERIFIER, command, write_tokenizer
from tests.integration.test_resume_layouts import Part, metrics, train
from tests.integration.test_virtual_stages import CHUNKS
from tests.integration.tiny import write_model, write_random_rollouts

DP = ["--data-parallel", "2", "--micro-batch-size", "4"]
TP = ["--tensor-parallel", "2", "--sequence-parallel", "--micro-batch-size", "8"]
PP = ["--pipeline-parallel", "2", "--micro-batch-size", "4"]
OVERLAPPED = [*GPU_RECIPE, "--overlap-param-gather"]
PRUNED, OFF = ["--checkpoints", "3", "--save-interval", "1"], ["--checkpoints", "3"]
"""Of 10 steps. `PRUNED` saves each and keeps 4, 8 and 10. `OFF` saves 4 and 8, and the last one off the interval."""
CASES = {
    "dp2": ("train", [*DP, *PRUNED], OVERLAPPED, [4, 8, 10]),
    "dp2, last step off the interval": ("train", [*DP, *OFF], OVERLAPPED, [4, 8, 10]),
    "tp2": ("train", [*TP, *PRUNED], GPU_RECIPE, [4, 8, 10]),
    "virtual stages": ("train", [*PP, *OFF], [*OVERLAPPED, *CHUNKS], [4, 8, 10]),
    "early stop": ("train", [*DP, *PRUNED], OVERLAPPED, [3]),
    "on policy": ("on-policy", [*DP, "--checkpoints", "2"], [], [2, 3]),
}
"""A training's command, its flags before and after the `--`, and the checkpoints that stay."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    in_bf16(write_model(folder / "hf", num_layers=4))
    write_random_rollouts(folder / "rollouts.parquet")
    write_tokenizer(folder / "hf")
    (folder / "prompts.jsonl").write_text('{"prompt": "w5 w7"}\n{"prompt": "w6 w9 w9"}\n')
    (folder / "verifier.py").write_text(VERIFIER)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet", "--precision", "bf16"]
    stages: Stages = [
        ("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"]),
        ("precompute", [*data, "--kind", "token", "--output", f"{folder}/base-log-probs"]),
    ]
    run_ranks(run_stages, 1, stages)
    return folder


def settings(made: Path, stage: str) -> list[str]:
    if stage == "on-policy":
        return [*command(made, "", "--updates", "3"), "--precision", "bf16"]
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    data += ["--base-log-probs", f"{made}/base-log-probs", "--loss", "sapo", "--precision", "bf16"]
    return [*data, "--epochs", "4", "--global-batch-size", "16", "--learning-rate", "3e-4"]


def run_with_slow_writers(rank: int, world_size: int, stages: Stages) -> list[str]:
    """Runs stages, whose saves take some steps where these don't wait; returns the processes that are left."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item

    @functools.wraps(original)
    def write(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return original(*args, **kwargs)

    filesystem_async._write_item = write
    run_stages(rank, world_size, stages)
    return [child.name for child in multiprocessing.active_children()]


@pytest.mark.long  # tests/integration/test_resume.py has saves of one process
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_those_of_a_training_that_waits(case: str, made: Path, tmp_path: Path) -> None:
    stage, flags, recipe, kept = CASES[case]
    argv, waits, beside = settings(made, stage), tmp_path / "waits", tmp_path / "beside"
    if case == "early stop":
        argv += ["--max-kl", repr(_bound(made, [*argv, *flags], recipe, tmp_path / "whole"))]
    run_ranks(run_stages, 2, [(stage, [*argv, *flags, "--output", str(waits), "--", *recipe])])
    last: Stages = [(stage, [*argv, *flags, "--async-save", "--output", str(beside), "--", *recipe])]
    assert run_ranks(run_with_slow_writers, 2, last) == [[], []]
    ours, theirs = verify_manifest(beside), verify_manifest(waits)
    assert (ours.settings, ours.inputs) == (theirs.settings, theirs.inputs)
    assert ours.summary | {"seconds": 0} == theirs.summary | {"seconds": 0}
    assert saved_iterations(beside / "megatron") == saved_iterations(waits / "megatron") == kept
    for iteration in kept:
        assert_same_checkpoint(beside, waits, iteration)


def _bound(made: Path, argv: list[str], recipe: list[str], output: Path) -> float:
    run_ranks(run_stages, 2, [("train", [*argv, "--output", str(output), "--", *recipe])])
    return bound_crossed_at(3, metrics(output))


def assert_same_checkpoint(ours: Path, theirs: Path, iteration: int) -> None:
    """All tensors of an iteration, the optimizer's among them."""
    a, b = tensors(ours, iteration), tensors(theirs, iteration)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.long
def test_a_training_resumes_with_and_without(made: Path, tmp_path: Path) -> None:
    argv = [*settings(made, "train"), "--save-interval", "2"]
    recipe, beside = ["--", *OVERLAPPED], ["--async-save"]
    train("train", argv, tmp_path / "whole", Part(2, [*DP, *recipe]), tmp_path)
    for part in (
        Part(2, [*DP, *beside, *recipe], "signal", 3, 3),
        Part(2, [*DP, *recipe], "signal", 6, 6),
        Part(2, [*DP, *beside, *recipe]),
    ):
        train("train", argv, tmp_path / "parts", part, tmp_path)
    assert verify_manifest(tmp_path / "parts").settings == verify_manifest(tmp_path / "whole").settings
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole", 10)
