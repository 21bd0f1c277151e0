"""The folder that is given is the run: renamed, copied, moved with its project, from any directory, however spelt."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_erpd.commands import cli
from megatron_erpd.errors import RecipeError
from megatron_erpd.manifest import differences, read_manifest, write_manifest
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.slurm import submit as slurm_submit

RECIPE = """
name: tiny
model: model
rollouts: {prompts: p.jsonl, verifier: "python:score.py:score"}
teacher: {loss: ce}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run `runs/tiny` and what its recipe names."""
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    for name in ("p.jsonl", "score.py", "mine.yaml"):
        (folder / name).write_text(RECIPE)
    monkeypatch.chdir(folder)
    keep_run(load_recipe(folder / "mine.yaml").folder, load_recipe(folder / "mine.yaml").of_run())
    return folder


def keep_run(folder: Path, recipe: str) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / ".lock").touch()


def of_a_rename(project: Path) -> tuple[Path, Path]:
    (project / "runs/tiny").rename(project / "runs/other")
    return project / "runs/other", project


def of_a_copy_deeper_down(project: Path) -> tuple[Path, Path]:
    shutil.copytree(project / "runs/tiny", project / "old/2026/kept")
    return project / "old/2026/kept", project


def of_a_copy_without_hidden_files(project: Path) -> tuple[Path, Path]:
    (project / "copy").mkdir()
    shutil.copy(project / "runs/tiny/recipe.yaml", project / "copy")
    return project / "copy", project


def of_a_copy_outside_by_the_same_name(project: Path) -> tuple[Path, Path]:
    shutil.copytree(project / "runs", project.parent / "backup/runs")
    return project.parent / "backup/runs/tiny", project


def of_a_copy_of_a_renamed_run(project: Path) -> tuple[Path, Path]:
    renamed, _ = of_a_rename(project)
    (renamed / "recipe.yaml").write_text(load_recipe(renamed).of_run())
    shutil.copytree(renamed, project / "runs/again")
    return project / "runs/again", project


def of_a_copy_of_the_project(project: Path) -> tuple[Path, Path]:
    other = project.parent / "other"
    shutil.copytree(project, other)
    return other / "runs/tiny", other


def of_a_moved_project(project: Path) -> tuple[Path, Path]:
    other = project.parent / "other"
    project.rename(other)
    return other / "runs/tiny", other


def of_a_run_kept_elsewhere(project: Path) -> tuple[Path, Path]:
    output = project.parent / "scratch"
    keep_run(output, load_recipe(project / "mine.yaml", output=str(output)).of_run())
    return output, project


def of_the_original(project: Path) -> tuple[Path, Path]:
    shutil.copytree(project / "runs/tiny", project / "runs/copy")
    return project / "runs/tiny", project


CASES = [value for name, value in sorted(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("where", ["project", "elsewhere", "inside"])
def test_the_folder_is_the_run_from_any_directory(project, tmp_path, monkeypatch, case, where):
    run, directory = case(project)
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "elsewhere").mkdir()
    start = {"project": directory, "elsewhere": tmp_path / "elsewhere", "inside": run}[where]
    spelt = [run, f"{os.path.relpath(run, start)}/", tmp_path / "link", run / "recipe.yaml", run / "../" / run.name]
    for path in spelt if (run / ".lock").exists() else spelt[:3]:
        monkeypatch.chdir(start)
        recipe = cli._entered(load_recipe(Path(path)))
        assert recipe.folder.samefile(run), path
        assert Path.cwd() == directory
        # What the run keeps then means the same.
        (run / "recipe.yaml").write_text(recipe.of_run())
        monkeypatch.chdir("/")
        assert cli._entered(load_recipe(run)).folder.samefile(run) and Path.cwd() == directory


def test_commands_act_on_the_folder(project, tmp_path, monkeypatch, capsys):
    run, _ = of_a_copy_deeper_down(project)
    monkeypatch.chdir(tmp_path)
    cli.main(["status", str(run)])
    assert f"tiny in {run}" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):  # the model has no weights
        cli.main(["run", "project/old/2026/kept", "--dry-run"])
    out = capsys.readouterr().out
    assert f"# in {project}:\n" in out
    assert {line.partition("--output ")[2].split("/round")[0] for line in out.splitlines() if "--output" in line} == {
        str(run)
    }
    # From its own directory, as a person would write it.
    monkeypatch.chdir(project)
    with suppress(SystemExit):  # the model has no weights
        cli.main(["run", "old/2026/kept", "--dry-run"])
    assert "--output old/2026/kept/round-01/base" in capsys.readouterr().out


def test_another_folder_is_asked_for(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(project / "runs/tiny", output="new").folder == tmp_path / "new"
    monkeypatch.chdir(tmp_path)
    assert load_recipe(project / "runs/tiny", ["output=new"]).folder == project / "new"
    monkeypatch.chdir(tmp_path)
    assert load_recipe(project / "runs/tiny", ["directory=."]).directory == str(tmp_path)


def test_a_folder_without_a_run(project):
    (project / "examples").mkdir()
    (project / "examples/recipe.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"examples: holds a recipe and no run; .*examples/recipe.yaml. starts one"):
        load_recipe(project / "examples")
    # The user's own recipe of that name is no run.
    assert load_recipe(project / "examples/recipe.yaml").folder == Path("runs/tiny")


def test_a_directory_that_is_gone_is_said(project, tmp_path, monkeypatch, capsys):
    run, _ = of_a_run_kept_elsewhere(project)
    shutil.rmtree(project)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(run).directory == str(tmp_path)
    assert f"the directory {project}, where its relative paths began, is gone" in capsys.readouterr().err


def test_jobs_of_a_copy_are_the_originals(project, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(slurm_submit, "queued", lambda: {"17": []})
    monkeypatch.setattr(slurm_submit, "slurm", lambda *command: calls.append(command))
    run = project / "runs/tiny"
    jobs = {"run": slurm_submit._place(run), "jobs": {"teacher": {"id": "17"}}}
    (run / "slurm").mkdir()
    (run / "slurm/jobs.json").write_text(json.dumps(jobs))
    shutil.copytree(run, project / "runs/copy")
    slurm_submit.cancel(project / "runs/copy")
    assert calls == [] and f"its jobs are those of {run}" in capsys.readouterr().out
    run.rename(project / "runs/renamed")
    slurm_submit.cancel(project / "runs/renamed")
    assert calls == [("scancel", "17")]
    # Restored in its old place.
    shutil.copytree(project / "runs/copy", run)
    assert slurm_submit.read_submitted(run) == jobs["jobs"]
    # What an earlier version wrote names no folder.
    (run / "slurm/jobs.json").write_text(json.dumps({"jobs": jobs["jobs"]}))
    shutil.move(run, project / "x")
    assert slurm_submit.read_submitted(project / "x") == jobs["jobs"]


def test_where_a_verifier_lies_is_no_part_of_what_it_is(tmp_path):
    def lines(verifier: str, now: str) -> list[str]:
        (tmp_path / verifier.replace("/", "-")).mkdir()
        write_manifest(tmp_path / verifier.replace("/", "-"), "select", {"verifier": verifier}, {})
        manifest = read_manifest(tmp_path / verifier.replace("/", "-"))
        return differences(manifest, "select", {"verifier": now}, {})

    assert lines("python:runs/a/prepare/task.py:score", "python:runs/b/prepare/task.py:score") == []
    assert lines("python:task.py:score", "python:/x/task.py:score") == []
    assert lines("python:a/task.py:score", "python:a/task.py:other") != []
    assert lines("python:b.task:score", "python:a.task:score") != []
