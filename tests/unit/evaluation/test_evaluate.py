import json
import shutil
from itertools import combinations

import numpy as np
import pytest

from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.errors import CheckpointError, RolloutError, StageError
from megatron_erpd.evaluation.divergence import compare_policies
from megatron_erpd.evaluation.evaluate import evaluate_policies, evaluate_policy
from megatron_erpd.evaluation.metrics import PolicyMetrics
from megatron_erpd.evaluation.responses import majority_rewards
from megatron_erpd.sampling.engine import TransformersEngine
from megatron_erpd.sampling.prompts import PromptRecord, encode_prompts
from megatron_erpd.sampling.sample import sample_rollouts
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.settings import EvaluateSettings, SampleSettings

SETTINGS = EvaluateSettings(num_prompts=6, num_samples=4, max_new_tokens=8, num_rollouts=7, batch_size=16, seed=3)
PROMPTS = [PromptRecord(prompt=f"{n}+1=", answer=str(n), metadata={}) for n in range(7, 15)]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    file = tmp_path_factory.mktemp("verifier") / "verifier.py"
    file.write_text(
        "def score(record, response):\n"
        "    return None if record['answer'] == '8' or response.startswith('1') else float('1' in response)\n"
        "def broken(record, response):\n    raise RuntimeError('no')\n"
    )
    return f"python:{file}:score"


@pytest.fixture(scope="module")
def rollouts(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("rollouts")
    sample_rollouts(folders[1], PROMPTS, out, SampleSettings(num_rollouts=3, max_new_tokens=6))
    return read_rollouts(out)


@pytest.fixture(scope="module")
def evaluation(policies, verifier, rollouts):
    return evaluate_policy(*policies, PROMPTS, Verifier(verifier), rollouts, SETTINGS)


def test_accuracies_against_a_naive_loop(evaluation, policies, verifier):
    policy, judge, metrics = policies[0], Verifier(verifier), evaluation.metrics
    ids = encode_prompts(policy.tokenizer, PROMPTS[:6])
    engine = TransformersEngine(policy)
    groups = engine.sample(ids, num_samples=4, max_new_tokens=8, seed=3)

    def rewards(record, samples):
        texts = [policy.tokenizer.decode(s.response_token_ids, skip_special_tokens=True) for s in samples]
        return [r for r in (judge(record, text) for text in texts) if r is not None]

    verified = [rewards(record, group) for record, group in zip(PROMPTS, groups, strict=False)]
    assert verified[1] == [] and any(0 < len(v) < 4 for v in verified), "the case should hold unverified samples"
    means = [np.mean(v) for v in verified if v]
    assert metrics.accuracy_sampled == pytest.approx(np.mean(means))
    assert metrics.accuracy_sampled_se == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)))
    assert metrics.pass_at_g == pytest.approx(np.mean([max(v) for v in verified if v]))
    assert metrics.unverified == pytest.approx(1 - sum(map(len, verified)) / 24)
    # All ways to draw k of the verified samples.
    for k in (1, 2, 4):
        chances = [np.mean([max(draw) for draw in combinations(v, k)]) for v in verified if len(v) >= k]
        assert metrics.pass_at[str(k)] == pytest.approx(np.mean(chances))
    assert metrics.pass_at["1"] == pytest.approx(metrics.accuracy_sampled)
    lengths_of = {True: [], False: []}
    for record, group in zip(PROMPTS, groups, strict=False):
        for sample in group:
            for reward in rewards(record, [sample]):
                lengths_of[reward == 1].append(len(sample.response_token_ids))
    assert metrics.mean_length_passed == pytest.approx(np.mean(lengths_of[True]))
    assert metrics.mean_length_failed == pytest.approx(np.mean(lengths_of[False]))
    greedy = engine.greedy(ids, max_new_tokens=8)
    first = [r for record, g in zip(PROMPTS, greedy, strict=False) for r in rewards(record, [g])]
    assert metrics.accuracy_greedy == pytest.approx(np.mean(first))
    lengths = [len(s.response_token_ids) for group in groups for s in group]
    assert metrics.mean_length == pytest.approx(np.mean(lengths))
    assert metrics.mean_length_greedy == pytest.approx(np.mean([len(g.response_token_ids) for g in greedy]))
    cut = [s.finish_reason == "length" for group in groups for s in group]
    assert metrics.truncated == pytest.approx(np.mean(cut)) and 0 < metrics.truncated < 1


def test_divergences_of_own_samples_and_of_the_data(evaluation, policies, rollouts):
    policy, base = policies
    ids = encode_prompts(policy.tokenizer, PROMPTS[:6])
    groups = TransformersEngine(policy).sample(ids, num_samples=4, max_new_tokens=8, seed=3)
    sequences = [[(prompt, s.response_token_ids) for s in group] for prompt, group in zip(ids, groups, strict=True)]
    own = [compare_policies(policy, base, group) for group in sequences]
    total = sum(o.num_tokens.sum() for o in own)
    metrics = evaluation.metrics
    per_prompt = [o.reverse_kl.mean() for o in own]
    assert metrics.kl_per_sequence == pytest.approx(np.mean(per_prompt))
    assert metrics.kl_per_sequence_se == pytest.approx(np.std(per_prompt, ddof=1) / np.sqrt(6))
    assert metrics.kl_per_token == pytest.approx(sum(o.reverse_kl.sum() for o in own) / total)
    assert metrics.kl_per_sequence_sampled == pytest.approx(np.mean([o.log_ratio.mean() for o in own]))
    assert metrics.kl_per_token_sampled == pytest.approx(sum(o.log_ratio.sum() for o in own) / total)
    assert metrics.entropy == pytest.approx(sum(o.entropy.sum() for o in own) / total)
    rows = np.linspace(0, 23, 7).round().astype(int)
    assert metrics.num_rollouts == 7
    data = compare_policies(policy, base, [(rollouts.prompt_tokens(i), rollouts.response_tokens(i)) for i in rows])
    assert metrics.forward_kl_data == pytest.approx(data.per_token("forward_kl"))
    assert metrics.reverse_kl_data == pytest.approx(data.per_token("reverse_kl"))
    assert metrics.forward_kl_data != pytest.approx(metrics.reverse_kl_data)


