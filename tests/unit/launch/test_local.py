"""The runner: what is kept, made anew, gone on with, stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.launch.local import locked
from megatron_erpd.manifest import MANIFEST, REQUEST, read_manifest
from megatron_erpd.recipe.replaced import discard, list_replaced, note
from tests.unit.fake_request import prepare_stage


def test_runs_in_order_and_then_keeps_everything(make_stage, run_stages):
    stages = [make_stage("a"), make_stage("b", ["a"]), make_stage("c", ["a", "b"])]
    first = run_stages(stages)
    assert set(first.states.values()) == {"done"}
    second = run_stages(stages)
    assert set(second.states.values()) == {"kept"}
    assert [second.starts(name) for name in "abc"] == [1, 1, 1]
    assert read_manifest(second.root / "c").summary["seconds"] >= 0


def test_a_sampler_gets_all_the_gpus_that_it_spreads_over(make_stage, run_stages):
    stages = [make_stage(name).changed(gpus=gpus) for name, gpus in (("a", 2), ("b", 1), ("c", 3))]
    outcome = run_stages(stages, gpus=["0", "1", "2"])
    logs = {name: (outcome.root / "logs" / f"{name}.log").read_text() for name in "abc"}
    assert "\nGPUs 0,1\n" in logs["a"] and "\nGPUs 2\n" in logs["b"]
    assert sorted(logs["c"].partition("\nGPUs ")[2].splitlines()[0].split(",")) == ["0", "1", "2"]


def test_a_changed_setting_redoes_the_stage_and_what_depends_on_it(make_stage, run_stages):
    def stages(epochs):
        return [make_stage("a", settings={"epochs": epochs}), make_stage("b", ["a"]), make_stage("other")]

    run_stages(stages(1))
    outcome = run_stages(stages(2))
    assert outcome.states == {"a": "done", "b": "done", "other": "kept"}
    assert "[a] made anew, settings or inputs differ:\n  epochs: 1 -> 2" in outcome.text
    assert "input a changed" in outcome.text
    assert read_manifest(outcome.root / "a").settings == {"epochs": 2}
    # What was trained stays, and is not deleted by itself.
    former = outcome.root / "replaced/a/0001"
    assert read_manifest(former).settings == {"epochs": 1}
    assert f"[a] the former one is kept in {former}" in outcome.text


def test_an_interrupted_stage_goes_on_with_its_folder(make_stage, run_stages):
    stages = [make_stage("a", fail="error: out of luck")]
    with pytest.raises(StageError, match="out of luck"):
        run_stages(stages)
    outcome = run_stages(stages)
    assert outcome.states == {"a": "done"}
    assert (outcome.root / "a" / "half").is_file()
    assert (outcome.root / "a" / "result").read_text() == "resumed"


def test_an_interrupted_stage_of_other_settings_begins_afresh(make_stage, run_stages):
    with pytest.raises(StageError):
        run_stages([make_stage("a", settings={"epochs": 1}, fail="error: no")])
    outcome = run_stages([make_stage("a", settings={"epochs": 2})])
    assert (outcome.root / "a" / "result").read_text() == "fresh"
    assert not (outcome.root / "a" / "half").exists()


def test_what_was_replaced_comes_back_when_the_setting_does(make_stage, run_stages):
    before = make_stage("a", settings={"epochs": 1})
    run_stages([before])
    with pytest.raises(StageError):
        run_stages([make_stage("a", settings={"epochs": 2}, fail="error: no")])
    assert run_stages([before]).states == {"a": "kept"}


def test_a_complete_artifact_is_kept_aside_rather_than_a_begun_one(make_stage, run_stages):
    run_stages([make_stage("a", settings={"epochs": 1})])
    for epochs in (2, 3):
        with pytest.raises(StageError):
            run_stages([make_stage("a", settings={"epochs": epochs}, fail="error: no")])
    assert run_stages([make_stage("a", settings={"epochs": 1})]).states == {"a": "kept"}


def test_all_that_was_trained_is_kept_and_comes_back(make_stage, run_stages):
    def stages(epochs):
        trained = make_stage("a", settings={"epochs": epochs})
        return [trained, make_stage("b", ["a"]).changed(command="export")]

    for epochs in (1, 2, 3):
        root = run_stages(stages(epochs)).root
    kept = sorted((root / "replaced/a").iterdir())
    assert [read_manifest(folder).settings["epochs"] for folder in kept] == [1, 2]
    assert not (root / "replaced/b").exists(), "an export can be made again"
    (root / "a/result").rename(root / "elsewhere")  # damaged: what is left of it is kept too
    for epochs, starts in ((1, 3), (2, 3), (3, 4), (1, 4)):
        outcome = run_stages(stages(epochs))
        assert read_manifest(root / "a").settings == {"epochs": epochs} and outcome.starts("a") == starts
        assert ("is taken back" in outcome.text) == (epochs != 3) and outcome.states["b"] == "done"
    assert len(list((root / "replaced/a").iterdir())) == 3


def test_what_was_put_aside_by_a_run_that_was_killed_comes_back(make_stage, run_stages):
    """... before another one had begun."""
    root = run_stages([make_stage("a")]).root
    (root / "replaced/a").mkdir(parents=True)
    (root / "a").rename(root / "replaced/a/0007")
    outcome = run_stages([make_stage("a")])
    assert outcome.states == {"a": "kept"} and outcome.starts("a") == 1 and not list((root / "replaced/a").iterdir())


def test_what_the_version_before_kept_comes_back(make_stage, run_stages):
    """It kept one for each stage, in `replaced/a` itself."""
    root = run_stages([make_stage("a", settings={"epochs": 1})]).root
    (root / "replaced").mkdir()
    (root / "a").rename(root / "replaced/a")
    run_stages([make_stage("a", settings={"epochs": 2})])
    assert (root / "replaced/a" / MANIFEST).is_file()
    run_stages([make_stage("a", settings={"epochs": 3})])
    outcome = run_stages([make_stage("a", settings={"epochs": 1})])
    assert outcome.states == {"a": "kept"} and outcome.starts("a") == 3
    made = {read_manifest(folder).settings["epochs"] for folder in (root / "replaced/a").iterdir()}
    assert made == {2, 3}


def test_beginnings_with_work_in_them_are_kept(make_stage, run_stages):
    for epochs in (1, 2):
        with pytest.raises(StageError):
            run_stages([make_stage("a", settings={"epochs": epochs}, fail="error: no")])
    (make_stage("a").output / "half").unlink()  # the second one's checkpoint was never written
    outcome = run_stages([make_stage("a", settings={"epochs": 1}, fail="error: no")])
    assert (outcome.root / "a/result").read_text() == "resumed"
    assert not list((outcome.root / "replaced/a").iterdir())


def test_what_was_replaced_is_removed_when_it_is_asked_for(make_stage, run_stages):
    stages = [make_stage("a", settings={"epochs": 1}), make_stage("other")]
    for epochs in (1, 2, 3):
        stages[0] = make_stage("a", settings={"epochs": epochs})
        root = run_stages(stages).root
    shutil.copytree(root / "other", root / "replaced/gone/0001")  # of a stage that the recipe has no longer
    text = note(root)
    assert text is not None and "3 artifacts, 0.00 MiB" in text and f"run {root} --discard" in text
    found = discard(root, stages)
    assert [one.folder.name for one in found] == ["0001", "0002"] and all(one.bytes > 100 for one in found)
    assert [path.name for path in (root / "replaced").iterdir()] == ["gone"]
    assert read_manifest(root / "a").settings == {"epochs": 3}
    assert discard(root, stages) == [] and len(list_replaced(root)) == 1
    shutil.rmtree(root / "replaced")
    assert note(root) is None


def test_a_damaged_artifact_is_made_anew(make_stage, run_stages):
    stages = [make_stage("a")]
    folder = run_stages(stages).root / "a"
    (folder / "result").write_text("FRESH")
    assert run_stages(stages, checksums=False).states == {"a": "kept"}  # the size is the same
    outcome = run_stages(stages)
    assert outcome.states == {"a": "done"}
    assert "it is damaged" in outcome.text and "result" in outcome.text


def test_a_failing_stage_stops_the_run_with_its_message(make_stage, run_stages):
    stages = [
        make_stage("bad", fail="error: rollouts.parquet: row 3 has no reward\n  give --allow-unverified"),
        make_stage("beside", sleep=60),
        make_stage("after", ["bad"]),
    ]
    started = time.monotonic()
    with pytest.raises(StageError, match="bad failed: rollouts.parquet: row 3 has no reward\n  give") as caught:
        run_stages(stages)
    assert time.monotonic() - started < 15
    assert "exit code 1" in str(caught.value) and "bad.log" in str(caught.value)
    assert "[beside] stopped" in caught.value.__notes__[0]


def test_without_an_error_of_the_project_the_exception_is_shown_with_its_place(make_stage, run_stages):
    with pytest.raises(
        StageError, match=r"a failed: RuntimeError: boom\n  at .*fake_stage.py, line \d+, in <module>\n"
    ):
        run_stages([make_stage("a", crash="boom")])


def test_a_complete_artifact_counts_whatever_the_exit_code(make_stage, run_stages):
    outcome = run_stages([make_stage("a", end=-6), make_stage("b", ["a"], end=3)])
    assert outcome.states == {"a": "done", "b": "done"}
    assert "[a] its command ended with exit code -6 (SIGABRT) after its artifact was complete" in outcome.text
    assert "[b] its command ended with exit code 3" in outcome.text and str(outcome.root / "logs/b.log") in outcome.text


def test_an_artifact_of_another_request_does_not_count(make_stage, run_stages):
    with pytest.raises(StageError, match="seed: 2 -> 1"):
        run_stages([make_stage("a", settings={"seed": 1}, own_settings={"seed": 2})])


def test_exit_code_0_is_not_enough(make_stage, run_stages):
    with pytest.raises(StageError, match=f"a: the command ended without an error.*has no {MANIFEST}"):
        run_stages([make_stage("a", forgets_manifest=True)])


def test_a_manifest_of_other_settings_is_not_enough(make_stage, run_stages):
    with pytest.raises(StageError, match="a: the command ended without an error.*epochs: 3 -> 2"):
        run_stages([make_stage("a", settings={"epochs": 2}, own_settings={"epochs": 3})])


def test_independent_stages_run_side_by_side(make_stage, run_stages, tmp_path):
    here = {name: str(tmp_path / "run" / name / "here.tmp") for name in "ab"}
    stages = [make_stage("a", meet=here["b"]), make_stage("b", meet=here["a"])]
    assert set(run_stages(stages, cores=2).states.values()) == {"done"}


@pytest.mark.parametrize("options", [{"cores": 1}, {"cores": 4, "jobs": 1}])
def test_without_room_one_waits_for_the_other(make_stage, run_stages, tmp_path, options):
    stages = [make_stage("a"), make_stage("b", meet=str(tmp_path / "run" / "a" / "result"))]
    outcome = run_stages(stages, **options)
    assert outcome.text.index("[a] done") < outcome.text.index("[b] running")


def test_the_cores_are_shared_among_what_runs(run_stages, tmp_path, monkeypatch):
    code = "import os, sys; open(sys.argv[1] + '/threads', 'w').write(os.environ['OMP_NUM_THREADS'])"

    def stage(name):
        output = tmp_path / "run" / name
        return prepare_stage(name, f'python -c "{code}" {output}', output)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    root = run_stages([stage("alone")], cores=4).root
    run_stages([stage("left"), stage("right")], cores=4)
    assert [(root / name / "threads").read_text() for name in ("alone", "left", "right")] == ["4", "2", "2"]


def test_a_command_of_the_recipe_gets_its_manifest_from_the_runner(run_stages, tmp_path):
    output = tmp_path / "run" / "prepare"
    code = f"import pathlib; pathlib.Path(r'{output}', 'data').write_text('x')"
    stage = prepare_stage("prepare", f'python -c "{code}"', output)
    assert run_stages([stage]).states == {"prepare": "done"}
    assert list(read_manifest(output).files) == ["data"]
    assert run_stages([stage]).states == {"prepare": "kept"}


def test_a_folder_of_the_users_own_is_not_touched(make_stage, run_stages, tmp_path):
    folder = tmp_path / "run" / "a"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(StageError, match="holds files that no stage left there"):
        run_stages([make_stage("a")])
    assert (folder / "thesis.tex").read_text() == "precious"


def test_stopping_reaches_workers_in_sessions_of_their_own(make_stage, run_stages, tmp_path):
    pid_file = tmp_path / "pid"
    stages = [make_stage("a", child=str(pid_file), sleep=600)]

    def interrupt():
        while not pid_file.is_file() or not pid_file.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_stages(stages)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 5
    while _runs(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(int(pid_file.read_text()))
    assert (tmp_path / "run" / "a" / REQUEST).is_file()  # to be gone on with


def test_one_run_at_a_time(tmp_path):
    message = f"process {os.getpid()} on .* is running this already"
    with locked(tmp_path), pytest.raises(StageError, match=message), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass  # a lock that was left behind keeps nobody out


def test_sigterm_is_taken_for_ctrl_c(tmp_path):
    code = textwrap.dedent(f"""
        import os, signal, time
        from pathlib import Path
        from megatron_erpd.launch.local import locked
        try:
            with locked(Path({str(tmp_path)!r})):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "interrupted\n", result.stderr


