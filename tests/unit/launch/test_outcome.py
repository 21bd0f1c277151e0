"""What is said of a command that has ended: by its artifact, and by what its processes printed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_erpd.launch.failure import describe_code, why_it_failed
from megatron_erpd.launch.outcome import judge
from megatron_erpd.manifest import MANIFEST, begin_artifact, finish_artifact
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.stages import Stage
from tests.unit.fake_request import fake_stage, prepare_stage


def traceback(raised: str, prefix: str = "", place: str = '"step.py", line 3, in loss') -> str:
    lines = ["Traceback (most recent call last):", '  File "train.py", line 1, in <module>', "    main()", "    ^^^^"]
    lines += [f"  File {place}", *raised.splitlines()]
    return "".join(f"{prefix}{line}\n" for line in lines)


GONE = "RuntimeError: [gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer. GLHF!"
NCCL = "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error"
OWN = "ValueError: row 3\n  of file x"
CHAIN = "\nThe above exception was the direct cause of the following exception:\n\n"


def launcher(*ranks: tuple[int, str]) -> str:
    """What torchrun prints after a failure, with exit codes as it shows them."""
    rows = "".join(
        f"[{i}]:\n  time      : now\n  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code}\n"
        f"  traceback : To enable traceback see: https://pytorch.org\n"
        for i, (rank, code) in enumerate(ranks)
    )
    return (
        "W1129 00:29:36.161000 1 site-packages/torch/distributed/elastic/multiprocessing/api.py:1028] Sending\n"
        + traceback("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ").rstrip("\n")
        + f"\n=====\ntrain.py FAILED\n-----\nFailures:\n{rows}=====\n"
    )


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        # The tool's own error, whatever else there is.
        (
            "error: no rows\n  give some\n" + traceback(GONE, "[rank0]: ") + launcher((1, "2 (pid: 5)")),
            "no rows\n  give some",
        ),
        # A rank's exception, not the launcher's, nor those of the ranks that waited for it.
        (
            traceback(OWN, "[rank1]: ") + launcher((1, "1 (pid: 5)")),
            "rank 1: ValueError: row 3\n  of file x\n  at step.py, line 3, in loss",
        ),
        (
            traceback(GONE, "[rank0]: ") + traceback(OWN, "[rank7]: ") + launcher((0, "1 (pid: 5)")),
            "rank 7: ValueError",
        ),
        (
            traceback(NCCL, "[rank3]: ") + traceback(OWN, "[rank7]: ") + launcher((3, "1 (pid: 5)")),
            "rank 7: ValueError",
        ),
        (traceback("KeyError: 'a'") + traceback(OWN) + launcher((0, "1 (pid: 5)")), "KeyError: 'a'\n  at step.py"),
        # Lines of two ranks in turns.
        (
            "".join(
                f"{a}\n{b}\n"
                for a, b in zip(
                    traceback("TypeError: one", "[rank0]: ").splitlines(),
                    traceback("TypeError: two", "[rank1]: ").splitlines(),
                    strict=True,
                )
            ),
            "rank 0: TypeError: one\n  at step.py, line 3, in loss",
        ),
        # Of a chain the last, of a single process the last: those before were survived.
        (traceback("KeyError: 'a'") + CHAIN + traceback("RuntimeError: no a"), "RuntimeError: no a\n  at"),
        (traceback("OSError: retried") + "step 2\n" + traceback("MemoryError"), "MemoryError\n  at step.py"),
        ("Exception ignored in: <generator>\n" + traceback("AttributeError: x") + "the end\n", "Exception ignored in"),
        ("--- Logging error ---\n" + traceback("ValueError: x") + traceback("OSError: y"), "OSError: y"),
        (
            traceback("torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nstep 3"),
            "torch.OutOfMemoryError: CUDA out",
        ),
        # Signals and crashes outside of Python.
        (
            traceback(GONE, "[rank0]: ") + launcher((0, "-15 (pid: 4)  (SIGTERM)"), (1, "-9 (pid: 5)  (SIGKILL)")),
            "rank 1 was ended by SIGKILL (as the system does when memory runs out)",
        ),
        (
            "terminate called after throwing an instance of 'c10::Error'\n  what():  bad\n",
            "terminate called after throwing an instance of 'c10::Error'\n  what():  bad",
        ),
        (
            'Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n  File "a.py", line 3 in wait\n',
            "Fatal Python error: Aborted\n  at a.py, line 3, in wait",
        ),
        # argparse, ours and Megatron's.
        (
            "usage: x [-h]\nmegatron-erpd train-teacher: error: unrecognized arguments: --foo\n",
            "unrecognized arguments: --foo",
        ),
        (
            "usage: x\ntrain_teacher.py: error: argument --lr: invalid float\n" + launcher((0, "2 (pid: 5)")),
            "argument --lr: invalid float",
        ),
        # Around a rank's error, what SLURM says of the step; of a task that said nothing, it is all that there is.
        (
            traceback("RuntimeError: out of luck") + "srun: error: n1: task 0: Exited with exit code 1\n",
            "RuntimeError: out of luck\n  at step.py, line 3, in loss",
        ),
        (
            "slurmstepd-gpu-07.cluster: error: *** STEP 17.0 ON gpu-07 CANCELLED AT now ***\n"
            + traceback(OWN, "[rank1]: ")
            + launcher((1, "1 (pid: 5)"))
            + "srun: error: gpu-07: task 0: Exited with exit code 1\nsrun: Terminating StepId=17.0\n",
            "rank 1: ValueError: row 3\n  of file x\n  at step.py",
        ),
        (
            'Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n  File "a.py", line 3 in wait\n'
            "srun: error: n2: task 1: Aborted\nsrun: error: n1: task 0: Aborted\n",
            "Fatal Python error: Aborted\n  at a.py, line 3, in wait",
        ),
        (
            traceback(OWN).replace("ValueError", "srun: error: n2: task 1: Killed\nValueError"),
            "ValueError: row 3\n  of file x\n  at step.py",
        ),
        ("error: no rows\nsrun: error: n1: task 0: Exited with exit code 2\n  give some\n", "no rows\n  give some"),
        (
            "usage: x\nx: error: argument --lr: invalid float\nsrun: error: n1: task 0: Exited with exit code 2\n",
            "argument --lr: invalid float",
        ),
        (
            "[job] a, start 1 of job 17 on n1\n"
            "step 3\nslurmstepd: error: Detected 1 oom_kill event in StepId=17.0\nsrun: error: n1: task 0: Killed\n",
            "step 3\nslurmstepd: error: Detected 1 oom_kill event in StepId=17.0\nsrun: error: n1: task 0: Killed",
        ),
        # The form of argparse's errors, but no usage.
        ("ld: error: no -lcuda\n" + traceback(OWN), "ValueError: row 3\n  of file x\n  at step.py"),
        # Nothing of the kind: the last lines, without the launcher's.
        ("a\nb\n" + launcher((0, "1 (pid: 5)")), "a\nb"),
        (traceback(GONE, "[rank0]: "), f"rank 0: {GONE}\n  at step.py"),
        ("", ""),
    ],
)
def test_why_it_failed(output: str, expected: str) -> None:
    said = why_it_failed(output)
    assert said.startswith(expected) and (said == "") == (expected == "")
    assert "ChildFailedError" not in said and "exitcode" not in said


@pytest.mark.parametrize(
    ("code", "said"),
    [(1, "exit code 1"), (-9, "exit code -9 (SIGKILL)"), (134, "exit code 134 (SIGABRT)"), (255, "exit code 255")],
)
def test_exit_codes(code: int, said: str) -> None:
    assert describe_code(code) == said


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "a.log").write_text("error: of an earlier start\n")
    return fake_stage("a", "sample", tmp_path / "a", settings={"seed": 1})


@pytest.mark.parametrize("code", [0, 1, -6])
@pytest.mark.parametrize("artifact", ["complete", "another", "file missing", "begun"])
def test_the_artifact_decides(stage: Stage, artifact: str, code: int, tmp_path: Path) -> None:
    begin_artifact(stage.output, "sample", {"seed": 2 if artifact == "another" else 1}, {})
    (stage.output / "rows").write_text("rows")
    if artifact != "begun":
        finish_artifact(stage.output)
    if artifact == "file missing":
        (stage.output / "rows").unlink()
    log, start = tmp_path / "a.log", (tmp_path / "a.log").stat().st_size
    with log.open("a") as file:
        file.write(traceback("RuntimeError: boom"))
    outcome = judge(Artifacts(tmp_path), stage, code, log, start)
    assert outcome.done == (artifact == "complete")
    assert bool(outcome.warning) == (outcome.done and code != 0)
    if outcome.warning:
        assert describe_code(code) in outcome.warning and str(log) in outcome.warning
    elif code and not outcome.done:
        assert outcome.why == "RuntimeError: boom\n  at step.py, line 3, in loss" and not outcome.own_error
    elif not outcome.done:
        assert {"another": "seed: 2 -> 1", "file missing": "rows", "begun": MANIFEST}[artifact] in outcome.why


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_that_writes_no_manifest_is_judged_by_its_exit_code(code: int, tmp_path: Path) -> None:
    stage = prepare_stage("prepare", "true", tmp_path / "prepare")
    artifacts = Artifacts(tmp_path)
    artifacts.begin(stage)
    (tmp_path / "log").write_text("")
    outcome = judge(artifacts, stage, code, tmp_path / "log")
    assert outcome.done == (stage.output / MANIFEST).is_file() == (code == 0)
    assert outcome.done or outcome.why == "its command ended with exit code 1"


def test_a_full_disk_is_told_where_the_log_could_not(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.log").write_text("1")
    assert judge(Artifacts(tmp_path), stage, 2, tmp_path / "a.log").why == "1"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    why = judge(Artifacts(tmp_path), stage, 2, tmp_path / "a.log").why
    assert why == f"{tmp_path}: is on a full disk; make room and run it again"
