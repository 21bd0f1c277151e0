"""The report while a run is going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_erpd.launch import interim_report
from megatron_erpd.launch.interim_report import InterimReport
from megatron_erpd.manifest import MANIFEST, write_manifest
from megatron_erpd.recipe.stages import Stage
from tests.unit.fake_request import fake_stage


def stage(root: Path, name: str, command: str = "train-teacher") -> Stage:
    output = root / ("report" if command == "report" else f"round-01/{name}")
    output.mkdir(parents=True, exist_ok=True)
    write_manifest(output, command, {}, {}, {"seconds": 1.5})
    return fake_stage(name, command, output)


def stages_of(root: Path) -> set[str]:
    return set(json.loads((root / "report/summary.json").read_text())["stages"])


def test_figures_after_every_stage_and_the_page_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refresh = InterimReport(tmp_path)
    assert refresh(stage(tmp_path, "teacher")) is None
    page = tmp_path / "report/index.html"
    first = page.read_text()
    assert stages_of(tmp_path) == {"round-01/teacher"}
    assert refresh(stage(tmp_path, "student", "distill")) is None
    assert stages_of(tmp_path) == {"round-01/teacher", "round-01/student"}
    assert page.read_text() == first and "round-01/student" not in first
    monkeypatch.setattr(interim_report, "PAGE_SECONDS", 0.0)
    assert refresh(stage(tmp_path, "more")) is None
    assert "round-01/student" in page.read_text()


def test_a_finished_report_is_no_longer_one(tmp_path: Path) -> None:
    report = stage(tmp_path, "report", "report")
    assert InterimReport(tmp_path)(report) is None
    assert (tmp_path / "report" / MANIFEST).is_file()
    assert InterimReport(tmp_path)(stage(tmp_path, "teacher")) is None
    assert not (tmp_path / "report" / MANIFEST).exists()


def test_what_can_not_be_read_is_told_and_ends_nothing(tmp_path: Path) -> None:
    teacher = stage(tmp_path, "teacher")
    (tmp_path / "round-01/teacher" / MANIFEST).write_text("{")
    note = InterimReport(tmp_path)(teacher)
    assert note and "round-01/teacher" in note and f"megatron-erpd report {tmp_path}" in note
