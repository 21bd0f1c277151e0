import copy
import dataclasses

import numpy as np
import pytest
import torch

from megatron_erpd.errors import CheckpointError
from megatron_erpd.evaluation import divergence
from megatron_erpd.evaluation.divergence import compare_policies

NAMES = ("forward_kl", "reverse_kl", "log_ratio", "entropy")


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [(rng.integers(3, 17, p), rng.integers(3, 17, r)) for p, r in [(3, 5), (8, 1), (1, 9), (4, 4), (2, 12)]]


def naive(policy, base, sequences):
    """One sequence and one position at a time, whole logits, float64 from the start."""
    double = [copy.deepcopy(p.model).double() for p in (policy, base)]
    sums = {name: np.zeros(len(sequences)) for name in NAMES}
    for i, (prompt, response) in enumerate(sequences):
        ids = torch.tensor(np.concatenate([prompt, response])).unsqueeze(0)
        with torch.no_grad():
            p, q = (torch.softmax(model(ids).logits[0], -1) for model in double)
        for position in range(len(prompt) - 1, len(prompt) + len(response) - 1):
            a, b, token = p[position], q[position], ids[0, position + 1]
            sums["forward_kl"][i] += float((b * (b / a).log()).sum())
            sums["reverse_kl"][i] += float((a * (a / b).log()).sum())
            sums["log_ratio"][i] += float((a[token] / b[token]).log())
            sums["entropy"][i] += float(-(a * a.log()).sum())
    return sums


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("chunk_elements", [17, 2**24])
def test_equal_to_a_naive_loop(policies, sequences, batch_tokens, chunk_elements, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", chunk_elements)
    told = []
    result = compare_policies(*policies, sequences, batch_tokens, progress=lambda done, total: told.append(done))
    expected = naive(*policies, sequences)
    for name in NAMES:
        np.testing.assert_allclose(getattr(result, name), expected[name], atol=1e-4, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(result.num_tokens, [5, 1, 9, 4, 12])
    assert result.per_token("entropy") == pytest.approx(expected["entropy"].sum() / 31, abs=1e-5)
    assert told[-1] == 5 and len(told) == {1: 5, 30: 2, 10_000: 1}[batch_tokens]


def test_a_policy_and_itself(policies, sequences):
    result = compare_policies(policies[0], policies[0], sequences)
    for name in ("forward_kl", "reverse_kl", "log_ratio"):
        assert (getattr(result, name) == 0).all()
    assert (result.entropy > 0).all()


def test_the_log_ratio_estimates_the_exact_divergence(policies):
    """On the policy's own samples both have the same mean; that ties sampling, scoring and the direction together."""
    from megatron_erpd.sampling.engine import TransformersEngine

    policy, base = policies
    groups = TransformersEngine(policy).sample([[1, 5, 15]], num_samples=3000, max_new_tokens=4, seed=1)
    own = compare_policies(policy, base, [([1, 5, 15], s.response_token_ids) for s in groups[0]])
    difference = own.log_ratio - own.reverse_kl
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))
    assert own.reverse_kl.mean() > 10 * difference.std() / np.sqrt(len(difference))


def test_another_vocabulary_is_refused(policies, sequences):
    other = copy.deepcopy(policies[1].model)
    other.config.vocab_size = 18
    with pytest.raises(CheckpointError, match="vocabulary of 17 .* one of 18"):
        compare_policies(policies[0], dataclasses.replace(policies[1], model=other), sequences)


def test_logits_that_are_changed_later_are_noticed(policies, sequences, monkeypatch):
    model = copy.deepcopy(policies[0].model)
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(CheckpointError, match="changes its logits"):
        compare_policies(dataclasses.replace(policies[0], model=model), policies[1], sequences)