def test_the_request_names_what_was_asked_for(make_stage, run_stages):
    with pytest.raises(StageError):
        run_stages([make_stage("a", settings={"epochs": 2}, fail="error: no")])
    folder = make_stage("a").output
    assert json.loads((folder / REQUEST).read_text())["settings"] == {"epochs": 2}


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to collect an orphan


def test_something_is_done_after_every_stage(make_stage, run_stages):
    seen = []
    stages = [make_stage("a"), make_stage("b", ["a"])]
    outcome = run_stages(stages, after_stage=lambda stage: seen.append(stage.name) or f"saw {stage.name}")
    assert seen == ["a", "b"] and "[a] saw a" in outcome.text
    assert run_stages(stages, after_stage=lambda stage: seen.append(stage.name)).states == {"a": "kept", "b": "kept"}
    assert seen == ["a", "b"]


def test_what_a_stage_warns_of_is_shown_when_it_is_done(make_stage, run_stages):
    warning = "18 of 24 groups teach nothing [sic]"
    outcome = run_stages([make_stage("teacher", warnings=[warning]), make_stage("student")])
    assert f"[teacher] warning: {warning}" in outcome.text
    assert "[student] warning" not in outcome.text
    assert f"warning: {warning}" in (outcome.root / "logs" / "teacher.log").read_text()
    assert read_manifest(outcome.root / "teacher").summary["warnings"] == [warning]
