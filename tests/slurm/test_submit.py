"""`megatron-erpd submit`, twice at the same time, and on a disk that is full."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_erpd.errors import ErpdError
from megatron_erpd.slurm.queue import slurm
from megatron_erpd.slurm.submit import read_submitted
from tests import forked
from tests.disk import Disk
from tests.forked import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.recipes import write_recipe
from tests.slurm.runs import Run

STAGES = ["base", "base-log-probs", "base-log-probs-slices", "export", "report", "rollouts", "teacher"]


def submit(recipe: Path, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_erpd.commands.cli", "submit", str(recipe), "--output", str(root)]
    return forked.run(command, cwd=REPOSITORY, timeout=120)


def test_of_two_submissions_at_once_one_submits_and_the_other_leaves_all_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    # Jobs that don't start: all of them are in the queue until they are cancelled.
    recipe, run = write_recipe(tmp_path, sbatch=["--hold"]), Run(tmp_path / "queue")
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(submit, [recipe] * 2, [run.root] * 2))
    said = [one.stdout + one.stderr for one in done]
    try:
        listed = slurm("squeue", "--noheader", "--format=%j|%F").split()
        ours = [line for line in listed if line.startswith("queue/") or line.startswith("tiny/")]
        assert Counter(line.partition("|")[0].partition("/")[2] for line in ours) == Counter(STAGES)
        assert {line.partition("|")[2] for line in ours} == {run.number(name) for name in STAGES}
        assert sorted(read_submitted(run.root)) == STAGES
        left_alone = [text.count("is in the queue, left alone") == len(STAGES) for text in said]
        second = ["is submitting this now; wait for it" in text for text in said]
        assert sum(left_alone) + sum(second) == 1, said
        codes = {one.returncode for one, late in zip(done, second, strict=True) if not late}
        assert codes == {0} and all(one.returncode == 2 for one, late in zip(done, second, strict=True) if late)
    finally:
        run.cancel()


def test_a_full_disk_submits_nothing_that_is_not_whole(cluster: Cluster, disk: Disk, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, sbatch=["--hold"]), Run(disk.folder / "full")
    disk.resize(16)
    done = submit(recipe, run.root)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and str(run.root) in said and "make room" in said and "Traceback" not in said
    # A disk that is found to be full only when the jobs' files are written.
    stages = [run.stage(f"held-{i}", slurm={"sbatch": ["--hold"]}) for i in range(8)]
    names = ",".join(f"test/{stage.name}" for stage in stages)
    try:
        for pages in (1, 4, 16):
            disk.resize(pages)
            with pytest.raises((OSError, ErpdError), match="No space left on device"):
                run.submit(*stages)
            assert slurm("squeue", "--noheader", "--name", names) == ""
        disk.resize(1000)
        run.submit(*stages)
        assert sorted(read_submitted(run.root)) == [stage.name for stage in stages]
        assert len(slurm("squeue", "--noheader", "--name", names).splitlines()) == len(stages)
    finally:
        run.cancel()
