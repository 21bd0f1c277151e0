"""Prompts that are not held out, numbers that the file doesn't have, figures that speak against themselves."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.evaluation.held_out import metrics_warnings, num_shared, prompt_warnings
from megatron_erpd.evaluation.metrics import PolicyMetrics
from megatron_erpd.sampling.prompts import PromptRecord


def trained(tmp_path: Path, *prompts: tuple[list[int], str | None]) -> Rollouts:
    rows = [
        Rollout(
            prompt_token_ids=np.array(ids),
            response_token_ids=np.array([9, 10 + k]),
            group_id=group,
            reward=1.0,
            prompt=text,
        )
        for group, (ids, text) in enumerate(prompts)
        for k in range(2)
    ]
    write_rollouts(tmp_path / "rollouts.parquet", rows)
    return read_rollouts(tmp_path / "rollouts.parquet")


def record(prompt: object) -> PromptRecord:
    return PromptRecord(prompt=prompt, answer="", metadata={})  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("prompts", "ids", "shared"),
    [
        (["1+1", "2+2"], [[1, 2], [3, 4]], 1),
        (["1+1", "3+3"], [[7, 8, 1, 2], [5]], 1),  # the same text in another template
        (["other words", "3+3"], [[1, 2], [5]], 1),  # the same tokens of rollouts without a text
        (["1+1", "1+1"], [[1, 2], [1, 2]], 2),
        (["1+11", "3+3"], [[1, 2, 2], [5]], 0),
        ([[{"role": "user", "content": "5+5"}]], [[5]], 1),
    ],
)
def test_prompts_of_the_training_are_counted(tmp_path, prompts, ids, shared):
    rollouts = trained(tmp_path, ([1, 2], "1+1 "), ([30], None), ([40], "user: 5+5"))
    assert num_shared([record(prompt) for prompt in prompts], ids, rollouts) == shared


def test_each_warning_says_how_many_and_names_the_setting(tmp_path):
    rollouts, records = trained(tmp_path, ([1, 2], "1+1")), [record("1+1"), record("2+2")]
    found = prompt_warnings(records, [[1, 2], [3]], rollouts, 5, "evaluation")
    assert found[0].startswith("evaluation.num_prompts is 5, and there are 2 prompts")
    assert found[1].startswith("1 of 2 held-out prompts are among those of the rollouts")
    assert prompt_warnings(records, [[5], [3]], None, None, "evaluation") == []
    assert prompt_warnings([record("2+2")], [[3]], rollouts, 1, "evaluation") == []


def test_figures_that_measure_nothing():
    def metrics(**changed: float) -> PolicyMetrics:
        return PolicyMetrics(**{**{field.name: 0 for field in fields(PolicyMetrics)}, **changed})

    assert metrics_warnings({"base": metrics(unverified=0.49, truncated=0.49)}) == []
    unverified, cut = metrics_warnings({"base": metrics(unverified=1.0), "student": metrics(truncated=0.62)})
    assert "base 100%;" in unverified and "student" not in unverified
    assert "student 62%;" in cut and "base" not in cut
