"""What commands are asked for: as command lines and back, and what of it identifies an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.command_line import argv_of, read_request
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.requests import REQUESTS, Checkpoint, Export, Import, Precompute, Sample, read_policies
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.slices import Slice
from tests.unit.recipe.test_planner import SECTIONS, SELECTION

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("**/*.yaml"))
ON_POLICY = {"grpo": {"kind": "on_policy", "updates": 9, "kl_coefficient": 0.5}}
HIDDEN = {"kind": "distill", "teacher": "hidden", "signal": "-1*third/base + teacher/base"}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounds": {"rounds": 3, "warm_up": None, "selection": SELECTION, "cache": {"signal": "auto"}},
    "layout": {
        "layout": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True, "precision": "bf16"},
        "megatron": {"lr_decay_style": "cosine", "log-progress": True, "mixture": ["a", "--b"]},
        "monitoring": {"wandb_project": "erpd"},
    },
    "imported": {
        "rollouts": {"file": "dump.jsonl", "format": "verl", "fields": {"reward": "score"}, "append_eos": False},
        "evaluation": {"prompts": "reasoning-gym:chain_sum?size=9", "verifier": "math-verify"},
    },
    "on policy": {"controls": ON_POLICY},
    "teachers": {
        "teachers": {"third": {"loss": "mse", "checkpoints": 2, "learning_rate": 1e-5}},
        "cache": {"signal": "0.5*third/base", "keep_hidden": True},
        "controls": {"hidden": HIDDEN},
    },
    "chat": {
        "rollouts": {
            **{"prompts": "-p.jsonl", "verifier": "python:pkg.module:score", "engine": "vllm", "tensor_parallel": 2},
            **{"chat_template": True, "system_prompt": "-hello", "template_arguments": {"x": [1]}},
        }
    },
}


@pytest.mark.parametrize("recipe", [*RECIPES, *EXAMPLES], ids=lambda name: str(name)[-40:])
def test_every_stage_is_what_its_command_line_says(recipe: str | Path) -> None:
    planned = load_recipe(recipe) if isinstance(recipe, Path) else Recipe(**{**SECTIONS, **RECIPES[recipe]})
    for stage in plan(planned):
        kind = REQUESTS[stage.command]
        assert kind.model_validate_json(stage.request.model_dump_json()) == stage.request, "as a job's record keeps it"
        if stage.is_tool:
            read = read_request(kind, argv_of(stage.request))
            assert read == stage.request, stage.name
            assert (read.identity, read.inputs) == (stage.identity, stage.inputs), stage.name


def test_slices_and_exports_as_command_lines() -> None:
    sample = Sample(model=Path("m"), prompts="p", output=Path("o"), slice=Slice(3, 8))
    assert argv_of(sample) == ["--model", "m", "--prompts", "p", "--output", "o", "--slice", "3/8"]
    assert read_request(Sample, argv_of(sample)) == sample and sample.identity["slice"] == "3/8"
    assert "slice" not in sample.whole.identity and sample.whole.inputs == sample.inputs
    merge = Precompute(base=Path("b"), rollouts=Path("r"), output=Path("o"), merge_slices=True)
    assert read_request(Precompute, argv_of(merge)) == merge
    checkpoints = (Checkpoint("t", Path("x@y"), "all"), Checkpoint("t", Path("z")), Checkpoint("s", Path("q"), "12"))
    export = Export(checkpoints=checkpoints, output=Path("o"))
    assert read_request(Export, argv_of(export)) == export
    assert export.inputs == {"t": Path("z"), "t@all": Path("x@y"), "s": Path("q")}
    assert export.identity == {"iterations": {"t": None, "t@all": "all", "s": "12"}}


IDENTITIES: dict[str, tuple[str, list[str], list[str]]] = {
    "prepare": ("plain", [], ["command"]),
    "initial": ("plain", ["hf"], []),
    "warm-up": ("plain", ["base", "rollouts"], ["precision"]),
    "base-hf": ("plain", ["base"], ["iterations"]),
    "rollouts": ("plain", ["model", "prompts"], ["num_prompts"]),
    "round-03/rollouts": ("rounds", ["model", "prompts"], ["num_prompts", "first_prompt"]),
    "rewards": ("plain", ["rollouts", "prompts", "verifier"], ["verifier", "scorer"]),
    "base-log-probs": ("plain", ["base", "rollouts"], ["precision"]),
    "teacher": ("layout", ["base", "rollouts", "base-log-probs", "rewards"], ["precision", "megatron"]),
    "cache": ("plain", ["base", "rollouts", "policy-teacher", "policy-unlearned"], ["precision"]),
    "round-02/cache": (
        *("rounds", ["base", "rollouts", "policy-teacher", "policy-unlearned", "selection"], ["precision"]),
    ),
    "student": ("plain", ["base", "rollouts", "base-log-probs", "rewards", "cache"], ["precision"]),
    "controls/live": ("plain", ["base", "rollouts", "base-log-probs", "rewards", "policy-teacher"], ["precision"]),
    "controls/hidden": (
        "teachers",
        ["base", "rollouts", "base-log-probs", "rewards", "cache", "policy-teacher", "policy-third"],
        ["precision"],
    ),
    "controls/grpo": ("on policy", ["base", "prompts", "verifier"], ["num_prompts", "precision", "verifier"]),
    "selection": ("rounds", ["model", "teacher", "candidates", "prompts", "verifier"], ["has_unlearned", "verifier"]),
    "evaluation": ("plain", ["model-base", "exported", "prompts", "rollouts", "verifier"], ["verifier"]),
    "round-02/evaluation": (
        *("rounds", ["model-base", "exported", "origin", "prompts", "rollouts", "verifier"], ["verifier"]),
    ),
    "report": ("plain", ["initial"], []),
}
"""Stage to its recipe, its inputs in a manifest, and what stands beside its settings there."""


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_a_manifest_keeps(name: str) -> None:
    recipe, inputs, more = IDENTITIES[name]
    stage = {stage.name: stage for stage in plan(Recipe(**{**SECTIONS, **RECIPES[recipe]}))}[name]
    settings = getattr(stage.request, "settings", None)
    own = set(settings.model_dump(mode="json")) - {"tensor_parallel"} if settings else set()
    assert set(stage.identity) == own | set(more)
    if name == "report":
        assert (
            inputs[0] in stage.inputs
            and "prepare" not in stage.inputs
            and stage.inputs["teacher"] == Path("out/round-01/teacher")
        )
    else:
        assert sorted(stage.inputs) == sorted(inputs)


def test_a_file_that_does_not_exist_is_an_input_all_the_same() -> None:
    stages: list[Stage] = plan(Recipe(**SECTIONS))
    assert next(s for s in stages if s.name == "rewards").inputs["verifier"] == Path("task.py")


def test_names_and_folders() -> None:
    found = read_policies(["teacher=runs/a", "third-1.5=runs/b=c"])
    assert found == {"teacher": Path("runs/a"), "third-1.5": Path("runs/b=c")}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["teacher"], "--policy teacher: write NAME=DIR"),
        (["=runs/a"], "write NAME=DIR"),
        (["base=runs/a"], "'base' is given twice"),
        (["t=runs/a", "t=runs/b"], "--policy t=runs/b: 't' is given twice"),
        (["../t=runs/a"], r"--policy \.\./t=runs/a: a name may hold letters, digits"),
        (["a/b=runs/a"], "a name may hold letters"),
    ],
)
def test_what_is_no_policy(items: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_policies(items)


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        (Sample, "--model m --prompts p --output o --num-prompts 0", "--num-prompts: .* greater than or equal to 1"),
        (Sample, "--model m --prompts p --output o --temperature 0", "--temperature: .* greater than 0"),
        (Export, "--checkpoint x --output o", "--checkpoint x: write NAME=DIR"),
        (Import, "--hf m --output o --via megatron-bridge --checkpoint c", "--via and --checkpoint: .* one of them"),
    ],
)
def test_what_can_not_be_asked_for(kind: Any, argv: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_request(kind, argv.split())
