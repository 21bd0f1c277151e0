"""The translation to and from vLLM's interface, against a stand-in with the same fields; vLLM itself needs a GPU."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_erpd.errors import CheckpointError, RecipeError
from megatron_erpd.sampling.vllm import VllmEngine, prompt_seed


class FakeLLM:
    def __init__(self, **options):
        self.options = options

    def generate(self, prompts, parameters, use_tqdm):
        self.calls = list(zip(prompts, parameters, strict=True))
        if use_tqdm:
            assert list(use_tqdm(prompts, desc="Adding requests", miniters=1, mininterval=0)) == prompts
            bar = use_tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True, postfix="0 toks/s")
            for one in parameters:
                assert bar.format_dict["elapsed"] >= 0
                bar.update(one.n)
            bar.close()
        return [SimpleNamespace(outputs=[completion([7, 2])] * p.n) for p in parameters]


def completion(tokens, reason="stop", log_probs=True):
    other = SimpleNamespace(logprob=-9)
    entries = [{token: SimpleNamespace(logprob=-0.5 * i), 99: other} for i, token in enumerate(tokens)]
    return SimpleNamespace(token_ids=tuple(tokens), logprobs=entries if log_probs else None, finish_reason=reason)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 9}')
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return VllmEngine(tmp_path, tensor_parallel_size=2)


def test_requests_and_samples(engine):
    groups = engine.sample(
        [[1, 5], [1]], num_samples=3, max_new_tokens=9, temperature=0.7, top_p=0.9, seed=4, prompt_indices=[10, 11]
    )
    options = engine._llm.options
    assert options["logprobs_mode"] == "processed_logprobs" and options["tensor_parallel_size"] == 2
    assert (options["config_format"], options["load_format"]) == ("hf", "safetensors")
    (first, parameters), (second, _) = engine._llm.calls
    assert first == {"prompt_token_ids": [1, 5]} and second == {"prompt_token_ids": [1]}
    assert (parameters.n, parameters.max_tokens, parameters.temperature, parameters.top_p) == (3, 9, 0.7, 0.9)
    assert parameters.seed == prompt_seed(4, 10) and parameters.logprobs == 0
    assert [len(group) for group in groups] == [3, 3]
    np.testing.assert_array_equal(groups[0][0].response_token_ids, [7, 2])
    np.testing.assert_array_equal(groups[0][0].log_probs, np.float32([0, -0.5]))


def test_finished_prompts_are_told_of(engine, capsys):
    told = []
    engine.sample([[1, 5], [1], [2]], num_samples=4, max_new_tokens=9, progress=lambda *pair: told.append(pair))
    assert told == [(4, 12), (8, 12), (12, 12), (12, 12)]
    assert capsys.readouterr() == ("", "")


def test_a_folder_with_two_sets_of_weights(engine, tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"remove consolidated\.safetensors"):
        VllmEngine(tmp_path)


def test_seeds_differ_and_fit():
    seeds = {prompt_seed(s, i) for s in range(20) for i in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(("given", "message"), [({"reason": "abort"}, "abort"), ({"log_probs": False}, "no log-prob")])
def test_incomplete_answers_are_errors(engine, monkeypatch, given, message):
    monkeypatch.setattr(engine._llm, "generate", lambda *a, **k: [SimpleNamespace(outputs=[completion([7], **given)])])
    with pytest.raises(RecipeError, match=message):
        engine.sample([[1]], num_samples=1, max_new_tokens=2)
