"""The quickstart through the queue, every stage interrupted twice. It takes a quarter of an hour on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.manifest import METRICS, REQUEST
from megatron_erpd.recipe.stages import TRAINS
from tests.distributed.harness import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.interruptions import WAYS, interrupt_all
from tests.slurm.recipes import assert_same_results, end, start
from tests.slurm.runs import Run

RECIPE = REPOSITORY / "examples" / "quickstart" / "recipe.yaml"
AT_WORK = {
    **dict.fromkeys(TRAINS, METRICS),
    **dict.fromkeys(("import", "sample", "precompute", "select", "evaluate", "export"), REQUEST),
}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_quickstart_ends_with_the_files_of_an_undisturbed_run(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path / "queue")
    settings = ["--set", f"slurm.requeues={len(WAYS)}", "--set", "slurm.signal_seconds=120"]
    end(start("submit", RECIPE, *settings, "--output", run.root))
    try:
        tasks = interrupt_all(run, AT_WORK, 3000)
        assert run.state("report") == "COMPLETED", run.logs()
    finally:
        run.cancel()
    end(start("run", RECIPE, "--output", tmp_path / "run"), 1200)
    assert [task.name for task in tasks if task.interrupted < len(WAYS)] == []
    assert_same_results(run.root, tmp_path / "run")
