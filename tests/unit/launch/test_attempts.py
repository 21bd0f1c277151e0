"""What `status` shows of stages that are at work, failed, were stopped or were killed with their run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_erpd.commands.status import _row
from megatron_erpd.errors import StageError
from megatron_erpd.launch.attempts import attempt_file, last_attempt, note_start
from megatron_erpd.launch.display import Row
from megatron_erpd.launch.local import locked, log_file
from megatron_erpd.locks import RUN_LOCK, lock_holder, this_process
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.stages import Stage, dependencies
from megatron_erpd.recipe.verdicts import judge_all


def rows(root: Path, stages: list[Stage]) -> dict[str, Row]:
    found = judge_all(stages, Artifacts(root))
    return {
        stage.name: _row(
            stage,
            found[stage.name],
            [name for name in dependencies(stage, stages) if not found[name].is_done],
            log_file(root, stage),
        )
        for stage in stages
    }


def test_a_failed_stage_is_shown_with_its_error_and_log(make_stage, run_stages, tmp_path):
    lines = "error: rollouts.parquet: row 3 has no reward\n" + "".join(f"  line {i}\n" for i in range(2, 6))
    bad, beside = (str(tmp_path / "run" / name / "here.tmp") for name in ("bad", "beside"))
    stages = [
        make_stage("bad", fail=lines, meet=beside),
        make_stage("beside", sleep=60, meet=bad),
        make_stage("after", ["bad"]),
    ]
    with pytest.raises(StageError):
        run_stages(stages)
    shown = rows(tmp_path / "run", stages)
    log = tmp_path / "run/logs/bad.log"
    assert shown["bad"].state == "failed"
    assert shown["bad"].note == f"rollouts.parquet: row 3 has no reward\n  line 2\n  line 3\n...\nlog in {log}"
    assert shown["beside"].state == "stopped" and "resumes from what is there" in shown["beside"].note
    assert (shown["after"].state, shown["after"].note) == ("waiting", "waits for bad")
    # With other settings, that is what there is to say.
    assert rows(tmp_path / "run", [make_stage("bad", settings={"epochs": 2})])["bad"].state == "again"
    # What has failed and then was done is done.
    run_stages([make_stage("bad")])
    assert rows(tmp_path / "run", stages)["bad"].state == "done"


def test_a_stage_at_work_is_shown_with_its_progress(make_stage, tmp_path):
    root, stage = tmp_path / "run", make_stage("a")
    (root / "logs").mkdir(parents=True)
    log = log_file(root, stage)
    log.write_text("sampled 9 of 10\n")  # of an earlier attempt
    with locked(root):
        note_start(log, os.getpid(), log.stat().st_size)
        assert rows(root, [stage])["a"].note == f"log in {log}"
        with log.open("a") as file:
            file.write("sampled 3 of 10\n/x.py:1: FutureWarning: soon\n  warnings.warn('soon')\n")
        row = rows(root, [stage])["a"]
        assert (row.state, row.note) == ("running", f"sampled 3 of 10, log in {log}") and row.seconds is not None
        assert lock_holder(root / RUN_LOCK) == this_process()
        # An earlier run's, which was killed; this one is at another stage.
        record = json.loads(attempt_file(log).read_text())
        attempt_file(log).write_text(
            json.dumps({**record, "runner": record["runner"].replace("process ", "process 9")})
        )
        assert last_attempt(log).state == "stopped"
        attempt_file(log).write_text(json.dumps({**record, "process": 2**22 + 1}))
        assert last_attempt(log).state == "stopped"
    assert lock_holder(root / RUN_LOCK) is None and last_attempt(log).state == "stopped"
    attempt_file(log).write_text(json.dumps(record))
    assert rows(root, [stage])["a"].state == "stopped"
    # On another machine, a log that grows.
    attempt_file(log).write_text(json.dumps({**record, "runner": "process 1 on elsewhere"}))
    assert last_attempt(log).state == "running"
    os.utime(log, (time.time() - 3600,) * 2)
    assert last_attempt(log).state == "stopped"


_RUN = """
import io, sys
from pathlib import Path
from rich.console import Console
from megatron_erpd.launch.display import Display
from megatron_erpd.launch.local import Runner, locked
from megatron_erpd.launch.processes import Slots
sys.path.insert(0, {here!r})
from tests.unit.conftest import FakeStage
from tests.unit.fake_request import FakeRequest
root = Path({root!r})
stage = FakeStage("a", FakeRequest(command="train-teacher", output=root / "a"), behavior={{"sleep": 600}})
with locked(root) as lock:
    display = Display("test", ["a"], Console(file=io.StringIO()))
    Runner(root, [stage], Slots(gpus=[], cores=2), display, keep_open=(lock.fileno(),)).run([stage])
"""


def test_a_run_that_is_killed(make_stage, tmp_path):
    root, stage = tmp_path / "run", make_stage("a")
    script = _RUN.format(here=str(Path(__file__).parents[3]), root=str(root))
    run = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (root / "a/request.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    attempt = last_attempt(log_file(root, stage))
    try:
        assert rows(root, [stage])["a"].state == "running"
        run.kill()
        run.wait()
        assert rows(root, [stage])["a"].state == "running"  # the stage outlives its run, and holds the lock
    finally:
        os.kill(attempt.process, signal.SIGKILL)
    while lock_holder(root / RUN_LOCK) and time.monotonic() < deadline:
        time.sleep(0.05)
    row = rows(root, [stage])["a"]
    assert row.state == "stopped" and "resumes from what is there" in row.note


def test_a_look_at_the_lock_does_not_keep_a_run_out(tmp_path):
    with locked(tmp_path):
        pass
    with (tmp_path / ".lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(StageError, match="is running this already"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_no_record_and_no_log(tmp_path, make_stage):
    assert last_attempt(tmp_path / "run/logs/a.log") is None
    stage = make_stage("a").changed(output=tmp_path / "run/x")
    assert rows(tmp_path / "run", [stage])["a"] == Row("waiting", note="")
