"""A training's metrics on disk: a line for each step, whenever it is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_erpd.files import write_json
from megatron_erpd.launch.processes import last_step
from megatron_erpd.progress import StepLines
from megatron_erpd.training.metrics import SAVE_TIME, JsonLinesWriter


class Board:
    """In the place of TensorBoard's writer."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_in_the_file_before_the_next_one_begins(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path, Board())
    for step in (1, 2):
        writer.add_scalar("stage1/loss", 0.5 / step, step)
        writer.add_scalar("batch-size", 8.0, step)  # not kept
        writer.add_scalar("grad-norm", 2.0, step)
    # Killed now, while the checkpoint of step 2 is saved.
    expected = [{"iteration": step, "stage1/loss": 0.5 / step, "grad-norm": 2.0} for step in (1, 2)]
    assert rows(path) == expected

    again = JsonLinesWriter(path, Board())
    again.add_scalar("stage1/loss", 0.125, 3)
    again.flush()
    assert rows(path) == [*expected, {"iteration": 3, "stage1/loss": 0.125}]


def test_the_time_of_a_save_is_in_the_line_of_its_step(tmp_path: Path) -> None:
    path, taken = tmp_path / "metrics.jsonl", 0.0
    writer = JsonLinesWriter(path, Board(), save_seconds=lambda: taken)
    for step in (1, 2, 3):
        writer.add_scalar("stage1/loss", 0.5, step)
        if step > 1:
            taken += 2.0 * step
        writer.flush()  # as Megatron does before its last save
    taken += 1.0
    writer.end_step()
    assert rows(path) == [
        {"iteration": 1, "stage1/loss": 0.5},
        {"iteration": 2, "stage1/loss": 0.5, SAVE_TIME: 4.0},
        {"iteration": 3, "stage1/loss": 0.5, SAVE_TIME: 7.0},
    ]


def test_steps_that_are_done_again_replace_what_was_written_of_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "a/b": 1.0}\n{"iteration": 2, "a/b": 2.0}\n{"iteration": 3, "a/')
    writer = JsonLinesWriter(path, Board())
    writer.add_scalar("a/b", 4.0, 2)
    writer.add_scalar("a/b", 5.0, 3)
    writer.flush()
    assert rows(path) == [{"iteration": i, "a/b": value} for i, value in ((1, 1.0), (2, 4.0), (3, 5.0))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_null_in_every_metrics_file(tmp_path: Path, value: float) -> None:
    """JSON has no NaN: another program's parser would stop at the line."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path, Board())
    writer.add_scalar("stage1/loss", value, 1)
    writer.add_scalar("stage1/entropy", 0.5, 1)
    writer.flush()
    StepLines(path, "evaluation").add({"accuracy": value, "truncated": 0.25})
    write_json(tmp_path / "policy.json", {"metrics": {"kl": [value, (value, 1.5)]}})
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines[0] == {"iteration": 1, "stage1/loss": None, "stage1/entropy": 0.5}
    assert (lines[1]["evaluation/accuracy"], lines[1]["evaluation/truncated"]) == (None, 0.25)
    kept = json.loads((tmp_path / "policy.json").read_text(), parse_constant=refuse)
    assert kept == {"metrics": {"kl": [None, [None, 1.5]]}}
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert last_step(path) == "iteration 1, entropy 0.5"
