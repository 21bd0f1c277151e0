"""Locks of jobs and of submissions: one alone has it, and what is left behind is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.launch.local import locked
from megatron_erpd.locks import NodeLock
from megatron_erpd.slurm import job as slurm_job
from megatron_erpd.slurm.job import job_lock
from megatron_erpd.slurm.submit import submitting


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The queue: a job's state by its number."""
    states: dict[str, str] = {}
    monkeypatch.setattr(slurm_job, "state_of", lambda number: states.get(number, ""))
    return states


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SUSPENDED"])
def test_a_job_in_the_queue_keeps_its_lock(tmp_path, states, state):
    job_lock(tmp_path / "a", "1", 0).acquire()
    states["1"] = state
    with pytest.raises(StageError, match=f"job 1 \\({state.lower()}, on "):
        job_lock(tmp_path / "a", "2", 0).acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("state", ["", "FAILED", "CANCELLED", "TIMEOUT"])
def test_the_lock_of_a_job_that_is_gone_is_taken_over(tmp_path, states, state):
    job_lock(tmp_path / "a", "1", 0).acquire()
    states["1"] = state
    lock = job_lock(tmp_path / "a", "2", 0)
    lock.acquire()
    assert lock.held()


def test_a_job_that_was_queued_again_finds_its_own_lock_and_its_former_start_has_lost_it(tmp_path, states):
    former, now = job_lock(tmp_path / "a", "1", 0), job_lock(tmp_path / "a", "1", 1)
    former.acquire()
    states["1"] = "RUNNING"
    now.acquire()
    assert now.held() and not former.held()
    former.release()
    assert now.held()
    now.release()
    assert now.holder() is None


def test_an_ending_job_is_waited_for(tmp_path, states):
    first = job_lock(tmp_path / "a", "1", 0)
    first.acquire()
    states["1"] = "COMPLETING"
    with pytest.raises(StageError, match="completing"):
        job_lock(tmp_path / "a", "2", 0, wait=0).acquire()
    threading.Timer(0.2, first.release).start()
    job_lock(tmp_path / "a", "2", 0, wait=20).acquire()


def test_of_many_that_take_over_one_gets_it(tmp_path, states):
    job_lock(tmp_path / "a", "0", 0).acquire()
    states.update({str(number): "RUNNING" for number in range(1, 9)})
    got: list[str] = []

    def take(number: str) -> None:
        try:
            job_lock(tmp_path / "a", number, 0).acquire()
            got.append(number)
        except StageError:
            pass

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert job_lock(tmp_path / "a", got[0], 0).held()


def test_a_lock_that_was_just_taken_over_is_nobody_s_for_no_moment(tmp_path, states, monkeypatch):
    """The first takes over while the second looks at the job that is gone; at whatever the second does then, a third
    job tries."""
    job_lock(tmp_path / "a", "0", 0).acquire()
    states.update({"1": "RUNNING", "2": "RUNNING", "3": "RUNNING"})
    first, second, third = (job_lock(tmp_path / "a", number, 0) for number in "123")
    tried: list[str] = []
    replace, link, rename, unlink = os.replace, os.link, Path.rename, Path.unlink

    def the_first_is_quicker(number: str) -> str:
        if number == "0" and not first.held():
            monkeypatch.setattr(slurm_job, "state_of", lambda number: states.get(number, ""))
            first.acquire()
            for module, name, function in ((os, "replace", replace), (os, "link", link), (Path, "rename", rename)):
                monkeypatch.setattr(module, name, and_the_third_tries(function))
            monkeypatch.setattr(Path, "unlink", and_the_third_tries(unlink))
            return ""
        return states.get(number, "")

    def and_the_third_tries(function):
        def call(*given, **options):
            if "trying" not in tried:  # that is, not at what the third does itself
                tried.append("trying")
                with pytest.raises(StageError, match="job 1 "):
                    third.acquire()
                tried[-1] = function.__name__
            return function(*given, **options)

        return call

    monkeypatch.setattr(slurm_job, "state_of", the_first_is_quicker)
    with pytest.raises(StageError, match="job 1 "):
        second.acquire()
    assert first.held() and len(tried) > 2


def test_a_job_that_was_killed_while_it_took_over_is_followed(tmp_path, states, monkeypatch):
    job_lock(tmp_path / "a", "0", 0).acquire()
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        killed.setattr(NodeLock, "release", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            job_lock(tmp_path / "a", "1", 0).acquire()
    states["2"] = "RUNNING"
    lock = job_lock(tmp_path / "a", "2", 0)
    lock.acquire()
    assert lock.held()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_second_of_two_submissions_says_so(tmp_path):
    mine = f"process {os.getpid()} on .* is submitting this now"
    with submitting(tmp_path), pytest.raises(StageError, match=mine), submitting(tmp_path):
        pass
    with submitting(tmp_path):
        pass


def test_a_submission_that_was_killed_is_in_nobody_s_way(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with submitting(tmp_path):
        lock = tmp_path / "slurm/.submitting"
        mine = lock.read_text()
    lock.write_text(mine.replace(str(os.getpid()), str(gone.pid)))
    with submitting(tmp_path):
        assert lock.read_text() == mine
    lock.write_text(json.dumps({"host": "another-host", "process": gone.pid}))
    with pytest.raises(StageError, match=f"delete .*{lock.name}"), submitting(tmp_path):
        pass


def test_nothing_is_submitted_beside_a_run(tmp_path):
    message = "runs this with `megatron-erpd run`"
    with locked(tmp_path), pytest.raises(StageError, match=message), submitting(tmp_path):
        pass
    assert not Path(tmp_path / "slurm/.submitting").exists()
