"""How many files of the package a training step crosses: a reader follows a micro-batch to its gradient through few."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_erpd
from tests.distributed.harness import run_ranks
from tests.integration.stages import make_round, run_stages

PACKAGE = Path(megatron_erpd.__file__).parent
MOST_FILES = 9
PAGE = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
PICTURE = PAGE.split("## A training step")[1].split("## A cached token")[0]


def files_of_a_step(rank: int, world_size: int, folder: str) -> list[str]:
    """Files of the package whose code runs on the main thread in the second step of stage 2's projection, from the next
    micro-batch to the updated weights."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron.training import training

    seen: set[str] = set()
    train_step, steps = training.train_step, iter(range(100))

    def record(frame: FrameType, event: str, argument: Any) -> None:
        seen.add(frame.f_code.co_filename)

    def traced(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 1:
            sys.setprofile(record)
        try:
            return train_step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    training.train_step = traced
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    training_flags = ["--base-log-probs", f"{folder}/base-log-probs", "--cache", f"{folder}/cache", "--epochs", "0.5"]
    training_flags += ["--global-batch-size", "4", "--micro-batch-size", "4", "--output", f"{folder}/student"]
    stages = [
        ("precompute", [*data, "--signal", "none", "--k", "8", "--output", f"{folder}/cache"]),
        ("distill", [*data, *training_flags]),
    ]
    run_stages(rank, world_size, stages)
    assert next(steps) >= 2
    found = {str(Path(name).relative_to(PACKAGE)) for name in seen if Path(name).is_relative_to(PACKAGE)}
    # What stands in for CUDA and for Transformer Engine's attention on a CPU.
    return sorted(found - {"platform.py", "model/attention.py"})


def test_a_step_of_the_projection_crosses_few_files(tmp_path: Path) -> None:
    make_round(tmp_path, num_prompts=4)
    (found,) = run_ranks(files_of_a_step, 1, str(tmp_path))
    assert {"training/step.py", "vocab_parallel/passes.py"} <= set(found)
    assert len(found) <= MOST_FILES, found
    assert not [name for name in found if Path(name).name not in PICTURE], "docs/architecture.md shows another path"
