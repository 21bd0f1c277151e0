import math

import numpy as np
import pytest
import torch

from megatron_erpd.errors import CheckpointError, RecipeError
from megatron_erpd.sampling.engine import SampledResponse, TransformersEngine, draw_tokens, plan_batches, uniform_noise
from megatron_erpd.sampling.policy import Policy, load_policy, policy_fingerprint

# Different lengths, so that batches are padded; one prompt twice.
TEXTS = ["12+34=", "5=", "98+76+54=", "7+8+9+1=", "12+34=", "1+1="]


@pytest.fixture(scope="module")
def engine(policy: Policy) -> TransformersEngine:
    return TransformersEngine(policy)


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return [policy.tokenizer.encode(text) for text in TEXTS]


def full_forward_log_probs(
    policy: Policy, prompt: list[int], sample: SampledResponse, temperature: float = 1.0
) -> np.ndarray:
    """One sequence, no padding, no cache."""
    ids = torch.tensor([[*prompt, *sample.response_token_ids.tolist()]])
    with torch.no_grad():
        logits = policy.model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    picked = torch.tensor(sample.response_token_ids).unsqueeze(1)
    return torch.log_softmax(logits, -1).gather(1, picked).squeeze(1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_those_of_a_full_forward_pass(engine, policy, prompts, temperature):
    groups = engine.sample(prompts, num_samples=3, max_new_tokens=20, temperature=temperature, seed=1)
    assert [len(group) for group in groups] == [3] * len(prompts)
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            expected = full_forward_log_probs(policy, prompt, sample, temperature)
            np.testing.assert_allclose(sample.log_probs, expected, atol=2e-5)
            assert sample.log_probs.dtype == np.float32 and sample.response_token_ids.dtype == np.int64


def test_finish_reason_and_stop_token(engine, policy, prompts):
    samples = [s for group in engine.sample(prompts, num_samples=8, max_new_tokens=12, seed=2) for s in group]
    stop = policy.stop_token_ids[0]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for sample in samples:
        assert stop not in sample.response_token_ids[:-1]
        assert (sample.response_token_ids[-1] == stop) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.response_token_ids) == 12


def test_samples_do_not_depend_on_the_batch(policy, prompts):
    def draw(prompts, **changes):
        settings = {"num_samples": 4, "max_new_tokens": 16, "seed": 5, "batch_size": 512} | changes
        return TransformersEngine(policy).sample(prompts, **settings)

    def assert_same(left, right):
        for one, other in zip(left, right, strict=True):
            assert [s.response_token_ids.tolist() for s in one] == [s.response_token_ids.tolist() for s in other]
            for s, t in zip(one, other, strict=True):
                np.testing.assert_allclose(s.log_probs, t.log_probs, atol=2e-5)

    reference = draw(prompts)
    assert_same(reference, draw(prompts, batch_size=1))
    assert_same(reference, draw(prompts, batch_size=5))
    assert_same([group[:2] for group in reference], draw(prompts, num_samples=2))
    # A part of the set, with the places of its prompts.
    assert_same(reference[2:4], draw(prompts[2:4], prompt_indices=[2, 3]))
    other_seed = draw(prompts, seed=6)
    assert any(
        s.response_token_ids.tolist() != t.response_token_ids.tolist()
        for one, other in zip(reference, other_seed, strict=True)
        for s, t in zip(one, other, strict=True)
    )
    # The same prompt at another place has noise of its own.
    first, copy = ([s.response_token_ids.tolist() for s in reference[place]] for place in (0, 4))
    assert first != copy


def test_greedy_is_that_of_generate(engine, policy, prompts):
    samples = engine.greedy(prompts, max_new_tokens=16, batch_size=3)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, temperature=None, top_p=None
        )
        assert sample.response_token_ids.tolist() == expected[0, len(prompt) :].tolist()
        np.testing.assert_allclose(sample.log_probs, full_forward_log_probs(policy, prompt, sample), atol=2e-5)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, -torch.inf, 2.0]])
    num = 40_000
    uniforms = torch.from_numpy(uniform_noise([(1, 2)], num)[0])
    tokens, log_probs = draw_tokens(logits.expand(num, -1), uniforms, 1.0, 1.0)
    expected = torch.softmax(logits[0].double(), -1)
    frequency = torch.bincount(tokens, minlength=5) / num
    assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / num)
    torch.testing.assert_close(log_probs.double(), expected.log()[tokens], atol=1e-6, rtol=0)


def test_extreme_draws_never_pick_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 3.0, -torch.inf, 1.0, -torch.inf]])
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, log_probs = draw_tokens(logits.expand(2, -1), uniforms, 1.0, 1.0)
    assert tokens.tolist() == [1, 3] and torch.isfinite(log_probs).all()


def test_top_p_keeps_the_token_that_crosses_the_mass_and_renormalises():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    uniforms = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    tokens, log_probs = draw_tokens(logits.expand(200, -1), uniforms, 1.0, 0.7)
    assert set(tokens.tolist()) == {0, 1}
    expected = torch.tensor([0.5, 0.3]).div(0.8).log()
    torch.testing.assert_close(log_probs, expected[tokens])
    # So small a mass that one token is left.
    tokens, log_probs = draw_tokens(logits.expand(200, -1), uniforms, 1.0, 1e-6)
    assert set(tokens.tolist()) == {0} and log_probs.abs().max() == 0


def test_noise_is_a_function_of_the_key_and_grows_at_the_end():
    noise = uniform_noise([(1, 0, 0), (1, 0, 1), (2, 0, 0)], 50)
    assert len(np.unique(noise)) == 150 and noise.min() >= 0 and noise.max() < 1
    np.testing.assert_array_equal(uniform_noise([(1, 0, 1)], 7)[0], noise[1, :7])


def test_batches_hold_every_row_once_within_the_limits():
    lengths = [5, 9, 2, 9, 30]
    batches = list(plan_batches(lengths, 4, batch_size=6))
    assert sorted(row for batch in batches for row in batch) == [(p, s) for p in range(5) for s in range(4)]
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    assert [lengths[p] for batch in batches for p, _ in batch] == [30] * 4 + [9] * 8 + [5] * 4 + [2] * 4


def test_progress_reaches_the_total(engine, prompts):
    told = []
    engine.sample(
        prompts, num_samples=2, max_new_tokens=2, batch_size=5, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10_000}, "positions"),
    ],
)
def test_bad_settings_are_refused(engine, prompts, changes, message):
    with pytest.raises(RecipeError, match=message):
        engine.sample(prompts, **({"num_samples": 1, "max_new_tokens": 4} | changes))


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(RecipeError, match="prompt 1 has no tokens"):
        engine.sample([[1], []], num_samples=1, max_new_tokens=4)


def test_folders_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_policy(tmp_path)


def test_fingerprint_is_of_the_weights_not_of_the_place(model_folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    assert policy_fingerprint(copy) == policy_fingerprint(model_folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert policy_fingerprint(copy) != policy_fingerprint(model_folder)


def test_fingerprint_of_large_files_reads_their_end_too(model_folder, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr("megatron_erpd.sampling.policy._WHOLE_BYTES", 1000)
    monkeypatch.setattr("megatron_erpd.sampling.policy._BLOCK_BYTES", 100)
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    before = policy_fingerprint(copy)
    assert before == policy_fingerprint(model_folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert policy_fingerprint(copy) != before
