"""A run whose verifier is edited: responses are scored again, and only a changed reward has anything trained anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_erpd.data.rewards import content_digest
from megatron_erpd.manifest import read_manifest
from tests.integration.test_run import run
from tests.unit.sampling.tiny_model import write_model

RECIPE = """
name: tiny
model: {folder}/hf
rollouts:
  prompts: {folder}/prompts.jsonl
  verifier: python:{folder}/verifier.py:score
  num_rollouts: 4
  max_new_tokens: 4
teacher: {{loss: mse, epochs: 1, global_batch_size: 16, learning_rate: 1e-3}}
layout: {{micro_batch_size: 8}}
"""
VERIFIER = """
def score(record, response):
    return float(len(response) > {longest}) + (record["answer"] == "right")
"""


def started(text: str) -> list[str]:
    return [line.split("]")[0][1:] for line in text.splitlines() if "] running" in line]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_verifier_that_is_edited(tmp_path: Path) -> None:
    verifier, prompts, output = tmp_path / "verifier.py", tmp_path / "prompts.jsonl", tmp_path / "run"
    write_model(tmp_path / "hf", seed=3)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    verifier.write_text(VERIFIER.format(longest=1))
    lines = [json.dumps({"prompt": f"{n}+1=", "answer": str(n)}) for n in range(8)]
    prompts.write_text("\n".join(lines))

    def again(*flags: str) -> tuple[list[str], str]:
        done = run(tmp_path / "recipe.yaml", output, *flags)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return started(done.stdout), done.stdout

    first, _ = again()
    assert set(first) == {"base", "rollouts", "rewards", "base-log-probs", "teacher", "export", "report"}
    teacher, rewards = output / "round-01/teacher", output / "round-01/rewards"
    former = read_manifest(teacher)
    assert "rewards" not in former.inputs and content_digest(rewards) is None

    # A comment; a name: the same rewards, and nothing is trained.
    verifier.write_text(VERIFIER.format(longest=1).replace("return", "# longer is better\n    return"))
    assert again()[0] == []
    verifier.write_text(VERIFIER.format(longest=1).replace("response", "text"))
    assert again()[0] == ["rewards", "report"]
    assert "rescored: 0 of 32 rewards changed" in (output / "logs/rewards.log").read_text()

    # Other rewards: tokens and log-probs stay, trainings follow.
    prompts.write_text("\n".join(lines).replace('"3"', '"right"'))
    names, said = again()
    assert names == ["rewards", "teacher", "export", "report"]
    assert "rescored: 4 of 32 rewards changed" in (output / "logs/rewards.log").read_text()
    assert read_manifest(teacher).inputs["rewards"] == content_digest(rewards)
    assert read_manifest(teacher).files != former.files
    assert "the former one is kept in" in said and "keeps what others have replaced" in said

    # The answers as they were: what was trained on them comes back.
    prompts.write_text("\n".join(lines))
    names, said = again()
    assert names == ["export", "report"] and read_manifest(teacher).digest == former.digest
    names, said = again("--discard")
    assert names == [] and "removed, as it was replaced" in said and not (output / "replaced").exists()
