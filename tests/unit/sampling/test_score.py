"""Rewards apart from the rollouts: a verifier that changed rescores, and nothing else is made anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_erpd.commands import rollouts as commands
from megatron_erpd.data.rewards import with_rewards
from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.errors import RolloutError, StageError
from megatron_erpd.manifest import read_manifest, verify_manifest
from megatron_erpd.sampling import parts, score
from megatron_erpd.sampling.inputs import input_digests

THRESHOLD = """
SHORT = {short}

def score(record, response):
    if record["answer"] == "refused":
        return None
    if record["answer"] == "raises":
        raise RuntimeError("no")
    return float(len(response) > SHORT) + (record["answer"] == "100")
"""
ANSWERS = ["1", "22", "3", "4", "refused"]


class Task:
    """Five prompts in three part files, two rollouts each, and their verifier."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.prompts, self.verifier = folder / "prompts.jsonl", folder / "verifier.py"
        self.rollouts = folder / "rollouts"
        self.answer(ANSWERS)
        self.judge(0)

    def answer(self, answers: list[str]) -> None:
        records = [{"prompt": f"{n}+1=", "answer": answer} for n, answer in enumerate(answers)]
        self.prompts.write_text("".join(json.dumps(record) + "\n" for record in records))

    def judge(self, short: int, edit: Callable[[str], str] = str) -> None:
        self.verifier.write_text(edit(THRESHOLD.format(short=short)))

    @property
    def flags(self) -> list[str]:
        return ["--prompts", str(self.prompts), "--verifier", f"python:{self.verifier}:score"]

    def sample(self, *flags: str) -> None:
        sizes = ["--num-rollouts", "2", "--max-new-tokens", "4", "--num-prompts", str(len(ANSWERS)), *flags]
        commands.sample(["--model", str(self.model), *self.flags, *sizes, "--output", str(self.rollouts)])

    def score(self, name: str) -> dict[str, Any]:
        commands.score(["--rollouts", str(self.rollouts), *self.flags, "--output", str(self.folder / name)])
        return json.loads((self.folder / name / "report.json").read_text())


