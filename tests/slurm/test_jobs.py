"""Jobs on a real cluster: what is done, what is queued again, what fails, and what becomes of the jobs behind it."""

from __future__ import annotations

from tests.slurm.runs import Run


def test_a_chain_runs_in_its_order(a_run: Run) -> None:
    a_run.submit(a_run.stage("a"), a_run.stage("b", ("a",)), a_run.stage("c", ("b",)))
    assert a_run.ends("c") == "COMPLETED"
    assert [a_run.result(name) for name in "abc"] == ["fresh in start 0"] * 3


def test_a_stage_that_got_the_signal_saves_and_goes_on(a_run: Run) -> None:
    a_run.submit(a_run.stage("a", waits=1), a_run.stage("b", ("a",)))
    a_run.starts("a")
    a_run.signal("a")
    assert a_run.ends("b") == "COMPLETED"
    assert a_run.result("a") == "in start 0"
    assert "its time was over; the job is queued again (1 of 3)" in a_run.log("a")
    assert "start 1 of job" in a_run.log("a", 1)
