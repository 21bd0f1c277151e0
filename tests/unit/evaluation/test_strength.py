"""Strong or weak: the rule, and the finding on disk."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.evaluation.strength import SELECTION, SelectionResult, read_selection, recommend_signal


@pytest.mark.parametrize(
    ("difference", "error", "with_unlearned"),
    [
        (0.21, 0.1, "strong"),
        (0.2, 0.1, "unlearned"),  # 2 standard errors are not more than 2
        (0.0, 0.1, "unlearned"),
        (-0.2, 0.1, "unlearned"),
        (-0.21, 0.1, "contrast"),
        (0.001, 0.0, "strong"),
        (0.0, 0.0, "unlearned"),
        (-0.001, 0.0, "contrast"),
    ],
)
def test_the_rule(difference, error, with_unlearned):
    advice = recommend_signal(difference, error, has_unlearned=True)
    assert advice.signal == with_unlearned and "warning" not in advice.why
    assert f"{difference:+.3f}" in advice.why and "standard errors" in advice.why
    alone = recommend_signal(difference, error, has_unlearned=False)
    assert alone.signal == "strong", "no other signal can be made"
    assert ("section unlearned" in alone.why) == (with_unlearned != "strong"), "a weak teacher is told"


def selection(**changed) -> SelectionResult:
    figures = {"reward": 0.5, "reward_se": 0.02, "greedy": 0.6, "greedy_se": 0.03}
    candidates = [figures | {"difference": 0.1, "difference_se": 0.02, "iteration": i} for i in (8, 16)]
    values = {"by": "best_reward", "iteration": 16, "base": figures | {"reward": 0.4}, "candidates": candidates}
    return SelectionResult(
        **values | {"signal": "strong", "why": "better", "num_prompts": 9, "num_samples": 4} | changed
    )


def test_a_finding_on_disk(tmp_path):
    (tmp_path / SELECTION).write_text(json.dumps(asdict(selection())))
    found = read_selection(tmp_path)
    assert found == selection() and found.chosen["iteration"] == 16
    assert "teacher at iteration 16: held-out reward 0.500 ± 0.020, base 0.400" in found.describe()
    assert "recommended signal: strong" in found.describe()
    assert found.figures()["recommended_signal"] == "strong" and found.figures()["base_reward"] == 0.4


@pytest.mark.parametrize("content", [None, "{", "{}", json.dumps(asdict(selection(iteration=9)))])
def test_no_finding(tmp_path, content):
    if content is not None:
        (tmp_path / SELECTION).write_text(content)
    with pytest.raises(StageError, match=r"selection\.json: isn't a selection .*megatron-erpd select"):
        read_selection(tmp_path)
