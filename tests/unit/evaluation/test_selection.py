"""Which checkpoint becomes the teacher; what is sampled again and what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.evaluation.evaluate import evaluate_policies
from megatron_erpd.evaluation.responses import prompt_means
from megatron_erpd.evaluation.selection import candidate_folders, select_checkpoint
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.settings import EvaluateSettings, SelectSettings
from tests.unit.sampling.tiny_model import write_model

SETTINGS = SelectSettings(num_prompts=6, num_samples=4, max_new_tokens=8, seed=3)
PROMPTS = [PromptRecord(prompt=f"{n}+1=", answer=str(n), metadata={}) for n in range(7, 15)]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("verifier") / "verifier.py"
    file.write_text(
        "def score(record, response):\n"
        "    return None if record['answer'] == '8' else float('1' in response)\n"
        "def silent(record, response):\n    return None\n"
        "def constant(record, response):\n    return 1.0\n"
    )
    return f"python:{file}:score"


@pytest.fixture(scope="module")
def candidates(folders, tmp_path_factory):
    """Two checkpoints: the second is the base itself."""
    return {8: folders[0], 16: folders[1], 4: write_model(tmp_path_factory.mktemp("early"), 5)}


@pytest.fixture
def choose(folders, candidates, verifier, tmp_path):
    told: list[str] = []

    def run(**changed):
        told.clear()
        settings = SETTINGS.model_copy(update={k: v for k, v in changed.items() if k in SelectSettings.model_fields})
        return select_checkpoint(
            folders[1],
            changed.get("candidates", candidates),
            changed.get("prompts", PROMPTS),
            tmp_path,
            settings,
            verifier=changed.get("verifier", verifier),
            has_unlearned=changed.get("has_unlearned", True),
            status=lambda name, what, done, total: told.append(name),
        ), set(told)

    return run


def test_the_best_reward_wins_and_equals_the_evaluations(choose, folders, candidates, verifier, tmp_path):
    found, sampled = choose()
    assert sampled == {"base", "teacher@4", "teacher@8", "teacher@16"}
    rewards = {c["iteration"]: c["reward"] for c in found.candidates}
    assert list(rewards) == [4, 8, 16] and found.iteration == max(rewards, key=rewards.__getitem__)
    assert len(set(rewards.values())) == 3, "the case should tell the checkpoints apart"
    settings = EvaluateSettings(**SETTINGS.model_dump(exclude={"by"}))
    policies = {"base": folders[1], **{str(i): path for i, path in candidates.items()}}
    metrics = evaluate_policies(policies, folders[1], PROMPTS, tmp_path / "evaluation", settings, verifier=verifier)
    for figures, name in [(found.base, "base"), *((c, str(c["iteration"])) for c in found.candidates)]:
        assert figures["reward"] == pytest.approx(metrics[name].accuracy_sampled)
        assert figures["reward_se"] == pytest.approx(metrics[name].accuracy_sampled_se)
        assert figures["greedy"] == pytest.approx(metrics[name].accuracy_greedy)


def test_differences_are_paired_by_prompt(choose, tmp_path):
    found, _ = choose()
    same = next(c for c in found.candidates if c["iteration"] == 16)
    assert same["difference"] == same["difference_se"] == 0, "the base against itself, under the same noise"
    rows = [json.loads((tmp_path / "rewards" / f"{n}.json").read_text())["sampled"] for n in ("teacher@8", "base")]
    assert rows[0][1] is None and rows[1][1] is None, "the case should hold an unverified prompt"
    paired = np.array([a - b for a, b in zip(*rows, strict=True) if a is not None])
    other = next(c for c in found.candidates if c["iteration"] == 8)
    assert other["difference"] == pytest.approx(paired.mean())
    assert other["difference_se"] == pytest.approx(paired.std(ddof=1) / np.sqrt(5))


def test_an_interrupted_selection_samples_the_rest(choose, tmp_path):
    found, _ = choose()
    (tmp_path / "rewards" / "teacher@8.json").unlink()
    (tmp_path / "rewards" / "teacher@16.json").write_text("{")
    again, sampled = choose(batch_size=3)
    assert again == found and sampled == {"teacher@8", "teacher@16"}
    _, sampled = choose(seed=4)
    assert sampled == {"base", "teacher@4", "teacher@8", "teacher@16"}


def test_by_last_samples_the_last_alone(choose):
    found, sampled = choose(by="last")
    assert found.iteration == 16 and sampled == {"base", "teacher@16"}
    assert found.signal == "unlearned" and choose(by="last", has_unlearned=False)[0].signal == "strong"


def test_of_equal_ones_the_earliest(choose, verifier):
    found, _ = choose(verifier=verifier.replace(":score", ":constant"))
    assert found.iteration == 4 and [c["reward"] for c in found.candidates] == [1, 1, 1]


def test_what_can_not_be_selected(choose, verifier, tmp_path):
    with pytest.raises(RecipeError, match="1 validation prompt tells nothing"):
        choose(prompts=PROMPTS[:1])
    with pytest.raises(StageError, match="base: the verifier .* gave no verdict on any sampled response"):
        choose(verifier=verifier.replace(":score", ":silent"))
    with pytest.raises(StageError, match="only 1 of the validation prompts have a verdict"):
        choose(prompts=PROMPTS[:2])
    with pytest.raises(StageError, match="holds no checkpoint as NAME@ITERATION"):
        candidate_folders(tmp_path)


def test_folders_of_an_export(tmp_path):
    for name in ("teacher@8", "teacher@16", "teacher@x", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "teacher@24").mkdir()
    assert {i: p.name for i, p in candidate_folders(tmp_path).items()} == {8: "teacher@8", 16: "teacher@16"}


def test_prompt_means():
    rows = np.array([[1.0, np.nan, 0.0], [np.nan] * 3, [1.0, 1.0, 1.0]])
    assert prompt_means(rows) == [0.5, None, 1.0]
