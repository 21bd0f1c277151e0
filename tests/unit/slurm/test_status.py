"""What is shown of a run's jobs: how long they may still run, and how far they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_erpd.launch.display import Display, Row
from megatron_erpd.manifest import write_manifest
from megatron_erpd.slurm import status as slurm_status
from megatron_erpd.slurm.queue import Queued
from megatron_erpd.slurm.status import show_jobs
from tests.unit.fake_request import fake_stage

Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """The note on stage `a`, whose job 17 is so in the queue."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "logs/slurm").mkdir(parents=True)
    (tmp_path / "slurm/jobs.json").write_text(json.dumps({"jobs": {"a": {"id": "17"}}}))
    stage = fake_stage("a", "train-teacher", tmp_path / "a")

    def note(*jobs: Queued) -> str:
        monkeypatch.setattr(slurm_status, "queued", lambda: {"17": list(jobs)})
        display = Display("test", ["a"])
        show_jobs(display, [stage], tmp_path)
        return f"{display.rows['a'].state}: {display.rows['a'].note}"

    return note


RUNNING = Queued("RUNNING", "None", "3:10:00")


def test_a_training_s_last_step_and_the_time_left(show: Show, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text(
        '{"iteration": 40, "stage1/loss": 0.3125, "grad-norm": 2.0}\n{"iteration": 41, "st'
    )
    (tmp_path / "logs/slurm/a-17-0.log").write_text("[job] a\nsomething else\n")
    assert show(RUNNING) == "running: job 17 RUNNING, 3:10:00 left, iteration 40, loss 0.312"
    (tmp_path / "logs/slurm/a-17-1.log").write_text("[job] a\n")
    assert show(RUNNING) == "running: job 17 RUNNING, 3:10:00 left, start 2, iteration 40, loss 0.312"


def test_the_last_words_of_a_stage_that_does_not_train(show: Show, tmp_path: Path) -> None:
    assert show(RUNNING) == "running: job 17 RUNNING, 3:10:00 left"
    log = tmp_path / "logs/slurm/a-17-0.log"
    log.write_text("[job] a, start 0 of job 17 on n1\n")
    assert show(RUNNING) == "running: job 17 RUNNING, 3:10:00 left"
    log.write_text("[job] a, start 0 of job 17 on n1\nsampled 512 of 1024\n\n[job] signal\n")
    assert show(RUNNING) == "running: job 17 RUNNING, 3:10:00 left, sampled 512 of 1024"


def test_no_limit_and_no_start_yet(show: Show) -> None:
    assert show(Queued("RUNNING", "None", "UNLIMITED")) == "running: job 17 RUNNING"
    assert show(Queued("PENDING", "Dependency", "1:00")) == "waiting: job 17 PENDING (Dependency)"


def test_an_array_is_counted(show: Show) -> None:
    waiting = Queued("PENDING", "Resources", "4:00:00")
    assert show(RUNNING, RUNNING, waiting) == "running: job 17 2 RUNNING, 1 PENDING, 3:10:00 left"


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("2026-01-02T00:00:00Z", "again: because input verifier changed"),  # the job made it; what changed came later
        ("2026-01-01T00:00:00Z", "failed: job 17 FAILED"),  # of an earlier job
    ],
)
def test_a_job_that_did_its_work_has_not_failed(show: Show, tmp_path: Path, monkeypatch, created, expected) -> None:
    jobs = {"jobs": {"a": {"id": "17", "submitted": "2026-01-01T12:00:00Z"}}}
    (tmp_path / "slurm/jobs.json").write_text(json.dumps(jobs))
    monkeypatch.setattr("megatron_erpd.manifest.time.strftime", lambda *_: created)
    (tmp_path / "a").mkdir()
    write_manifest(tmp_path / "a", "train-teacher", {}, {})
    monkeypatch.setattr(slurm_status, "queued", lambda: {})
    monkeypatch.setattr(slurm_status, "how_ended", lambda _: "FAILED")
    display = Display("test", ["a"])
    display.rows["a"] = Row("again", note="because input verifier changed")
    show_jobs(display, [fake_stage("a", "train-teacher", tmp_path / "a")], tmp_path)
    assert f"{display.rows['a'].state}: {display.rows['a'].note}" == expected
