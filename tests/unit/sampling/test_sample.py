import json

import numpy as np
import pytest

from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.errors import RecipeError, RolloutError, StageError
from megatron_erpd.recipe.requests import Sample
from megatron_erpd.sampling import parts
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.sampling.sample import make_engine, sample_rollouts
from megatron_erpd.settings import SampleSettings

SETTINGS = SampleSettings(num_rollouts=3, max_new_tokens=6, batch_size=8, seed=4)
# The first and the last prompt are the same text.
PROMPTS = [PromptRecord(prompt=f"{n}+1=", answer=str(n), metadata={"n": n}) for n in (1, 22, 3, 4, 1)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PROMPTS_PER_PART", 2)


@pytest.fixture
def verifier(tmp_path):
    file = tmp_path / "verifier.py"
    file.write_text(
        "def score(record, response):\n    return None if record['answer'] == '3' else len(response) % 2\n"
        "def broken(record, response):\n    raise RuntimeError('no')\n"
    )
    return f"python:{file}:score"


def test_rollouts_and_report(model_folder, tmp_path, verifier):
    told = []
    report = sample_rollouts(
        model_folder,
        PROMPTS,
        tmp_path / "out",
        SETTINGS,
        verifier=verifier,
        progress=lambda done, total: told.append((done, total)),
    )
    rollouts = read_rollouts(tmp_path / "out")
    assert len(rollouts) == 15 and told[-1] == (15, 15) and [d for d, _ in told] == sorted(d for d, _ in told)
    np.testing.assert_array_equal(rollouts.group_ids, np.repeat(np.arange(5), 3))
    assert rollouts.reward_status.count("unverified") == 3 and report["unverified"] == 3 and report["accepted"] == 12
    for i in range(15):
        assert len(rollouts.behavior_log_probs(i)) == len(rollouts.response_tokens(i))
        assert rollouts.metadata(i)["answer"] == PROMPTS[i // 3]["answer"]
        if rollouts.reward_status[i] == "scored":
            assert rollouts.rewards[i] == len(rollouts.response_text(i)) % 2
    assert rollouts.file_metadata["sampling"]["temperature"] == 1.0
    assert report["num_groups"] == 5 and report["verifier"]["errors"] == 0 and report["parts_resumed"] == 0
    assert report["response_length"]["mean"] == rollouts.response_lengths.mean()
    by_group = rollouts.rewards.reshape(5, 3)
    constant = [np.isnan(row).all() or len(set(row)) == 1 for row in by_group]
    assert report["zero_variance_groups"] == sum(constant)
    assert report == {**json.loads((tmp_path / "out" / "report.json").read_text()), "parts_resumed": 0}


def test_resuming_gives_the_same_rollouts(model_folder, tmp_path, verifier):
    whole = tmp_path / "whole"
    sample_rollouts(model_folder, PROMPTS, whole, SETTINGS, verifier=verifier)
    parts = sorted(p.name for p in whole.glob("*.parquet"))
    assert len(parts) == 3

    class Interrupted(RuntimeError):
        pass

    def interrupt(done, total):
        if done > 6:
            raise Interrupted

    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        sample_rollouts(model_folder, PROMPTS, cut, SETTINGS, verifier=verifier, progress=interrupt)
    assert [p.name for p in sorted(cut.glob("*.parquet"))] == parts[:1]
    kept = (cut / parts[0]).stat().st_mtime_ns
    # Another batch size is no other result.
    report = sample_rollouts(
        model_folder, PROMPTS, cut, SETTINGS.model_copy(update={"batch_size": 3}), verifier=verifier
    )
    assert report["parts_resumed"] == 1 and (cut / parts[0]).stat().st_mtime_ns == kept
    one, other = read_rollouts(whole), read_rollouts(cut)
    assert one.sample_ids == other.sample_ids
    np.testing.assert_array_equal(one.rewards, other.rewards)


def test_what_the_verifier_failed_on_is_kept_with_the_rollouts(model_folder, tmp_path, verifier):
    """... so that the report of a run that went on counts all of it."""
    file = tmp_path / "failing.py"
    file.write_text(
        "def score(record, response):\n"
        "    if record['answer'] in ('1', '4'):\n        raise RuntimeError(record['answer'])\n"
        "    return None if record['answer'] == '3' else 1\n"
    )
    given = {"verifier": f"python:{file}:score"}
    whole = sample_rollouts(model_folder, PROMPTS, tmp_path / "whole", SETTINGS, **given)
    assert whole["verifier"] == {"spec": f"python:{file}:score", "errors": 9, "first_error": "RuntimeError: 1"}
    assert whole["unverified"] == 12
    rollouts = read_rollouts(tmp_path / "whole")
    errors = [rollouts.metadata(i).get("verifier_error") for i in range(15)]
    assert errors == ["RuntimeError: 1"] * 3 + [None] * 6 + ["RuntimeError: 4"] * 3 + ["RuntimeError: 1"] * 3
    first = tmp_path / "cut" / "rollouts-00000-of-00003.parquet"
    first.parent.mkdir()
    first.write_bytes((tmp_path / "whole" / first.name).read_bytes())
    again = sample_rollouts(model_folder, PROMPTS, tmp_path / "cut", SETTINGS, **given)
    assert again == {**whole, "parts_resumed": 1}


def test_other_settings_are_not_mixed_in(model_folder, tmp_path, verifier):
    out = tmp_path / "out"
    sample_rollouts(model_folder, PROMPTS, out, SETTINGS, verifier=verifier)
    with pytest.raises(RolloutError, match="another 'sampling'"):
        sample_rollouts(model_folder, PROMPTS, out, SETTINGS.model_copy(update={"seed": 5}), verifier=verifier)
    with pytest.raises(RolloutError, match="another 'prompts'"):
        sample_rollouts(model_folder, [*PROMPTS[:4], PROMPTS[1]], out, SETTINGS, verifier=verifier)
    with pytest.raises(RolloutError, match="of another run"):
        sample_rollouts(model_folder, PROMPTS[:2], out, SETTINGS, verifier=verifier)


def test_without_a_verifier_nothing_is_scored(model_folder, tmp_path):
    report = sample_rollouts(model_folder, PROMPTS[:1], tmp_path, SETTINGS)
    assert report["unverified"] == 3 and report["reward"] is None


def test_a_verifier_that_always_fails_is_an_error(model_folder, tmp_path, verifier):
    with pytest.raises(StageError, match="failed on all 15 responses.*RuntimeError: no"):
        sample_rollouts(
            model_folder, PROMPTS, tmp_path / "out", SETTINGS, verifier=verifier.replace(":score", ":broken")
        )
    # And stays one when nothing is left to be sampled.
    with pytest.raises(StageError, match="failed on all 15 responses.*RuntimeError: no"):
        sample_rollouts(
            model_folder, PROMPTS, tmp_path / "out", SETTINGS, verifier=verifier.replace(":score", ":broken")
        )


def test_a_policy_on_several_gpus_is_the_same_policy(model_folder, tmp_path, verifier, monkeypatch):
    made = []
    monkeypatch.setattr("megatron_erpd.sampling.vllm.VllmEngine", lambda *given, **named: made.append((given, named)))
    spread = SETTINGS.model_copy(update={"engine": "vllm", "tensor_parallel": 8})
    make_engine(model_folder, spread, dtype="bfloat16")
    assert made == [((model_folder,), {"dtype": "bfloat16", "tensor_parallel_size": 8})]
    sample_rollouts(model_folder, PROMPTS, tmp_path, SETTINGS, verifier=verifier)
    again = SETTINGS.model_copy(update={"tensor_parallel": 2})
    assert sample_rollouts(model_folder, PROMPTS, tmp_path, again, verifier=verifier)["parts_resumed"] == 3
    with pytest.raises(ValueError, match="tensor_parallel 2: engine transformers holds the policy on one GPU"):
        SampleSettings(tensor_parallel=2)
    identity = [
        Sample(model=model_folder, prompts="p.jsonl", settings=settings, output=model_folder).identity
        for settings in (spread, spread.model_copy(update={"tensor_parallel": 1}))
    ]
    assert identity[0] == identity[1]


def test_missing_vllm_says_what_to_do(model_folder):
    pytest.importorskip("transformers")
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(RecipeError, match="engine 'transformers'"):
            make_engine(model_folder, SETTINGS.model_copy(update={"engine": "vllm"}))
    else:
        pytest.skip("vLLM is installed")
