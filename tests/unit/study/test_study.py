"""The study's bookkeeping: shared folders, resuming, tuning, paired verdicts, and a page made of known figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STUDY = Path(__file__).parents[3] / "examples/study"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The study's modules, which are scripts beside each other."""
    import importlib

    names = ("graph", "arms", "sections", "figures", "tables", "plots", "report", "run")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(STUDY))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(STUDY))
        for name in names:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]


def _all_sections(modules: dict[str, ModuleType], root: Path) -> Any:
    study = modules["sections"].Study(modules["graph"].Graph(root))
    modules["sections"].tuning(study)
    chosen = {method.name: method.grid[-1] for method in modules["sections"].METHODS}
    modules["run"].build(study, modules["run"].SECTIONS, [1, 2, 3], [1, 2, 3], chosen)
    return study


def test_arms_share_what_they_have_in_common(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    study = _all_sections(modules, tmp_path)
    labels = [job.label for job in study.graph.jobs.values()]
    main = [label for label in labels if label.startswith("n3-drop0.4-epochs7/seed-1 ")]
    assert sum(label.endswith(" base") for label in main) == 1
    assert sum(label.endswith(" rollouts-64p") for label in main) == 1
    assert sum(label.endswith(" ce") for label in main) == 5  # one for each number of prompts, and for rounds 2 and 3


def test_every_input_is_made_by_a_job(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    study = _all_sections(modules, tmp_path)
    for job in study.graph.jobs.values():
        if job.command != "prepare":
            makers = {path for other in study.graph.waits_for(job) for path in [other.output]}
            assert all(any(path.is_relative_to(m) for m in makers) for path in job.inputs), job.label


def test_every_method_is_tuned_over_as_many_settings(modules: dict[str, ModuleType]) -> None:
    assert {len(method.grid) for method in modules["sections"].METHODS} == {6}


def test_folder_depends_on_what_is_done_and_not_on_how(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    def folder(root: Path, run_flags: dict[str, object], **flags: object) -> str:
        graph = modules["graph"].Graph(root)
        return graph.add("f", "sample", flags, {"model": root / "m"}, run_flags=run_flags).name

    assert folder(tmp_path / "a", {}, x=1, y=2) == folder(tmp_path / "b", {"batch_size": 3}, y=2, x=1)
    assert folder(tmp_path, {}, x=1) != folder(tmp_path, {}, x=2)


def test_graph_runs_in_order_keeps_what_is_done_and_stops_at_an_error(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_module = modules["graph"]
    ran: list[str] = []

    class Worker:
        """Runs a job at once, in this process."""

        job = None

        def start(self, job: Any) -> None:
            self.job = job

        def poll(self) -> tuple[Any, float, str] | None:
            job, self.job = self.job, None
            if job is None:
                return None
            ran.append(job.label)
            if "bad" in job.label:
                return job, 0.0, "it failed"
            job.output.mkdir(parents=True)
            (job.output / "manifest.json").write_text("{}")
            return job, 0.0, ""

        def end(self) -> None:
            pass

    monkeypatch.setattr(graph_module, "_Worker", Worker)

    def chain(bad: bool) -> Any:
        graph = graph_module.Graph(tmp_path)
        first = graph.add("f", "import", {}, label="first")
        second = graph.add("f", "sample", {"bad": bad}, {"model": first / "hf"}, label="bad" if bad else "good")
        graph.add("f", "evaluate", {}, {"model": second}, label="third")
        return graph

    with pytest.raises(SystemExit, match="(?s)bad failed.*it failed"):
        graph_module.run_graph(chain(bad=True), 2, lambda line: None)
    assert ran == ["f first", "f bad"]
    ran.clear()
    graph_module.run_graph(chain(bad=False), 2, lambda line: None)
    assert ran == ["f good", "f third"]


def test_a_worker_reports_a_command_that_fails(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    graph = modules["graph"].Graph(tmp_path)
    graph.add("f", "import", {}, {"hf": tmp_path / "missing"}, label="import")
    with pytest.raises(SystemExit, match="(?s)import failed; log in .*missing"):
        modules["graph"].run_graph(graph, 1, lambda line: None)


def test_tuning_takes_the_most_accurate_setting(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    record = modules["sections"].Record
    records = []
    for method in modules["sections"].METHODS:
        for i, config in enumerate(method.grid):
            file = tmp_path / f"{method.name}-{i}.json"
            file.write_text(json.dumps({"metrics": {"accuracy_sampled": 0.5 - abs(i - 2) / 10}}))
            records.append(record("tuning", method.name, f"{method.name}-{i}", 101, file, config))
    assert modules["run"].choose(records) == {m.name: dict(m.grid[2]) for m in modules["sections"].METHODS}
    records[0].file.unlink()
    with pytest.raises(SystemExit, match="erpd_projection"):
        modules["run"].choose([r for r in records if r.setting != "erpd_projection"])


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([0.8, 0.82, 0.81], [0.5, 0.7, 0.6], "ahead"),
        ([0.5, 0.9, 0.7], [0.7, 0.7, 0.7], "level"),
        ([0.5, 0.51, 0.49], [0.7, 0.71, 0.69], "behind"),
        ([0.5, 0.51], [0.7, 0.71], "too few seeds"),
    ],
)
def test_verdict(modules: dict[str, ModuleType], left: list[float], right: list[float], expected: str) -> None:
    figures = modules["figures"]
    gap = figures.difference(dict(enumerate(left)), dict(enumerate(right)))
    assert figures.verdict(gap) == expected


def test_difference_is_paired_by_seed(modules: dict[str, ModuleType]) -> None:
    gap = modules["figures"].difference({1: 0.5, 2: 0.9, 3: 9.0}, {2: 0.8, 1: 0.4, 4: 0.0})
    assert gap.mean == pytest.approx(0.1)
    assert gap.count == 2
    assert gap.error == pytest.approx(0.0, abs=1e-12)


def _rows(study: Any, accuracy: Callable[[Any], float], kl: Callable[[Any], float]) -> list[dict[str, Any]]:
    rows = []
    for record in study.records:
        value = accuracy(record) + 0.001 * math.sin(record.seed + len(rows))
        metrics = {"accuracy_sampled": value, "accuracy_greedy": value, "kl_per_sequence": kl(record), "entropy": 0.1}
        row = {"section": record.section, "setting": record.setting, "arm": record.arm, "seed": record.seed}
        rows.append({**row, "config": dict(record.config), "metrics": metrics})
    return rows


def test_page_says_what_the_figures_say(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    study = _all_sections(modules, tmp_path / "runs")

    def accuracy(record: Any) -> float:
        if record.arm == "base":
            return 0.4
        if record.section == "stage1":  # everything peaks at 8 epochs
            return 0.6 - 0.002 * abs(record.config["epochs"] - 8)
        if record.section == "axes" and record.setting == "16p":
            return 0.3 if record.arm.startswith("erpd") else 0.5
        return 0.7 if record.arm.startswith(("erpd", "student")) or record.section == "signals" else 0.5

    def kl(record: Any) -> float:
        return 0.5 if record.section != "stage1" else 2.0

    text = modules["report"].write_report(_rows(study, accuracy, kl), tmp_path / "study.md").read_text()
    assert text.count("**The claim held here**") == 3  # 1, 3 and 4
    assert "does not cure the drift: **held in part**" in text
    assert "0 of 4 penalties lower the ceiling and 0 raise it;\n4 of 4 still end below their own best" in text
    assert "It is behind the best direct method on the same rollouts with: 16 prompts.\n" in text
    assert "It is level with the best direct method on the same rollouts with: nothing." in text
    for image in ("stage1", "frontier", "axes", "rounds"):
        assert (tmp_path / f"images/study-{image}.png").stat().st_size > 10_000


def test_page_of_a_study_that_has_hardly_begun(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    study = _all_sections(modules, tmp_path / "runs")
    rows = [row for row in _rows(study, lambda r: 0.5, lambda r: 1.0) if row["section"] == "tuning"]
    text = modules["report"].write_report(rows, tmp_path / "study.md").read_text()
    assert "## Claim 1" not in text and "## Rounds" not in text
