"""What is said of student and teacher, for figures of which the right words are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.evaluation.strength import SelectionResult
from megatron_erpd.manifest import Manifest
from megatron_erpd.report.collect import PolicyFigures, Round, Run, StageRecord, _with_efficiency
from megatron_erpd.report.findings import Finding, findings

PROMPTS = 200
BASE = {"accuracy_sampled": 0.4, "entropy": 0.5, "kl_per_sequence": 0.0, "truncated": 0.0, "num_prompts": PROMPTS}
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rollouts": ({}, {"num_groups": 24, "zero_variance_groups": 3}),
    "teacher": ({"learning_rate": 1e-4, "epochs": 8, "global_batch_size": 64, "max_kl": None}, {}),
    "cache": ({"delta": 0.5}, {}),
    "student": ({"learning_rate": 2e-4, "epochs": 4, "global_batch_size": 64, "form": "projection"}, {}),
}


def policy(name: str, gained: float, error: float | None = 0.02, **metrics: float) -> PolicyFigures:
    figures = {**BASE, "kl_per_sequence": 0.5, "accuracy_sampled": 0.4 + gained, "reward_gained": gained, **metrics}
    return PolicyFigures(name, figures if error is None else {**figures, "reward_gained_se": error})


def found(
    policies: list[PolicyFigures],
    stages: dict[str, tuple[dict[str, Any], dict[str, Any]]] | None = None,
    base: dict[str, float] | None = None,
    selection: SelectionResult | None = None,
    names: tuple[str, ...] = ("round-01",),
) -> list[Finding]:
    rounds = []
    for name in names:
        records = [
            StageRecord(f"{name}/{stage}", Manifest("", settings, {}, {}, summary=summary))
            for stage, (settings, summary) in {**STAGES, **(stages or {})}.items()
        ]
        everyone = [PolicyFigures("base", {**BASE, **(base or {})}), *policies] if policies else []
        rounds.append(Round(name, Path(name), everyone, [], records, {}, selection))
    return findings(Run("run", Path(), rounds, [], ""))


GOOD = policy("teacher", 0.3)


def test_a_good_result_is_said_and_names_no_setting():
    student, teacher = found([policy("student", 0.358, kl_per_sequence=0.683), GOOD])
    assert (student.level, teacher.level) == ("better", "better")
    assert str(student) == (
        "student better than base: 0.758 vs 0.400, +0.358 ± 0.020 on 200 held-out prompts, 0.683 nats per response"
    )


@pytest.mark.parametrize(
    ("gained", "error", "level"),
    [(0.041, 0.02, "better"), (0.04, 0.02, "same"), (-0.04, 0.02, "same"), (-0.041, 0.02, "worse"), (0.0, 0.0, "same")],
)
def test_two_standard_errors_decide(gained: float, error: float, level: str):
    (student, _) = found([policy("student", gained, error), GOOD])
    assert student.level == level
    assert bool(student.settings) == (level != "better")


@pytest.mark.parametrize(
    ("student", "stages", "base", "seen", "settings"),
    [
        (  # the README's recipe on SmolLM2-135M: .05 to .000 at 11.7 nats
            policy("student", -0.05, 0.012, kl_per_sequence=11.7),
            {},
            {"accuracy_sampled": 0.05},
            "it went far from the base",
            ["student.learning_rate (0.0002)", "student.epochs (4)", "cache.delta (0.5)"],
        ),
        (
            policy("student", -0.05, 0.012, kl_per_sequence=11.7),
            {"student": ({**STAGES["student"][0], "form": "policy_gradient", "kl_budget": 0.05}, {})},
            {},
            "it went far",
            ["student.learning_rate (0.0002)", "student.epochs (4)", "student.kl_budget (0.05)"],
        ),
        (
            policy("student", -0.1, entropy=0.05),
            {},
            {},
            "its entropy collapsed, from 0.5 to 0.05",
            ["student.learning_rate (0.0002)", "student.epochs (4)", "cache.delta (0.5)"],
        ),
        (
            policy("student", 0.0, kl_per_sequence=0.001),
            {},
            {},
            "it hardly moved",
            ["student.learning_rate (0.0002)", "student.epochs (4)", "cache.delta (0.5)"],
        ),
        (
            policy("student", -0.01),
            {"rollouts": ({}, {"num_groups": 24, "zero_variance_groups": 18})},
            {},
            "18 of 24 groups of rollouts teach nothing",
            ["rollouts.num_rollouts", "rollouts.prompts", "rollouts.temperature"],
        ),
        (
            policy("student", -0.01, truncated=0.9),
            {},
            {},
            "90% of the held-out responses are cut off",
            ["rollouts.max_new_tokens", "evaluation.max_new_tokens", "student.learning_rate (0.0002)"],
        ),
        (
            policy("student", 0.03),
            {},
            {},
            "more prompts may tell",
            ["evaluation.num_prompts", "student.learning_rate (0.0002)", "student.epochs (4)"],
        ),
        (
            policy("student", -0.01),
            {},
            {"accuracy_sampled": 0.0},
            "the base hardly ever solves a prompt",
            ["rollouts.prompts", "rollouts.verifier", "student.learning_rate (0.0002)"],
        ),
        (
            policy("student", -0.01),
            {},
            {},
            "student not better than base",
            ["student.learning_rate (0.0002)", "student.epochs (4)", "student.global_batch_size (64)"],
        ),
    ],
)
def test_what_was_seen_names_the_settings(student, stages, base, seen, settings):
    finding = found([student, GOOD], stages, base)[0]
    assert seen in finding.text
    assert finding.settings == settings
    assert str(finding).endswith("look at " + ", ".join(settings))


@pytest.mark.parametrize(
    ("gained", "unlearned", "signal"),
    [
        (0.0, False, "is unlearned, which needs the section `unlearned`"),
        (-0.2, False, "is contrast, which needs the section `unlearned`"),
        (0.0, True, "is unlearned;"),
        (-0.2, True, "is contrast;"),
    ],
)
def test_a_teacher_that_is_not_better_names_the_signal_that_suits(gained: float, unlearned: bool, signal: str):
    stages = {"unlearned": ({}, {})} if unlearned else {}
    student, teacher = found([policy("student", 0.1), policy("teacher", gained, kl_per_sequence=5.0)], stages)
    assert student.level == "better" and student.settings == []
    assert f"The signal that suits such a teacher {signal}" in str(teacher)
    assert teacher.settings == ["teacher.learning_rate (0.0001)", "teacher.epochs (8)", "teacher.max_kl"]


def test_a_student_of_a_weak_teacher_points_at_it():
    student = found([policy("student", -0.01), policy("teacher", -0.01)])[0]
    assert "its teacher isn't better either" in student.text
    assert student.settings == ["cache.signal", "teacher.learning_rate", "teacher.epochs"]


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"accuracy_sampled": None}, "no held-out response was verified"),
        ({}, "one held-out prompt has no standard error"),
    ],
)
def test_what_cannot_be_told_is_said(metrics: dict[str, Any], why: str):
    student = policy("student", 0.3, None)
    kept = {k: v for k, v in student.metrics.items() if k not in metrics}
    (finding,) = found(
        [PolicyFigures("student", {k: v for k, v in kept.items() if k != "reward_gained" or not metrics})]
    )
    assert finding.level == "unknown" and why in finding.text


def test_rounds_and_further_teachers_are_named():
    other = PolicyFigures("careful", policy("x", -0.2).metrics, is_further_teacher=True)
    names = [f.policy for f in found([policy("student", 0.1), GOOD, other], names=("round-01", "round-02"))]
    assert names == [f"{r}/{p}" for r in ("round-01", "round-02") for p in ("student", "teacher", "careful")]
    careful = found([other], {"teachers/careful": ({"learning_rate": 3e-3, "epochs": 2}, {})})[0]
    assert careful.settings[:2] == ["teachers.careful.learning_rate (0.003)", "teachers.careful.epochs (2)"]


def test_before_the_evaluation_the_selection_speaks():
    def selection(difference: float) -> SelectionResult:
        base = {"reward": 0.4, "reward_se": 0.02, "greedy": 0.4, "greedy_se": 0.02}
        chosen = {**base, "iteration": 8, "reward": 0.4 + difference, "difference": difference, "difference_se": 0.02}
        return SelectionResult("best_reward", 8, base, [chosen], "strong", "", 64, 4)

    assert found([], selection=selection(0.2))[0].level == "better"
    weak = found([], selection=selection(-0.2))[0]
    assert weak.text.startswith("teacher worse than base: 0.200 vs 0.400, -0.200 ± 0.020 on 64 validation prompts")
    assert found([]) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        # Differences .5, .3, .4 (standard deviation .1): shared difficulty cancels.
        ([0.5, 1.0, 0.4], [0.0, 0.7, 0.0], 0.1 / 3**0.5),
        ([0.5, 1.0, None, 0.4], [0.0, 0.7, 0.0, 0.0], 0.1 / 3**0.5),
        ([], [], 0.05),  # of two means, .03 and .04
        ([0.5, 1.0], [], 0.05),
    ],
)
def test_the_error_is_that_of_the_paired_difference(ours, theirs, error):
    base = PolicyFigures("base", {"accuracy_sampled": 0.4, "accuracy_sampled_se": 0.03}, prompt_rewards=theirs)
    student = PolicyFigures("student", {"accuracy_sampled": 0.7, "accuracy_sampled_se": 0.04}, prompt_rewards=ours)
    gained = _with_efficiency(student, base).metrics
    assert gained["reward_gained"] == pytest.approx(0.3)
    assert gained["reward_gained_se"] == pytest.approx(error)
