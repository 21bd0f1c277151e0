"""What is known to be wrong before anything runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.manifest import write_manifest
from megatron_erpd.pipeline.planner import plan
from megatron_erpd.pipeline.preflight import check_recipe
from megatron_erpd.pipeline.processes import Slots
from megatron_erpd.pipeline.recipe import Recipe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """Checks a recipe whose inputs are all good but for what a test changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "task.py").write_text("def score(record, response):\n    return 1.0\n")

    def check(gpus: int = 0, **sections: Any) -> str:
        recipe = Recipe(
            **{
                "name": "mine",
                "model": "model",
                "rollouts": {"prompts": "prompts.jsonl", "verifier": "python:task.py:score"},
                "teacher": {},
                "student": {},
                "evaluation": {"prompts": "prompts.jsonl"},
                **sections,
            }
        )
        try:
            check_recipe(recipe, plan(recipe), Slots(gpus=[str(i) for i in range(gpus)], cores=2))
        except RecipeError as error:
            return str(error)
        return ""

    return check


def test_a_good_recipe_passes(problems):
    assert problems() == ""


def test_everything_is_told_at_once(problems):
    text = problems(
        model="modle",
        rollouts={"prompts": "train.jsonl", "verifier": "python:tusk.py:score"},
        evaluation={"prompts": "prompts.jsonl", "verifier": "python:task.py:scroe"},
        layout={"micro_batch_size": 24, "tensor_parallel": 2},
        gpus=1,
    )
    assert text.startswith("mine: the run can't start:\n")
    for expected in (
        "base: hf modle: no such file or folder",
        "rollouts: prompts train.jsonl: no such file or folder",
        "rewards: verifier tusk.py: no such file or folder",
        "scroe",
        "teacher: global_batch_size 256 is not a multiple of micro_batch_size 24 x data_parallel 1 = 24",
        "student: its layout needs 2 GPUs, this machine has 1",
    ):
        assert expected in text


def test_a_sampler_that_needs_more_gpus_than_there_are(problems):
    sampled = {"prompts": "prompts.jsonl", "verifier": "python:task.py:score", "engine": "vllm"}
    assert problems(gpus=4, rollouts={**sampled, "tensor_parallel": 4}) == ""
    text = problems(gpus=4, rollouts={**sampled, "tensor_parallel": 8})
    assert "rollouts: tensor_parallel needs 8 GPUs, this machine has 4" in text and text.count("\n") == 1


def test_a_layout_that_does_not_divide_the_model(problems):
    assert "base-log-probs:" in problems(layout={"tensor_parallel": 3})
    text = problems(stages={"teacher": {"layout": {"pipeline_parallel": 4}}})
    assert "teacher:" in text and "base-log-probs:" not in text


def test_an_architecture_that_is_not_supported(problems):
    Path("model/config.json").write_text(json.dumps({**CONFIG, "architectures": ["BloomForCausalLM"]}))
    assert "BloomForCausalLM" in problems()


def test_a_folder_that_holds_no_model(problems):
    Path("model/config.json").unlink()
    assert "model model: has no config.json" in problems()


def test_prompts_that_can_not_be_read(problems):
    Path("prompts.jsonl").write_text('{"prompt": "1+1="}\n{"answer": "2"}\n')
    assert "prompts.jsonl:2: has no 'prompt'" in problems()


def test_what_prepare_writes_is_checked_when_it_is_there(problems):
    sections = {"prepare": "python task.py {output}", "model": "prepare/model"}
    assert problems(**sections) == ""
    prepared = Path("runs/mine/prepare")
    prepared.mkdir(parents=True)
    write_manifest(prepared, "prepare", {}, {})
    assert "base: hf runs/mine/prepare/model: no such file or folder" in problems(**sections)


def test_monitoring_that_is_not_installed(problems, monkeypatch):
    found = importlib.util.find_spec
    for there, expected in ((None, True), (found("json"), False)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: there if name == "wandb" else found(name, *a))  # noqa: B023
        text = problems(monitoring={"wandb_project": "erpd"})
        assert ("monitoring.wandb_project: wandb isn't installed; pip install wandb" in text) == expected
    assert problems() == ""


def test_one_precision_for_a_training_and_the_log_probs_that_it_reads(problems):
    text = problems(stages={"teacher": {"layout": {"precision": "bf16"}}})
    assert "teacher: trains in bf16 on log-probs that base-log-probs computes in fp32" in text
    stages = ("base-log-probs", "teacher", "cache", "student")
    assert problems(stages={stage: {"layout": {"precision": "bf16"}} for stage in stages}) == ""
    assert "student: trains in fp32 on log-probs that cache computes in bf16" in problems(
        stages={"cache": {"layout": {"precision": "bf16"}}}
    )
