"""What a run looks like."""

from __future__ import annotations

import io
import json

from rich.console import Console

from megatron_erpd.launch.display import Display, Row, findings_lines, summary_table


def test_lines_without_a_terminal():
    out = io.StringIO()
    with Display("title", ["a", "b"], Console(file=out, width=200)) as display:
        display.update("a", "checking")
        display.update("a", "running", note="log in a.log")
        display.update("a", "running", 1.0, "iteration 1")  # too soon after the last line
        display.update("a", "done", 75.0)
        display.update("b", "kept", note="[red]run/b[/red]")
    assert out.getvalue().splitlines() == [
        "[a] running: log in a.log",
        "[a] done 1 min 15 s",
        "[b] kept: [red]run/b[/red]",
    ]


def test_a_table_on_a_terminal():
    out = io.StringIO()
    with Display("title", ["a"], Console(file=out, width=80, force_terminal=True)) as display:
        display.update("a", "running", 3.0, "iteration 7, loss 0.5")
        display.say("something that stays")
    assert "something that stays" in out.getvalue() and "iteration 7, loss 0.5" in out.getvalue()


def test_the_final_table(tmp_path):
    summary = tmp_path / "summary.json"
    policies = {
        "base": {"accuracy_sampled": 0.41, "accuracy_greedy": 0.67, "kl_per_sequence": 0.0},
        "student": {"accuracy_sampled": 0.79, "kl_per_sequence": 0.82, "kl_per_token": 0.1, "reverse_kl_data": None},
    }
    summary.write_text(json.dumps({"rounds": [{"name": "round-01", "policies": policies}]}))
    out = io.StringIO()
    Console(file=out, width=200).print(summary_table(summary))
    text = out.getvalue()
    assert "0.410" in text and "0.670" in text and "0.820" in text and "0.1000" in text
    assert text.count(" - ") >= 3
    assert "round-01" not in text and "1st base" not in text


def test_the_final_table_of_two_rounds(tmp_path):
    summary = tmp_path / "summary.json"
    rounds = [
        {"name": "round-01", "policies": {"student": {"accuracy_sampled": 0.61, "kl_from_origin_per_sequence": 0.3}}},
        {"name": "round-02", "policies": {"student": {"accuracy_sampled": 0.79, "kl_from_origin_per_sequence": 0.9}}},
    ]
    summary.write_text(json.dumps({"rounds": rounds}))
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(summary))
    lines = [line.split() for line in out.getvalue().splitlines()]
    rows = lines[lines.index(["round-01"]) :]
    assert [row[0] for row in rows] == ["round-01", "student", "round-02", "student"]
    assert rows[1][1:] == ["0.610", "-", "-", "-", "0.300", "-", "-", "-"]
    assert rows[3][1:] == ["0.790", "-", "-", "-", "0.900", "-", "-", "-"]
    assert "1st base" in out.getvalue()


def test_long_notes_leave_the_other_columns_their_room():
    display = Display("test", ["a stage"])
    display.rows["a stage"] = Row("running", 200.0, " ".join(["note"] * 40))
    console = Console(file=io.StringIO(), width=60)
    console.print(display.table(whole_notes=True))
    shown = console.file.getvalue()
    assert "a stage" in shown and "running" in shown and "3 min 20 s" in shown and shown.count("note") == 40


def test_verdicts_and_warnings_are_lines(tmp_path):
    summary = tmp_path / "summary.json"
    assert findings_lines(summary) == []
    summary.write_text(json.dumps({"rounds": []}))  # of the version before
    assert findings_lines(summary) == []
    warnings = [{"text": "18 of 24 [groups]", "stages": ["round-01/rollouts", "round-01/teacher"]}]
    summary.write_text(json.dumps({"findings": [{"text": "student better"}], "warnings": warnings}))
    lines = findings_lines(summary)
    assert lines == ["student better", "warning from round-01/rollouts, round-01/teacher: 18 of 24 [groups]"]
    out = io.StringIO()
    display = Display("title", ["a"], Console(file=out, width=40))
    display.notes = lines
    display.show()
    assert out.getvalue().splitlines()[-2:] == lines  # whole, however narrow the terminal
