"""What is read from a run's folder, and what happens when pieces of it are missing or broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.report.collect import PolicyFigures, collect_run, summarise, write_summary
from tests.unit.report.synthetic_run import evaluations, finish, make_run


def test_summary_holds_every_policy_with_its_gain_per_nat(tmp_path: Path) -> None:
    run = collect_run(make_run(tmp_path / "run"))
    summary = write_summary(run, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    policies = summary["policies"]
    assert list(policies)[:5] == ["base", "teacher@8", "teacher@16", "teacher", "unlearned"]
    assert policies["student"]["reward_gained"] == pytest.approx(0.35)
    assert policies["student"]["kl_efficiency"] == pytest.approx(0.35 / 0.8)
    assert policies["student"]["accuracy_sampled_se"] == 0.011
    assert "num_rollouts" not in policies["student"], "what is null wasn't measured"
    assert "kl_efficiency" not in policies["base"]
    assert summary["stages"]["round-01/teacher"]["seconds"] == 61.0
    assert summary["stages"]["round-01/controls/direct"]["loss"] == 0.123456


def test_no_efficiency_where_the_kl_cannot_be_told_from_zero(tmp_path: Path) -> None:
    folder = tmp_path / "round-01" / "evaluation"
    evaluations(folder)
    record = json.loads((folder / "student.json").read_text())
    metrics = record["metrics"] | {"kl_per_sequence": 0.01, "kl_per_sequence_se": 0.02}
    (folder / "student.json").write_text(json.dumps(record | {"metrics": metrics}))
    student = summarise(collect_run(tmp_path))["policies"]["student"]
    assert "kl_efficiency" not in student and student["reward_gained"] == pytest.approx(0.35)


def test_later_rounds_are_named(tmp_path: Path) -> None:
    for number, name in enumerate(("round-01", "round-02")):
        evaluations(tmp_path / name / "evaluation", before=0.1 * number)
    finish(tmp_path / "round-00" / "warm-up", "train-teacher", 5.0)
    (tmp_path / "round-03").mkdir()
    summary = summarise(collect_run(tmp_path))
    policies = summary["policies"]
    assert "student" in policies and "round-02/student" in policies and "round-01/student" not in policies
    assert [round_["name"] for round_ in summary["rounds"]] == ["round-01", "round-02"]
    for round_, name in zip(summary["rounds"], ("student", "round-02/student"), strict=True):
        assert round_["policies"]["student"] == policies[name]
    assert policies["round-02/student"]["kl_from_origin_per_sequence"] == pytest.approx(0.9)
    # A round's gain is over its own base.
    assert policies["round-02/student"]["reward_gained"] == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("name", "role", "family", "iteration"),
    [
        ("base", "base", "base", None),
        ("teacher@32", "teacher", "teacher", 32),
        ("student", "student", "student", None),
        ("no-teacher", "control", "no-teacher", None),
    ],
)
def test_names_say_what_a_policy_is(name: str, role: str, family: str, iteration: int | None) -> None:
    policy = PolicyFigures(name, {})
    assert (policy.role, policy.family, policy.iteration) == (role, family, iteration)


def test_further_teachers_are_teachers(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    round_ = folder / "round-01"
    (round_ / "teachers").mkdir()
    shutil.move(round_ / "controls" / "direct", round_ / "teachers" / "direct")
    for name in ("direct@8", "sequence-advantage"):
        shutil.copy(round_ / "evaluation" / "direct.json", round_ / "evaluation" / f"{name}.json")
    collected = collect_run(folder).rounds[0]
    roles = {p.name: p.role for p in collected.policies}
    assert roles["direct"] == roles["direct@8"] == "teacher" and roles["sequence-advantage"] == "control"
    # The derived figures and the stage's own record are there too.
    direct = collected.policy("direct")
    assert direct and "reward_gained" in direct.metrics
    assert direct.metrics["pass_at_1"] == direct.metrics["accuracy_sampled"] < direct.metrics["pass_at_4"]
    assert "majority" not in direct.metrics  # it wasn't measured
    assert "round-01/teachers/direct" in {s.name for s in collected.stages}
    assert "direct" in {c.name for c in collected.curves}


def test_a_step_cut_short_at_the_end_is_left_out_but_not_one_in_the_middle(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    teacher = next(c for c in collect_run(folder).rounds[0].curves if c.name == "teacher")
    steps, values = teacher.series("missing", "policy_base_kl")
    assert steps == list(range(1, 65)) and len(values) == 64 and teacher.stage == 1
    path = folder / "round-01" / "student" / "metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(StageError, match=r"student/metrics\.jsonl: line 1 "):
        collect_run(folder)


def test_a_broken_evaluation_is_named(tmp_path: Path) -> None:
    evaluations(tmp_path / "round-01" / "evaluation")
    (tmp_path / "round-01" / "evaluation" / "student.json").write_text("[]")
    with pytest.raises(StageError, match=r"student\.json: not an evaluation"):
        collect_run(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no round-01"):
        collect_run(tmp_path)
    with pytest.raises(StageError, match="no such folder"):
        collect_run(tmp_path / "elsewhere")


def test_missing_pieces_leave_the_others(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for name in ("cache", "controls", "unlearned"):
        shutil.rmtree(folder / "round-01" / name)
    (folder / "round-01" / "evaluation" / "base.json").unlink()
    (folder / "recipe.yaml").unlink()
    run = collect_run(folder)
    assert run.recipe == "" and run.rounds[0].target == {}
    assert {c.name for c in run.rounds[0].curves} == {"teacher", "student"}
    assert "reward_gained" not in summarise(run)["policies"]["student"]


def test_lines_of_what_does_not_train_are_no_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "round-01/rollouts/metrics.jsonl").write_text('{"iteration": 1, "seconds": 2.0, "sample/responses": 8}\n')
    names = {curve.name for curve in collect_run(run).rounds[0].curves}
    assert "rollouts" not in names and {"teacher", "student", "direct"} <= names