@pytest.fixture
def task(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(parts, "PROMPTS_PER_PART", 2)
    made = Task(tmp_path, model_folder)
    made.sample()
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verifiers that were started."""
    found: list[str] = []
    original = score.Verifier

    def start(spec: str, workers: int | None) -> Any:
        found.append(spec)
        return original(spec, workers)

    monkeypatch.setattr(score, "Verifier", start)
    return found


def training_inputs(task: Task, rewards: str) -> dict[str, str]:
    return input_digests("train-teacher", {"rollouts": task.rollouts, "rewards": task.folder / rewards})


def test_the_same_verifier_is_not_asked_again(task: Task, started: list[str]) -> None:
    task.judge(0, lambda code: code.replace("SHORT = 0", "SHORT = 0  # characters"))
    task.verifier = task.verifier.rename(task.folder / "moved.py")
    report = task.score("rewards")
    assert (report["asked"], report["changed"], started) == (0, 0, [])
    assert report["num_rollouts"] == 10 and report["unverified"] == 2
    rollouts = read_rollouts(task.rollouts)
    again = with_rewards(rollouts, task.rollouts, task.folder / "rewards")
    np.testing.assert_array_equal(again.rewards, rollouts.rewards)
    assert again.reward_status == rollouts.reward_status
    # A training on them is the one on the rollouts alone.
    assert training_inputs(task, "rewards") == input_digests("train-teacher", {"rollouts": task.rollouts})
    names = [path.name for path in sorted((task.folder / "rewards").glob("*.parquet"))]
    assert names == [f"rewards-0000{n}-of-00003.parquet" for n in range(3)]
    assert set(verify_manifest(task.folder / "rewards").files) == {*names, "report.json", "content.json"}


@pytest.mark.parametrize(
    "edit",
    [
        lambda code: code.replace("SHORT", "LONG"),
        lambda code: code.replace("return None", "return"),
        lambda code: code + "\ndef other(record, response):\n    return 0\n",
    ],
)
def test_another_verifier_with_the_same_rewards_changes_nothing_else(task: Task, edit: Callable[[str], str]) -> None:
    task.judge(0, edit)
    report = task.score("rewards")
    assert (report["asked"], report["changed"]) == (10, 0)
    assert training_inputs(task, "rewards") == input_digests("train-teacher", {"rollouts": task.rollouts})


def test_changed_rewards_are_an_input_by_what_they_are(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    task.judge(99)
    report = task.score("rewards")
    before = read_rollouts(task.rollouts)
    expected = np.where(np.isnan(before.rewards), np.nan, 0).astype(np.float32)
    changed = int(np.nansum(before.rewards != expected) - np.isnan(before.rewards).sum())
    assert report["asked"] == 10 and report["changed"] == changed > 0
    printed = capsys.readouterr().out
    assert f"rescored: {changed} of 10 rewards changed" in printed
    (warning,) = verify_manifest(task.folder / "rewards").summary["warnings"]
    assert warning.startswith("all 8 rewards are 0") and f"warning: {warning}" in printed
    # What the rollouts brought with them is not what a run trains on: it is said of no artifact.
    kept = verify_manifest(task.rollouts).summary.get("warnings", [])
    assert not any("rewards" in text for text in kept)
    after = with_rewards(before, task.rollouts, task.folder / "rewards")
    np.testing.assert_array_equal(after.rewards, expected)
    assert after.select([8, 0]).reward_status == ["unverified", "scored"]
    assert after.record(0).reward == 0 and after.record(8).reward is None
    digests = training_inputs(task, "rewards")
    assert set(digests) == {"rollouts", "rewards"}
    task.judge(98)  # other code, the same rewards
    task.score("again")
    assert training_inputs(task, "again") == digests
    assert read_manifest(task.folder / "again").digest != read_manifest(task.folder / "rewards").digest
    task.judge(99, lambda code: code.replace('"refused"', '"accepted"'))  # a verdict where there was none
    task.score("more")
    assert training_inputs(task, "more")["rewards"] != digests["rewards"]


def test_corrected_answers_are_scored_where_they_changed(task: Task, started: list[str]) -> None:
    sampled = input_digests("sample", {"prompts": task.prompts})
    task.answer(["1", "22", "3", "100", "refused"])
    assert input_digests("sample", {"prompts": task.prompts}) == sampled
    report = task.score("rewards")
    assert report["asked"] == 4, "the part file with the prompt of the answer"
    rewards = with_rewards(read_rollouts(task.rollouts), task.rollouts, task.folder / "rewards").rewards
    np.testing.assert_array_equal(rewards[6:8], read_rollouts(task.rollouts).rewards[6:8] + 1)
    assert report["changed"] == 2 and len(started) == 1


def test_an_interrupted_scoring_goes_on(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    task.judge(1)
    whole = task.score("whole")

    class Killed(BaseException):
        pass

    asked: list[int] = []
    original = score.Scorer.__call__

    def count(self: Any, *given: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:  # of part files, the first of which has four rollouts
            raise Killed
        return original(self, *given)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(score.Scorer, "__call__", count)
        task.score("cut")
    report = task.score("cut")
    assert report == {**whole, "asked": 6}
    for file in (task.folder / "whole").glob("*.parquet"):
        assert pq.read_table(file).equals(pq.read_table(task.folder / "cut" / file.name))


def test_errors_are_kept_and_a_verifier_that_always_fails_ends_the_stage(task: Task) -> None:
    task.answer(["raises", "22", "3", "4", "refused"])
    report = task.score("rewards")
    assert report["verifier"]["errors"] == 2 and report["verifier"]["first_error"] == "RuntimeError: no"
    table = pq.read_table(sorted((task.folder / "rewards").glob("*.parquet"))[0])
    assert table.column("verifier_error").to_pylist() == ["RuntimeError: no"] * 2 + [None] * 2
    assert table.column("reward_status").to_pylist() == ["unverified"] * 2 + ["scored"] * 2
    # Its prompts being what they are, the same verifier works again another time.
    gone = task.folder / "gone"
    task.judge(0, lambda code: code.replace("SHORT = 0", f"open({str(gone)!r})"))
    task.judge(
        0,
        lambda code: code.replace(
            "def score(record, response):", f"def score(record, response):\n    open({str(gone)!r})"
        ),
    )
    for _ in range(2):
        with pytest.raises(StageError, match="failed on all 10 responses, first with: FileNotFoundError"):
            task.score("failed")
    gone.touch()
    assert task.score("failed")["verifier"]["errors"] == 2


def test_sampling_goes_on_with_a_corrected_verifier(task: Task, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "other").mkdir()
    broken = Task(tmp_path / "other", model_folder)
    broken.judge(
        0, lambda code: code.replace("def score(record, response):", "def score(record, response):\n    1 / 0")
    )
    for _ in range(2):
        with pytest.raises(StageError, match="failed on all 10 responses, first with: ZeroDivisionError"):
            broken.sample()
    before = read_rollouts(broken.rollouts)
    assert np.isnan(before.rewards).all()
    broken.judge(0)
    broken.sample()
    after, whole = read_rollouts(broken.rollouts), read_rollouts(task.rollouts)
    assert read_manifest(broken.rollouts).summary["parts_resumed"] == 3
    assert after.sample_ids == before.sample_ids == whole.sample_ids
    np.testing.assert_array_equal(after.rewards, whole.rewards)
    for file in task.rollouts.glob("*.parquet"):
        assert file.read_bytes() == (broken.rollouts / file.name).read_bytes()


def test_rewards_of_other_rollouts_are_refused(task: Task, tmp_path: Path) -> None:
    task.score("rewards")
    first = task.rollouts
    task.rollouts = task.folder / "others"
    task.sample("--seed", "9")
    others = read_rollouts(task.rollouts)
    with pytest.raises(StageError, match="rewards: holds the rewards of other rollouts than .*others; score these"):
        with_rewards(others, task.rollouts, task.folder / "rewards")
    with pytest.raises(StageError, match="was written by `sample`; give what `megatron-erpd score` wrote"):
        with_rewards(others, task.rollouts, first)
    with pytest.raises(StageError, match="has not finished"):
        with_rewards(others, task.rollouts, tmp_path)
    (task.folder / "rewards/rewards-00001-of-00003.parquet").unlink()
    with pytest.raises(RolloutError, match="holds no reward of 4 of 10 rollouts"):
        with_rewards(read_rollouts(first), first, task.folder / "rewards")


def test_prompts_that_the_rollouts_are_not_of_are_refused(task: Task) -> None:
    records = [{"prompt": f"{n}+2=", "answer": "1"} for n in range(5)]
    task.prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RolloutError, match=r"row 0 .*is not a rollout of prompt 0 of the prompts"):
        task.score("rewards")
    task.prompts.write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(RolloutError, match="has rollouts of prompt 1, and there are 1 prompts"):
        task.score("other")


def test_imported_rollouts_are_not_scored(task: Task) -> None:
    from megatron_erpd.manifest import begin_artifact, finish_artifact

    begin_artifact(task.folder / "imported", "import-rollouts", {}, {})
    finish_artifact(task.folder / "imported")
    task.rollouts = task.folder / "imported"
    with pytest.raises(
        StageError, match="was written by `import-rollouts`, and only rollouts of `megatron-erpd sample`"
    ):
        task.score("rewards")
