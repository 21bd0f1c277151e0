"""Lines on how a stage went."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_erpd.manifest import METRICS, verify_manifest, write_manifest
from megatron_erpd.progress import StepLines, read_json_lines


def test_numbers_are_kept_under_the_stages_name(tmp_path: Path) -> None:
    lines = StepLines(tmp_path / METRICS, "sample")
    lines.add({"responses": 3, "word": "text", "missing": None})
    lines.add({"reward_mean": 0.25})
    first, second = read_json_lines(tmp_path / METRICS)
    assert {**first, "seconds": 0} == {"iteration": 1, "seconds": 0, "sample/responses": 3}
    assert {**second, "seconds": 0} == {"iteration": 2, "seconds": 0, "sample/reward_mean": 0.25}
    assert 0 <= first["seconds"] <= second["seconds"]


def test_an_interrupted_stage_goes_on_counting(tmp_path: Path) -> None:
    StepLines(tmp_path / METRICS, "sample").add({"responses": 3})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"iteration": 2, "samp')
    StepLines(tmp_path / METRICS, "sample").add({"responses": 5})
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(row["iteration"], row["sample/responses"]) for row in rows] == [(1, 3), (2, 5)]


def test_they_are_no_part_of_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "slice").mkdir()
    (tmp_path / "slice/part").write_text("content")
    before = write_manifest(tmp_path, "precompute", {}, {})
    StepLines(tmp_path / METRICS, "precompute/base").add({"tokens": 1})
    StepLines(tmp_path / "slice" / METRICS, "precompute/base").add({"tokens": 1})
    assert verify_manifest(tmp_path).digest == before.digest
    assert write_manifest(tmp_path, "precompute", {}, {}).digest == before.digest
