import argparse
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_erpd.data.rollouts import read_rollouts, validate_against_vocabulary
from megatron_erpd.sampling.policy import load_policy
from megatron_erpd.sampling.prompts import load_prompts
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.sources.tokenizer import tokenizer_digest
from tests.unit.sampling.tiny_model import QUICKSTART, quickstart_module

task = quickstart_module("task")
prepare = quickstart_module("prepare")


def test_the_worked_example():
    problem = task.Problem((45, 87, 36))
    assert problem.prompt == "54+78+63=" and problem.answer == "861"
    assert task.solve(problem) == "231 861"
    # Every carry dropped: 45 + 87 becomes 22 (with no hundreds), 22 + 36 has nothing to carry.
    assert task.solve(problem, 1.0, random.Random(0)) == "220 850"


def test_wrong_steps_are_as_frequent_as_asked_and_all_of_one_kind():
    rng, dropped, num_steps = random.Random(1), 0, 0
    for _ in range(2000):
        # Every addition of these carries, so a dropped carry always shows.
        problem = task.Problem((99, rng.randint(11, 99), 99))
        total = 99
        for number, written in zip(problem.summands[1:], task.solve(problem, 0.35, rng).split(" "), strict=True):
            value = int(written[::-1])
            without = sum((total // p % 10 + number // p % 10) % 10 * p for p in (1, 10, 100))
            assert value in (total + number, without)
            if total + number != without:
                num_steps += 1
                dropped += value == without
            total = value
    assert abs(dropped / num_steps - 0.35) < 4 * np.sqrt(0.35 * 0.65 / num_steps)


@pytest.mark.parametrize("num_summands", [2, 3, 12])
def test_correct_solutions_score_one(num_summands):
    problems = task.distinct_problems(random.Random(2), num_summands)
    for problem in (next(problems) for _ in range(20)):
        record = problem.record()
        assert len(problem.summands) == num_summands
        assert task.score(record, task.solve(problem)) == 1.0
        assert int(record["answer"][::-1]) == sum(problem.summands)
        for wrong in ("", "1", record["answer"] + " ", record["answer"][:-1], record["answer"] + "0"):
            assert task.score(record, wrong) == 0.0
        assert set(problem.prompt + task.solve(problem)) <= set(task.CHARACTERS)


def test_problems_are_distinct_and_seeded():
    def draw(seed):
        problems = task.distinct_problems(random.Random(seed), 2)
        return [next(problems) for _ in range(1000)]

    assert len(set(draw(1))) == 1000 and draw(1) == draw(1) != draw(2)
    with pytest.raises(ValueError, match="at least 2"):
        next(task.distinct_problems(random.Random(1), 1))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    def run(name, seed):
        folder = tmp_path_factory.mktemp(name)
        sizes = ["--num-demonstrations", "300", "--num-prompts", "20", "--num-heldout", "30"]
        prepare.prepare(prepare.parse_arguments(["--output", str(folder), "--seed", str(seed), *sizes]))
        return folder

    return run("one", 1), run("again", 1), run("other", 2)


def test_the_model_is_a_tiny_qwen3_that_splits_over_two_ranks(prepared):
    folder = prepared[0] / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"]
    assert all(config[name] % 2 == 0 for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    policy = load_policy(folder)
    assert sum(p.numel() for p in policy.model.parameters()) == 75_200
    assert policy.stop_token_ids == (prepare.EOS,) and policy.pad_token_id == prepare.PAD
    weights = [AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in prepared]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_text_survives_the_tokenizer(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared[0] / "model")
    text = "54+78+63=231 861"
    ids = tokenizer.encode(text)
    assert ids[0] == prepare.BOS and len(ids) == len(text) + 1
    assert tokenizer.decode([*ids, prepare.EOS], skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
    assert chat == ids


def test_demonstrations_are_rollouts_of_the_project(prepared):
    rollouts = read_rollouts(prepared[0] / "demonstrations.parquet")
    assert len(rollouts) == 300 and (rollouts.rewards == 1).all() and len(set(rollouts.group_ids)) == 300
    validate_against_vocabulary(rollouts, 17)
    tokenizer = AutoTokenizer.from_pretrained(prepared[0] / "model")
    assert rollouts.tokenizer_digest == tokenizer_digest(tokenizer)
    for i in range(20):
        tokens = rollouts.response_tokens(i)
        assert tokens[-1] == prepare.EOS
        assert tokenizer.decode(tokens, skip_special_tokens=True) == rollouts.response_text(i)
        assert tokenizer.encode(rollouts.prompt_text(i)) == rollouts.prompt_tokens(i).tolist()
    right = np.mean([rollouts.response_text(i).split(" ")[-1] == rollouts.metadata(i)["answer"] for i in range(300)])
    assert 0.35 < right < 0.65
    assert rollouts.digest() == read_rollouts(prepared[1] / "demonstrations.parquet").digest()
    assert rollouts.digest() != read_rollouts(prepared[2] / "demonstrations.parquet").digest()


def test_no_problem_is_in_two_files(prepared):
    prompts, heldout = (load_prompts(prepared[0] / f"{name}.jsonl") for name in ("prompts", "heldout"))
    rollouts = read_rollouts(prepared[0] / "demonstrations.parquet")
    texts = [r["prompt"] for r in (*prompts, *heldout)] + [rollouts.prompt_text(i) for i in range(300)]
    assert len(prompts) == 20 and len(heldout) == 30 and len(set(texts)) == 350
    verifier = Verifier(f"python:{QUICKSTART / 'task.py'}:score")
    record = prompts[0]
    assert verifier(record, task.solve(task.Problem(tuple(record["metadata"]["summands"])))) == 1.0


def test_more_problems_than_there_are_is_refused(tmp_path):
    arguments = argparse.Namespace(**vars(prepare.parse_arguments(["--output", str(tmp_path)])) | {"num_summands": 2})
    with pytest.raises(SystemExit, match="num-summands"):
        prepare.prepare(arguments)


def test_aligned_summands_are_as_wide_as_the_sums() -> None:
    problem = next(task.distinct_problems(random.Random(3), 12, aligned=True))
    written = problem.prompt.removesuffix("=").split("+")
    assert {len(number) for number in written} == {problem.width} == {4}
    assert tuple(int(number[::-1]) for number in written) == problem.summands
    assert problem.answer == task.Problem(problem.summands).answer
