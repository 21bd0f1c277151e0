"""A rate that isn't given: the plan, the stage and what counts as done agree on the number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.mapping.parameter_count import parameters_of
from megatron_erpd.manifest import write_manifest
from megatron_erpd.plan.resources import estimate
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.stages import TRAINS, Stage
from megatron_erpd.training.run import with_rates

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
}
TINY = {**SHAPE, "hidden_size": 16, "intermediate_size": 32}
LARGE = {**SHAPE, "hidden_size": 4096, "intermediate_size": 16384}
"""2 (4 x 4096^2 + 3 x 4096 x 16384) parameters and small ones, 537M; no weights are made."""


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def recipe(tmp_path: Path, **teacher: Any) -> Recipe:
    return Recipe(
        name="rates",
        output=str(tmp_path / "run"),
        model=str(tmp_path / "model"),
        rollouts={"prompts": str(tmp_path / "prompts.jsonl"), "verifier": "math-verify"},
        teacher={"loss": "sapo", **teacher},
        student={},
        controls={"grpo": {"kind": "on_policy"}, "given": {"kind": "replay", "learning_rate": 3e-4}},
    )


def trainings(planned: Recipe) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(planned) if stage.command in TRAINS}


@pytest.mark.parametrize(("config", "rate"), [(TINY, 1e-4), (LARGE, 1e-6)])
def test_what_a_stage_will_record_follows_its_base(tmp_path, config, rate):
    write_config(tmp_path / "run/round-01/base/hf", config)
    stages = trainings(recipe(tmp_path))
    found = {name: stage.request.recorded.identity["learning_rate"] for name, stage in stages.items()}
    assert found == {"teacher": rate, "student": rate, "controls/grpo": rate, "controls/given": 3e-4}
    assert stages["teacher"].request.recorded.identity["warmup_fraction"] == 0.1
    assert stages["controls/given"].request.recorded.identity["warmup_fraction"] == 0.0


def test_a_command_takes_what_the_plan_expects(tmp_path, capsys):
    base = tmp_path / "run/round-01/base"
    write_config(base / "hf", LARGE)
    given = recipe(tmp_path).teacher
    chosen = with_rates(given, base).model_dump(mode="json")
    assert {name: trainings(recipe(tmp_path))["teacher"].request.recorded.identity[name] for name in chosen} == chosen
    assert "learning rate 1e-06: default for models from 400M parameters (this one has 537M)" in capsys.readouterr().out
    assert round(parameters_of(base / "hf") / 1e6) == 537


def test_a_size_is_asked_for_only_where_a_rate_is_missing(tmp_path):
    assert trainings(recipe(tmp_path))["controls/given"].request.recorded.identity["learning_rate"] == 3e-4


def test_done_is_what_was_trained_at_the_same_number(tmp_path):
    planned = recipe(tmp_path)
    write_config(tmp_path / "run/round-01/base/hf", LARGE)
    for name in ("base", "rollouts", "base-log-probs", "rewards"):
        folder = tmp_path / "run/round-01" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "content.json").write_text('{"digest": null}')  # of rewards that are the rollouts' own
        write_manifest(folder, name, {}, {})
    artifacts, teacher = Artifacts(planned.folder), trainings(planned)["teacher"]
    teacher.output.mkdir(parents=True)

    def found(**settings: Any) -> tuple[str, list[str]]:
        write_manifest(
            teacher.output, "train-teacher", teacher.request.recorded.identity | settings, artifacts.digests(teacher)
        )
        assessment = artifacts.assess(teacher)
        return assessment.found, assessment.reasons

    assert found() == ("complete", [])
    # What the version before took without being told.
    before = found(learning_rate=1e-4, warmup_fraction=0.0)
    assert before == ("other", ["learning_rate: 0.0001 -> 1e-06", "warmup_fraction: 0.0 -> 0.1"])
    # Its recipe.yaml has its defaults filled in: given so, they are what was trained.
    teacher = trainings(recipe(tmp_path, learning_rate=1e-4, warmup_fraction=0.0))["teacher"]
    assert found(learning_rate=1e-4, warmup_fraction=0.0) == ("complete", [])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (LARGE, "1e-06: default for models from 400M parameters (this one has 537M), warm-up over the first 10%"),
        (None, "by the model's size, which isn't known yet"),
    ],
)
def test_a_plan_shows_the_rates(tmp_path, config, text):
    planned = recipe(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    if config is None:
        planned = Recipe(**{**planned.model_dump(), "prepare": "true", "model": "prepare/model"})
    else:
        write_config(tmp_path / "model", config)
    rates = estimate(planned).learning_rates
    assert rates["controls/given"] == "0.0003: given"
    assert all(rates[name].startswith(text) for name in ("teacher", "student", "controls/grpo"))
