"""What a stage's folder is found to hold: identity by what is read, and what an earlier version left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_erpd.manifest import begin_artifact, file_digest, finish_artifact
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.sampling.inputs import input_digests
from tests.unit.fake_request import fake_stage


@pytest.fixture
def evaluation(tmp_path: Path) -> Stage:
    """A stage that reads a model, prompts and a verifier."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/README.md").write_text("A model.")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "verifier.py").write_text("def score(record, response):\n    return 1.0  # always\n")
    inputs = {name: tmp_path / file for name, file in _FILES.items()}
    return fake_stage("evaluation", "evaluate", tmp_path / "run/evaluation", inputs, {"verifier": "v"})


_FILES = {"model-base": "model", "prompts": "prompts.jsonl", "verifier": "verifier.py"}


def finish(stage: Stage, digests: dict[str, str]) -> None:
    begin_artifact(stage.output, stage.command, stage.identity, digests)
    (stage.output / "base.json").write_text("{}")
    finish_artifact(stage.output)


def every_byte(path: Path) -> str:
    """As the version before identified its inputs."""
    if path.is_file():
        return file_digest(path)
    files = sorted((str(p.relative_to(path)), file_digest(p)) for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def found(stage: Stage) -> tuple[str, list[str]]:
    assessment = Artifacts(stage.output.parent).assess(stage)
    return assessment.found, assessment.reasons


@pytest.mark.parametrize("version", ["this", "before"])
def test_what_is_not_read_makes_nothing_anew(evaluation, tmp_path, version):
    digests = {name: every_byte(path) for name, path in evaluation.inputs.items()}
    finish(evaluation, input_digests("evaluate", evaluation.inputs) if version == "this" else digests)
    assert found(evaluation) == ("complete", [])
    (tmp_path / "model/.cache").mkdir()
    (tmp_path / "model/.cache/notes").write_text("x")
    if version == "this":
        (tmp_path / "verifier.py").write_text('def score(record, response):\n    """One."""\n    return (1.0)\n')
        (tmp_path / "prompts.jsonl").write_text('{"answer":"2","prompt":"1+1="}')
        (tmp_path / "model/README.md").unlink()
    assert found(evaluation) == ("complete", [])


@pytest.mark.parametrize("version", ["this", "before"])
@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("verifier.py", "def score(record, response):\n    return 0.0  # always\n", "verifier"),
        ("prompts.jsonl", '{"prompt": "1+1=", "answer": "3"}\n', "prompts"),
        ("model/config.json", '{"hidden_size": 8}', "model-base"),
        ("model/tokenizer.json", "{}", "model-base"),
    ],
)
def test_what_is_read_does(evaluation, tmp_path, version, file, content, name):
    digests = {name: every_byte(path) for name, path in evaluation.inputs.items()}
    finish(evaluation, input_digests("evaluate", evaluation.inputs) if version == "this" else digests)
    (tmp_path / file).write_text(content)
    assert found(evaluation) == ("other", [f"input {name} changed"])


def test_a_verifier_by_its_modules_name_was_no_input_before(evaluation):
    digests = input_digests("evaluate", evaluation.inputs)
    finish(evaluation, {name: digest for name, digest in digests.items() if name != "verifier"})
    assert found(evaluation) == ("complete", [])
    assert found(evaluation.changed(settings={"verifier": "w"})) == ("other", ["verifier: v -> w"])


def test_rollouts_of_the_version_before_had_their_verifier_in_them(evaluation, tmp_path):
    """... and are the ones asked for whoever is to score them now."""
    inputs = {"model": tmp_path / "model", "prompts": tmp_path / "prompts.jsonl"}
    stage = evaluation.changed(command="sample", reads=inputs, settings={"seed": 1})
    before = {**inputs, "verifier": tmp_path / "verifier.py"}
    finish(stage.changed(settings={"seed": 1, "verifier": "v"}), {k: every_byte(path) for k, path in before.items()})
    (tmp_path / "verifier.py").write_text("def score(record, response):\n    return 0.0\n")
    assert found(stage) == ("complete", [])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+2=", "answer": "2"}\n')
    assert found(stage) == ("other", ["input prompts changed"])


def test_answers_are_no_part_of_what_is_sampled(evaluation, tmp_path):
    stage = evaluation.changed(command="sample", reads={"prompts": tmp_path / "prompts.jsonl"}, settings={"seed": 1})
    finish(stage, input_digests("sample", stage.inputs))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "3", "metadata": {"level": 1}}\n')
    assert found(stage) == ("complete", [])
