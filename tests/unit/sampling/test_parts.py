"""Sampling shared by jobs: whatever they do and whenever they are killed, the artifact is that of one job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.commands import rollouts as commands
from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.manifest import MANIFEST, read_manifest, verify_manifest
from megatron_erpd.sampling import parts
from megatron_erpd.sampling import sample as stage

VERIFIER = """
def score(record, response):
    if record["answer"] == "3":
        raise RuntimeError("no")
    return None if record["answer"] == "4" else len(response) % 2
"""


@pytest.fixture(autouse=True)
def three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PROMPTS_PER_PART", 2)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five prompts, two of which are the same, and a verifier that fails on one."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "verifier.py").write_text(VERIFIER)
    records = [{"prompt": f"{n}+1=", "answer": str(n)} for n in (1, 22, 3, 4, 1)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--prompts", f"{folder}/prompts.jsonl", "--verifier", f"python:{folder}/verifier.py:score"]


@pytest.fixture
def sample(model_folder: Path, task: list[str]) -> Callable[..., None]:
    def run(output: Path, *flags: str) -> None:
        sizes = ["--num-rollouts", "3", "--max-new-tokens", "6", "--batch-size", "4"]
        commands.sample(["--model", str(model_folder), *task, *sizes, "--output", str(output), *flags])

    return run


@pytest.fixture
def whole(sample: Callable[..., None], tmp_path: Path) -> Path:
    sample(tmp_path / "whole")
    return tmp_path / "whole"


def assert_same(output: Path, whole: Path) -> None:
    """The same artifact, file by file, and nothing is left of slices."""
    assert verify_manifest(output).digest == verify_manifest(whole).digest
    assert len(read_manifest(whole).files) == 4
    for name in read_manifest(whole).files:
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


def no_engine(*given: Any) -> Any:
    raise AssertionError("something is sampled")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_slices_make_the_artifact_of_one_job(
    sample: Callable[..., None], whole: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sliced"
    for number in reversed(range(1, count + 1)):
        sample(output, "--slice", f"{number}/{count}")
    made = [path.name for folder in sorted(output.glob(".slice-*")) for path in sorted(folder.glob("*.parquet"))]
    assert made == sorted(path.name for path in whole.glob("*.parquet")) and not list(output.glob("*.parquet"))
    monkeypatch.setattr(stage, "make_engine", no_engine)
    sample(output, "--merge-slices")
    assert_same(output, whole)
    assert read_manifest(output).summary["slices"] == count
    assert json.loads((output / "report.json").read_text())["verifier"]["errors"] == 3


def test_without_links_parts_are_copied(
    sample: Callable[..., None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sliced"
    for part in ("1/2", "2/2"):
        sample(output, "--slice", part)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    sample(output, "--merge-slices")
    assert_same(output, whole)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["take_parts", "write_json", "finish_artifact", "remove_slices"])
def test_a_merge_that_is_killed_goes_on(
    sample: Callable[..., None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    output = tmp_path / "sliced"
    for part in ("1/2", "2/2"):
        sample(output, "--slice", part)
    home: Any = {"finish_artifact": commands, "remove_slices": parts}.get(where, stage)
    function = getattr(home, where)

    def kill(*given: Any, **options: Any) -> None:
        if where == "take_parts":  # with the first part alone
            names, folders, into = given
            function(names[:1], folders, into)
        elif where == "remove_slices":  # in the middle
            (output / ".slice-0001-of-0002" / MANIFEST).unlink()
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(home, where, kill)
        sample(output, "--merge-slices")
    assert (output / MANIFEST).is_file() == (where == "remove_slices")
    sample(output, "--merge-slices")
    assert_same(output, whole)
    with pytest.raises(StageError, match="already holds a finished artifact, the same one"):
        sample(output, "--merge-slices")


def test_slices_that_are_not_all_there(sample: Callable[..., None], tmp_path: Path) -> None:
    output = tmp_path / "sliced"
    with pytest.raises(StageError, match="holds no slices"):
        sample(output, "--merge-slices")
    sample(output, "--slice", "1/3")
    sample(output, "--slice", "3/3")
    with pytest.raises(StageError, match=r"1 of 3 slices aren't finished, the first is \.slice-0002-of-0003"):
        sample(output, "--merge-slices")
    with pytest.raises(StageError, match=r"holds slices of 3, --slice 2/2 asks for 2"):
        sample(output, "--slice", "2/2")
    with pytest.raises(StageError, match=r"(?s)begun with other settings.*\n  seed: 1 -> 2"):
        sample(output, "--slice", "2/3", "--seed", "2")
    with pytest.raises(StageError, match=r"slice-0003-of-0003: already holds a finished artifact, the same one"):
        sample(output, "--slice", "3/3")
    assert not list(output.glob("*.parquet"))


def test_a_slice_of_something_else_is_refused(sample: Callable[..., None], tmp_path: Path) -> None:
    output = tmp_path / "sliced"
    sample(output, "--slice", "1/2")
    sample(output, "--slice", "2/2")
    folder = output / ".slice-0002-of-0002"
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["checksum"]
    manifest["settings"]["seed"] = 9
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StageError, match=r"(?s)slice-0002-of-0002: was made from something else.*seed: 9 -> 1"):
        sample(output, "--merge-slices")
    manifest["settings"]["seed"] = 1
    manifest["files"]["report.json"]["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StageError, match=r"slice-0002-of-0002/report\.json: differs"):
        sample(output, "--merge-slices")


def test_more_slices_than_part_files(sample: Callable[..., None], tmp_path: Path) -> None:
    output = tmp_path / "sliced"
    with pytest.raises(RecipeError, match=r"--slice 4/4: 5 prompts make 3 part files of 2 .*; take at most 3 slices"):
        sample(output, "--slice", "4/4")
    assert not output.exists()


def test_one_job_takes_the_parts_of_slices_and_the_other_way_round(
    sample: Callable[..., None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sampled twice when a run goes on in another way than it was begun."""
    sampled: list[int] = []
    original = stage._sample_part

    def count(engine: Any, plan: Any, part: int, *given: Any) -> Any:
        sampled.append(part)
        if part == 2 and fails:
            raise Killed
        return original(engine, plan, part, *given)

    monkeypatch.setattr(stage, "_sample_part", count)
    fails = False
    sample(tmp_path / "one", "--slice", "1/2")
    sample(tmp_path / "one")
    assert_same(tmp_path / "one", whole)
    assert sampled == [0, 1, 2]
    fails = True
    del sampled[:]
    with pytest.raises(Killed):
        sample(tmp_path / "two")
    fails = False
    for flags in (("--slice", "2/2"), ("--slice", "1/2"), ("--merge-slices",)):
        sample(tmp_path / "two", *flags)
    assert_same(tmp_path / "two", whole)
    assert sampled == [0, 1, 2, 2]
