"""Jobs on a real cluster: what is done, what is queued again, what fails, and what becomes of the jobs behind it.

All runs are submitted at once, and go on while the tests look at one after the other.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST
from megatron_erpd.slurm.queue import slurm
from megatron_erpd.slurm.submit import refuse_queued_jobs
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run, processes_of

ONCE = {"requeues": 1}
HANGS = {"hang_minutes": 0.25}
HANGS_LATER = {"hang_minutes": 0.5}
"""Torchrun alone may need more than a quarter of a minute to start on a busy machine."""

SCENARIOS: dict[str, Callable[[Run], object]] = {
    # SLURM looks every 30 s and signals up to 30 s early: each start has at least 20 s.
    "limit": lambda run: run.submit(run.stage("a", waits=1, slurm={"time": "00:01:00", "signal_seconds": 10})),
    "chain": lambda run: run.submit(run.stage("a"), run.stage("b", ("a",)), run.stage("c", ("b",))),
    "signal": lambda run: run.submit(run.stage("a", waits=1), run.stage("b", ("a",))),
    "forgets": lambda run: run.submit(run.stage("a", forgets_manifest=True, slurm=ONCE), run.stage("b", ("a",))),
    "mistake": lambda run: run.submit(
        run.stage("a", error="reward: no such column"), run.stage("b", ("a",)), run.stage("c", ("b",))
    ),
    "stops": lambda run: run.submit(run.stage("a", stops=True)),
    "late": lambda run: run.submit(run.stage("a", ends_with=3), run.stage("b", ("a",))),
    "crash": lambda run: run.submit(run.stage("a", **{"raise": "out of luck"}, raises=1)),
    "dies": lambda run: run.submit(run.stage("a", processes=2, die=True, rank_waits=True, slurm={"nodes": 2})),
    "hangs": lambda run: run.submit(run.stage("a", processes=2, hang=500, slurm={"nodes": 2, **HANGS_LATER})),
    "chatty": lambda run: run.submit(run.stage("a", waits=9, chatty=True, slurm=HANGS)),
    "killed": lambda run: run.submit(run.stage("a", waits=9, slurm=ONCE), run.stage("b", ("a",))),
    "cancelled": lambda run: run.submit(run.stage("a", waits=9)),
    "reported": lambda run: run.submit(run.stage("round-01/a"), run.stage("round-01/b", ("round-01/a",), waits=9)),
    "stubborn": lambda run: run.submit(run.stage("a", waits=1, stubborn=True, slurm={"signal_seconds": 10})),
    "unshared": lambda run: run.submit(run.stage("a", processes=2, slurm={"nodes": 2}), run.stage("b", ("a",))),
}
SIGNALLED = ("signal", "stubborn")
"""Runs whose first stage gets the signal before a time limit as soon as it is at work."""


@pytest.fixture(scope="module")
def runs(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Run]]:
    """Of the tests that were chosen."""
    items = [item for item in request.session.items if item.path == request.path]
    wanted = {
        item.callspec.params.get("run")
        for item in items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    wanted.add("hangs")  # which another test looks at
    if not cluster.can_unshare():
        wanted.discard("unshared")
    made: dict[str, Run] = {}
    for name in (name for name in SCENARIOS if name in wanted):
        folder = cluster.unshared if name == "unshared" else tmp_path_factory.mktemp(name)
        run = made[name] = Run(folder / "run")
        SCENARIOS[name](run)
        if name == "limit":
            run.starts("a")  # its time runs: before the starts of all others keep the processors busy
    for name in (name for name in SIGNALLED if name in made):
        made[name].starts("a")
        made[name].signal("a")
    yield made
    for run in made.values():
        run.cancel()


@pytest.fixture
def run(runs: dict[str, Run], request: pytest.FixtureRequest) -> Run:
    if request.param not in runs:
        pytest.skip("needs mount namespaces (root)")
    return runs[request.param]


def of(scenario: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", [scenario], indirect=True)


@of("signal")
def test_a_stage_that_got_the_signal_saves_and_goes_on(run: Run) -> None:
    assert run.ends("b") == "COMPLETED"
    assert run.result("a") == "in start 0"
    assert "its time was over; the job is queued again (1 of 3)" in run.log("a")
    assert "start 1 of job" in run.log("a", 1)


@of("killed")
def test_a_job_whose_wrapper_is_killed_is_queued_again_and_fails_when_the_requeues_are_used_up(run: Run) -> None:
    shown: dict[str, str] = {}
    for restart in (0, 1):
        run.starts("a", restart)
        wrapper = processes_of(f"slurm.job {run.root} a ")
        assert len(wrapper) == 1
        shown = run.shown(run.stage("a"))
        os.kill(wrapper[0], signal.SIGKILL)
    # No limit, a second start, and neither a step nor a progress line of the stage.
    assert shown["a"] == f"running: job {run.number('a')} RUNNING, start 2"
    assert "killed (exit code 137); the job is queued again" in run.log("a")
    assert run.ends("a") == "FAILED"
    assert run.ends("b") == "CANCELLED"
    run.until(lambda: not processes_of(f"fake_stage.py.*{run.root}"), 20, "the stage's processes are gone")
    shown = run.shown(run.stage("a"), run.stage("b", ("a",)))
    assert shown["a"].startswith(f"failed: job {run.number('a')} FAILED")
    assert shown["a"].endswith(f"(log in {run.root}/logs/slurm/a-{run.number('a')}-1.log)")
    assert shown["b"] == f"stopped: job {run.number('b')} CANCELLED"
    before = run.number("a")
    run.submit(run.stage("a"), run.stage("b", ("a",)))
    assert run.number("a") != before
    assert run.ends("b") == "COMPLETED"


@of("cancelled")
def test_cancel_ends_the_jobs_of_its_run_and_no_others(run: Run, runs: dict[str, Run]) -> None:
    run.starts("a")
    number = run.number("a")
    # While it runs, nobody else gets at its stage.
    with pytest.raises(StageError, match=rf"job {number} of .a. is in the queue"):
        refuse_queued_jobs(run.root)
    with pytest.raises(StageError, match=rf"other settings than these(?s:.*)\n  a, job {number}: .*settings"):
        run.submit(run.stage("a", waits=9, settings={"k": 2}))
    (run.root / "a" / "metrics.jsonl").write_text('{"iteration": 7, "stage1/loss": 0.25}\n')
    assert run.shown(run.stage("a")) == {"a": f"running: job {number} RUNNING, iteration 7, loss 0.25"}
    assert run.submit(run.stage("a", waits=9)) == {}
    assert f"a: job {number} is in the queue, left alone" in run.said
    second = slurm("sbatch", "--parsable", str(run.root / "slurm/a.sbatch")).strip()
    log = run.root / "logs" / "slurm" / f"a-{second}-0.log"
    run.until(lambda: log.is_file() and "error: " in log.read_text(), 30, "the second job fails")
    assert f"job {number} (running, on" in log.read_text()
    run.cancel()
    assert run.ends("a") == "CANCELLED"
    assert "queued again" not in run.log("a")
    assert (run.root / "a" / "saved").is_file() and not (run.root / "a" / MANIFEST).exists()
    assert runs["hangs"].state("a") != "CANCELLED"
    run.cancel()
    assert run.said[-1].endswith("no job of this run is queued or running")


@of("stubborn")
def test_a_stage_that_does_not_end_is_killed_before_the_time_limit(run: Run) -> None:
    assert run.ends("a") == "COMPLETED"
    assert "the stage has not ended in 5 s" in run.log("a")
    assert "its time was over; the job is queued again" in run.log("a")


@of("chain")
def test_a_chain_runs_in_its_order(run: Run) -> None:
    assert run.ends("c") == "COMPLETED"
    assert [run.result(name) for name in "abc"] == ["fresh in start 0"] * 3
    assert not list((run.root / "slurm/locks").iterdir())
    assert run.submit(run.stage("a"), run.stage("b", ("a",)), run.stage("c", ("b",))) == {}
    assert [line.partition(",")[0] for line in run.said[-4:-1]] == ["a: done", "b: done", "c: done"]
    assert run.said[-1] == "0 jobs submitted, 0 in the queue already, 3 of 3 stages done"
    # What is made from other settings is made anew, and nothing before it.
    new = run.submit(run.stage("a"), run.stage("b", ("a",), settings={"k": 2}), run.stage("c", ("b",)))
    assert set(new) == {"b", "c"}
    assert run.ends("c") == "COMPLETED"
    assert "b: made anew, settings or inputs differ:\n  k: 64 -> 2" in run.log("b")


@pytest.mark.long
@of("reported")
def test_the_report_follows_the_stages(run: Run) -> None:
    assert run.ends("round-01-a") == "COMPLETED"
    run.starts("round-01-b")
    assert list(json.loads((run.root / "report/summary.json").read_text())["stages"]) == ["round-01/a"]
    run.until((run.root / "report/index.html").is_file, 60, "the page is drawn")  # by the second job, at work


@pytest.mark.long
@of("forgets")
def test_exit_code_0_without_an_artifact_is_not_done_and_the_requeues_end(run: Run) -> None:
    assert run.ends("a") == "FAILED"
    assert "its artifact is not complete" in run.log("a") and "queued again (1 of 1)" in run.log("a")
    assert "error: a failed:" in run.log("a", 1) and "queued again 1 times already" in run.log("a", 1)
    assert run.ends("b") == "CANCELLED"


@of("mistake")
def test_a_mistake_of_the_user_is_not_tried_again(run: Run) -> None:
    assert run.ends("a") == "FAILED"
    assert "error: a failed: reward: no such column" in run.log("a")
    assert not run.log("a", 1)
    assert run.ends("b") == run.ends("c") == "CANCELLED"
    shown = run.shown(run.stage("a"))["a"]
    assert "FAILED: a failed: reward: no such column; not queued again, as it would fail again (log in" in shown
    run.submit(run.stage("a"), run.stage("b", ("a",)))
    assert run.ends("b") == "COMPLETED"


@pytest.mark.long
@of("stops")
def test_a_stage_that_stopped_by_itself_goes_on(run: Run) -> None:
    assert run.ends("a") == "COMPLETED"
    assert "queued again (1 of 3)" in run.log("a") and run.result("a") == "fresh in start 1"


@pytest.mark.long
@of("late")
def test_a_complete_artifact_counts_whatever_the_exit_code(run: Run) -> None:
    assert run.ends("b") == "COMPLETED"
    assert "a is complete; its command ended with exit code 3 after its artifact was complete" in run.log("a")


@pytest.mark.long
@of("crash")
def test_a_crash_is_shown_and_tried_again(run: Run) -> None:
    assert run.ends("a") == "COMPLETED"
    shown = run.log("a").partition("queued again (1 of 3)")[2]
    assert "RuntimeError: out of luck\n  at " in shown and "fake_stage.py, line " in shown
    assert "ChildFailedError" not in shown and "task 0" not in shown
    assert run.result("a") == "fresh in start 1"


@of("dies")
def test_a_rank_that_dies_ends_the_job_on_all_nodes(run: Run) -> None:
    assert run.ends("a") == "COMPLETED"
    first = run.log("a")
    assert "started 0 n" in first and "started 1 n" in first and {"n1", "n2"} <= set(first.split())
    assert "queued again (1 of 3)" in first
    assert not processes_of(f"fake_stage.py.*{run.root}")


@of("hangs")
def test_ranks_that_hang_are_ended_with_their_stacks_shown(run: Run) -> None:
    assert run.ends("a") == "COMPLETED"
    first = run.log("a")
    assert "hung: no output and no file for 0.5 minutes; its stacks follow" in first
    assert "Fatal Python error: Aborted" in first and "fake_stage.py" in first.partition("Fatal Python error")[2]
    shown = first.partition("queued again (1 of 3)")[2]
    assert "Fatal Python error: Aborted\n  at " in shown and "task 0" not in shown
    assert run.result("a") == "fresh in start 1"


@pytest.mark.long
@of("chatty")
def test_a_stage_that_prints_does_not_hang(run: Run) -> None:
    assert "hung" not in run.log("a") and run.state("a") == "RUNNING"


@of("unshared")
def test_nodes_that_do_not_share_the_folder_are_noticed_before_the_stage(run: Run) -> None:
    assert run.ends("a") == "FAILED"
    assert "error: " in run.log("a") and "do not share this folder" in run.log("a")
    assert "n2 (" in run.log("a") and "started" not in run.log("a")
    assert run.ends("b") == "CANCELLED"


@of("limit")
def test_the_time_limit_itself_ends_in_a_resumed_stage(run: Run) -> None:
    assert run.ends("a") == "COMPLETED"
    assert "signal SIGUSR1: telling the stage" in run.log("a")
    assert run.result("a") == "in start 0"
