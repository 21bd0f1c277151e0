"""What a job does when SLURM's own programs answer oddly; its life on a real cluster is in tests/slurm."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST
from megatron_erpd.recipe.requests import Sample
from megatron_erpd.sampling.inputs import input_digests
from megatron_erpd.sampling.parts import begin_slice
from megatron_erpd.settings import SampleSettings
from megatron_erpd.slices import Slice
from megatron_erpd.slurm import job as slurm_job
from megatron_erpd.slurm.job import StageJob
from megatron_erpd.slurm.jobs import JobRecord
from tests.unit.fake_request import FakeRequest


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageJob]:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(slurm_job, "_SOON_SECONDS", 0.3)
    kept = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    record = JobRecord("a", "a", FakeRequest(command="sample", output=tmp_path / "a"), 1, 3, 60, 300)
    yield StageJob(tmp_path, record, tmp_path / "a.log")
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_an_interrupted_slice_of_sampling_keeps_its_parts(
    job: StageJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    (tmp_path / "hf").write_text("a model")

    def request(seed: int) -> Sample:
        settings = SampleSettings(seed=seed)
        return Sample(model=tmp_path / "hf", prompts="reasoning-gym:x", settings=settings, output=tmp_path / "a")

    digests = input_digests("sample", request(1).inputs)
    folder = begin_slice(tmp_path / "a", Slice(2, 3), request(1).identity, digests)
    (folder / "rollouts-00001-of-00003.parquet").write_text("rows")

    def begin(seed: int) -> bool:
        record = JobRecord("a-slices", "a", request(seed), 3, 3, 60, 300)
        return StageJob(tmp_path, record, tmp_path / "a.log")._begin()

    assert not begin(seed=1)
    assert (folder / "rollouts-00001-of-00003.parquet").read_text() == "rows"
    assert not begin(seed=2)  # with other settings it is put aside
    assert not folder.exists()


def test_a_signal_before_srun_has_made_its_step_is_told_again(
    job: StageJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_job, "_TRY_SECONDS", 0.1)
    (tmp_path / "a.log").touch()
    answers = [[], StageError("squeue failed: Invalid job id specified"), ["17.0"]]
    told: list[tuple[str, ...]] = []

    def steps(job_id: str) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, StageError):
            raise answer
        return answer

    def tell(*command: str) -> str:
        told.append(command)
        (tmp_path / "end").touch()
        return ""

    monkeypatch.setattr(slurm_job, "steps_of", steps)
    monkeypatch.setattr(slurm_job, "slurm", tell)
    popen = subprocess.Popen

    def started(*args: Any, **more: Any) -> subprocess.Popen[bytes]:
        job.signals.append(signal.SIGUSR1)
        return popen(*args, **more)

    monkeypatch.setattr(subprocess, "Popen", started)
    wait = f"while [ ! -e {tmp_path / 'end'} ]; do sleep 0.05; done; exit 7"
    assert job._execute(["bash", "-c", wait], 0) == 7
    assert told == [("scancel", "--signal=TERM", "17.0")] and not answers


def test_scontrol_that_dies_with_its_job_has_queued_it_again(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*command: str) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        raise StageError(f"{' '.join(command)} failed: ")

    monkeypatch.setattr(slurm_job, "slurm", killed)
    with pytest.raises(SystemExit) as ended:
        job._requeue("its time was over", "")
    assert ended.value.code == 1 and job.why_ended == "requeued"


def test_a_job_that_is_not_queued_again_says_so(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*command: str) -> str:
        raise StageError("scontrol requeue 17 failed: Access denied")

    monkeypatch.setattr(slurm_job, "slurm", refused)
    with pytest.raises(StageError, match="Access denied"):
        job._requeue("its time was over", "")


def test_a_report_that_can_not_be_made_is_told_and_ends_nothing(
    job: StageJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "round-01/a").mkdir(parents=True)
    (tmp_path / "round-01/a" / MANIFEST).write_text("{")
    job._write_figures()
    said = capsys.readouterr().out
    assert said.startswith("[job] the report is not brought up to date (") and "round-01/a" in said


def test_a_page_is_drawn_when_it_is_due(job: StageJob, tmp_path: Path) -> None:
    with job._page_drawn() as page:
        assert page is None, "there is nothing to show yet"
    (tmp_path / "round-01").mkdir()
    with job._page_drawn() as page:
        assert page is not None and page.wait() == 0
    assert (tmp_path / "report/index.html").is_file() and (tmp_path / "report/summary.json").is_file()
    with job._page_drawn() as page:
        assert page is None, "it is fresh"
