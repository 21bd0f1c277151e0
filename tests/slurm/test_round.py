"""A round on a real model through the queue, every stage interrupted twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.manifest import METRICS
from megatron_erpd.recipe.stages import TRAINS
from tests.slurm.cluster import Cluster
from tests.slurm.interruptions import WAYS, interrupt_all
from tests.slurm.recipes import assert_same_results, end, start, trainings, write_recipe
from tests.slurm.runs import Run

STAGES = ("base", "rollouts", "base-log-probs-slices", "base-log-probs", "teacher", "export", "report")
STEPS = 60


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_round_of_interrupted_jobs_ends_with_the_weights_of_an_undisturbed_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, STEPS, requeues=len(WAYS)), Run(tmp_path / "queue")
    said = end(start("submit", recipe, "--output", run.root))
    assert all(f"{name}: job " in said for name in STAGES)
    undisturbed = start("run", recipe, "--output", tmp_path / "run")  # while the jobs wait
    try:
        tasks = interrupt_all(run, dict.fromkeys(TRAINS, METRICS), 600)
        assert run.state("report") == "COMPLETED", run.logs()
        assert [task.name for task in tasks if task.interrupted < len(WAYS)] == []
        starts = {task.name: [run.log(task.record.name, i, task.number) for i in range(3)] for task in tasks}
        assert len(starts) == len(STAGES) + 1  # the slices are two
        for name, (first, second, third) in starts.items():
            assert "signal SIGUSR1: telling" in first and "queued again (1 of 2)" in first, f"{name}: {first}"
            assert "queued again (2 of 2)" in second and " is complete" in third, f"{name}: {second}\n{third}"
    finally:
        run.cancel()
    end(undisturbed)

    assert end(start("submit", recipe, "--output", run.root)).count(": done, because ") == len(STAGES) - 1
    assert_same_results(run.root, tmp_path / "run")
    assert {name: len(steps) for name, steps in trainings(run.root).items()} == {"round-01/teacher": STEPS}