def test_divergence_from_the_first_rounds_base(evaluation, policies, folders, tmp_path):
    """In a second round the base is the first student; here the evaluated policy itself."""
    policy, origin = policies
    second = evaluate_policy(policy, policy, PROMPTS, None, None, SETTINGS, origin=origin).metrics
    first = evaluation.metrics
    assert second.kl_per_sequence == second.kl_per_token == 0
    assert second.kl_from_origin_per_sequence == pytest.approx(first.kl_per_sequence) and first.kl_per_sequence > 0
    assert second.kl_from_origin_per_sequence_se == pytest.approx(first.kl_per_sequence_se)
    assert second.kl_from_origin_per_token == pytest.approx(first.kl_per_token)
    assert first.kl_from_origin_per_sequence == first.kl_per_sequence
    assert first.kl_from_origin_per_token == first.kl_per_token
    # The same from folders; another origin is another measurement.
    given = {"student": folders[0]}, folders[0], PROMPTS, tmp_path, SETTINGS
    assert evaluate_policies(*given)["student"].kl_from_origin_per_sequence == 0
    from_folders = evaluate_policies(*given, origin=folders[1])["student"]
    assert from_folders.kl_from_origin_per_sequence == pytest.approx(first.kl_per_sequence)


def test_examples_are_for_people(evaluation):
    assert len(evaluation.examples) == 6
    example = evaluation.examples[0]
    assert example["prompt"] == "7+1=" and example["answer"] == "7" and len(example["samples"]) == 2
    assert evaluation.examples[1]["greedy"]["reward"] is None
    json.dumps(evaluation.examples, allow_nan=False)


def test_without_verifier_and_rollouts(policies):
    metrics = evaluate_policy(policies[0], policies[0], PROMPTS, None, None, SETTINGS).metrics
    assert metrics.accuracy_sampled is None and metrics.pass_at_g is None and metrics.unverified == 1
    assert metrics.forward_kl_data is None and metrics.num_rollouts == 0
    assert metrics.kl_per_sequence == metrics.kl_per_token == metrics.kl_per_sequence_sampled == 0
    assert metrics.entropy > 0


def test_several_policies_are_saved_and_resumed(folders, verifier, rollouts, evaluation, tmp_path):
    told = []

    def run(policies, **changes):
        told.clear()
        return evaluate_policies(
            policies,
            folders[1],
            PROMPTS,
            tmp_path,
            changes.pop("settings", SETTINGS),
            **({"verifier": verifier, "rollouts": rollouts} | changes),
            status=lambda name, what, done, total: told.append((name, what)),
        )

    first = run({"student": folders[0]})
    assert (
        first["student"]
        == evaluation.metrics
        == PolicyMetrics(**json.loads((tmp_path / "student.json").read_text())["metrics"])
    )
    assert {what for _, what in told} == {"sampling", "greedy", "divergence", "fixed data"}
    content = json.loads((tmp_path / "student.json").read_text())
    assert content["examples"] == evaluation.examples and content["seconds"] > 0
    both = run({"student": folders[0], "base": folders[1]})
    assert {name for name, _ in told} == {"base"} and list(both) == ["student", "base"]
    assert both["student"] == first["student"] and both["base"].kl_per_token == 0
    # Another batch size isn't another measurement; another seed is.
    run({"student": folders[0]}, settings=SETTINGS.model_copy(update={"batch_size": 3}))
    assert not told
    other = run({"student": folders[0]}, settings=SETTINGS.model_copy(update={"seed": 4}))
    assert told and other["student"] != first["student"]
    (tmp_path / "student.json").write_text("{")
    run({"student": folders[0]})
    assert told


def test_rollouts_and_policies_of_another_tokenizer(folders, rollouts, tmp_path):
    """The other one has the same model and tokens, two of them exchanged."""
    other = shutil.copytree(folders[1], tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(RolloutError, match="made with another tokenizer.*was recorded, this tokenizer reads"):
        evaluate_policies({"student": other}, other, PROMPTS, tmp_path, SETTINGS, rollouts=rollouts)
    with pytest.raises(CheckpointError, match="policy 'student' .*other has another tokenizer than the base"):
        evaluate_policies({"student": other}, folders[1], PROMPTS, tmp_path, SETTINGS, rollouts=rollouts)


def test_a_verifier_that_always_fails_is_an_error(policies, verifier):
    broken: Verifier = Verifier(verifier.replace(":score", ":broken"))
    with pytest.raises(StageError, match="failed on every response.*RuntimeError: no"):
        evaluate_policy(*policies, PROMPTS, broken, None, SETTINGS)


def test_the_majority_is_the_most_frequent_answer():
    texts = [
        [r"so \boxed{3}", "<answer>4</answer>", r"thus $\boxed{3}$.", "<answer> 4 </answer> <answer>3</answer>"],
        ["7", "8", "8", "7"],  # as frequent: the first
        ["1", "1", "2", "2"],
        ["1", "1", "1", "1"],
    ]
    unverified = np.nan
    rewards = np.array(
        [[1, 0, 1, 1], [0, 1, 1, 0], [unverified, unverified, 0.5, 1], [unverified] * 4], dtype=np.float64
    )
    assert majority_rewards(rewards, texts).tolist() == [1, 0, 0.75]
