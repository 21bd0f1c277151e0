"""A command's last words: what it wrote, and its main figures."""

from __future__ import annotations

import json

import pytest

from megatron_erpd.commands import cli
from megatron_erpd.errors import StageError
from megatron_erpd.launch.program import LAUNCHED, run_command
from megatron_erpd.launch.results import output_folders
from megatron_erpd.manifest import begin_artifact, finish_artifact
from megatron_erpd.slices import Slice


def make(folder, summary=None):
    begin_artifact(folder, "sample", {}, {})
    (folder / "data").write_bytes(b"x" * 1234)
    finish_artifact(folder, summary)


def test_a_command_that_leaves_an_artifact_ends_with_a_line_on_it(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "a"
    summary = {"num_rollouts": 1024, "reward_mean": 0.81256, "write_seconds": 3.0, "eta": {"mean": 1.0, "max": 2.0}}
    summary |= {
        "warnings": ["few prompts"],
        "accuracy": {"base": 0.5, "odd": None},
        "stopped": "KL above 0.3",
        "seconds": 61.0,
        "starts": 2,
    }
    argv = ["--output", str(folder), "--", "--output", "x"]
    run_command(lambda argv: make(folder, summary), argv)
    out = capsys.readouterr().out
    assert out == (
        f"wrote {folder}: num rollouts 1,024, reward mean 0.8126, eta 1, accuracy: base 0.5, stopped KL above 0.3; "
        "1 file, 1.2 kB, in 1 min 01 s of 2 starts\n"
    )
    # What was there before is no result of this command; one that was launched has said it itself.
    run_command(lambda argv: None, argv)
    run_command(lambda argv: (make(tmp_path / "b"), LAUNCHED)[1], ["--output", str(tmp_path / "b")])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run_command(lambda argv: make(tmp_path / "c"), ["--output", str(tmp_path / "c")])
    assert capsys.readouterr().out == ""


def test_a_training_says_its_last_step(tmp_path, capsys):
    def train(argv):
        begin_artifact(tmp_path, "train-teacher", {}, {})
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 7, "stage1/loss": 0.25}) + "\n")
        finish_artifact(tmp_path, {"iterations": 7})

    run_command(train, ["--output", str(tmp_path)])
    assert f"wrote {tmp_path}: iterations 7, last iteration 7, loss 0.25; 0 files, 0 B, in " in capsys.readouterr().out


def test_a_slice_s_artifact_lies_in_the_output(tmp_path, capsys):
    part = tmp_path / Slice(2, 3).hidden_folder
    run_command(lambda argv: make(part), ["--output", str(tmp_path), "--slice", "2/3"])
    assert f"wrote {part}: " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--output"], ["--output", "a", "--slice", "x"], ["--num-rollouts", "3"]])
def test_arguments_that_name_no_folder(argv):
    assert output_folders(argv) == []


def test_an_error_is_the_last_word(tmp_path, capsys):
    def fail(argv):
        make(tmp_path / "a")
        raise StageError("no")

    with pytest.raises(SystemExit):
        run_command(fail, ["--output", str(tmp_path / "a")])
    assert capsys.readouterr() == ("", "error: no\n")


def test_verify_ends_with_its_figures(tmp_path, capsys):
    make(tmp_path / "round-01/rollouts")
    make(tmp_path / "round-01/base")
    cli.main(["verify", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == "2 artifacts, all whole: 2 files, 2.5 kB"
