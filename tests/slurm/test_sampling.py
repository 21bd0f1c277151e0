"""Rollouts sampled by an array of jobs, undisturbed and with one that is interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_erpd.commands import rollouts as commands
from megatron_erpd.manifest import read_manifest, verify_manifest
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run
from tests.unit.sampling.tiny_model import write_model

VERIFIER = """
import time
from pathlib import Path

def score(record, response):
    while record["answer"] == "280" and not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    return len(response) % 2
"""


@pytest.mark.long  # slices: tests/unit/sampling/test_parts.py; their jobs: tests/unit/slurm/test_job.py, test_script.py
@pytest.mark.parametrize("interrupted", [False, True])
def test_slices_of_sampling_end_with_the_artifact_of_one_command(
    cluster: Cluster, tmp_path: Path, interrupted: bool
) -> None:
    (tmp_path / "verifier.py").write_text(VERIFIER)
    records = [{"prompt": f"{n % 9}+1=", "answer": str(n)} for n in range(300)]  # three part files
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = Recipe(
        name="tiny",
        output=str(tmp_path / "run"),
        model=str(write_model(tmp_path / "hf", seed=3)),
        rollouts={
            "prompts": str(tmp_path / "prompts.jsonl"),
            "verifier": f"python:{tmp_path}/verifier.py:score",
            "num_rollouts": 2,
            "max_new_tokens": 4,
        },
        teacher={},
        slurm={"slices": 2, "requeues": 1, "signal_seconds": 60},
    )
    stage, run = next(stage for stage in plan(recipe) if stage.name == "rollouts"), Run(tmp_path / "run")
    try:
        run.submit(stage)
        one = stage.output / ".slice-0002-of-0002" / "rollouts-00001-of-00003.parquet"
        run.until(one.is_file, 180, "the second slice has one of its two parts")
        written = os.stat(one).st_ino
        if interrupted:
            run.signal("rollouts-slices")
            log = run.root / "logs/slurm" / f"rollouts-slices-{run.number('rollouts-slices')}_2-0.log"
            run.until(lambda: "queued again (1 of 1)" in log.read_text(), 60, "its job is interrupted")
        (tmp_path / "go").touch()
        commands.sample(stage.changed(output=tmp_path / "whole").flags())
        assert run.ends("rollouts", 100) == "COMPLETED"
    finally:
        run.cancel()
    assert verify_manifest(stage.output).digest == verify_manifest(tmp_path / "whole").digest
    assert len(read_manifest(stage.output).files) == 4
    assert os.stat(stage.output / one.name).st_ino == written  # not sampled again
    assert run.submit(stage) == {} and run.said[-2].startswith("rollouts: done, because ")
