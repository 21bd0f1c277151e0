"""Replay losses: metrics by hand, extreme ratios, what is refused. For value and gradient see `test_invariances`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.per_token import MAX_LOG_RATIO
from megatron_erpd.objectives.replay import REPLAY_LOSSES
from megatron_erpd.objectives.types import LossOutput, ReplayInputs
from tests.tolerances import FLOAT64, FP32

MASK = torch.tensor(
    [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
)
METRICS = {"log_ratio", "reward_weighted_log_ratio", "importance_ratio", "clip_fraction", "kl_k1", "kl_k3"}
# Settings under which random inputs reach every branch of a loss.
SETTINGS: dict[str, dict[str, object]] = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5},
    "gspo": {"clip_low": 0.05, "clip_high": 0.05},
    "cispo": {"clip_high": 0.3},
    "sapo": {},
    "ce": {"beta": 0.7},
    "mse": {"beta": 0.7},
    "sft": {"threshold": 0.5},
}


def make(seed: int = 0, token_advantages: bool = False, spread: float = 0.5) -> ReplayInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old = -normal(5, 6).abs() - 0.1
    policy = (old + spread * normal(5, 6)).requires_grad_()
    advantages = normal(5, 6) if token_advantages else torch.tensor([1.2, -0.7, 5.0, -1.4, 0.4], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, math.nan, 0.25, 0.75], dtype=torch.float64)
    return ReplayInputs(policy, old, MASK.double(), advantages, rewards)


def gradient(output: LossOutput, inputs: ReplayInputs) -> Tensor:
    (result,) = torch.autograd.grad(output.loss_sum, inputs.policy_log_probs)
    return result


def run(name: str, inputs: ReplayInputs, **settings: object) -> LossOutput:
    return REPLAY_LOSSES[name](inputs, **{**SETTINGS[name], **settings})


def rows_of(inputs: ReplayInputs) -> list[tuple[int, list[float]]]:
    log_ratios = (inputs.policy_log_probs - inputs.old_log_probs).tolist()
    rows = [(i, [x for x, m in zip(row, MASK[i].tolist(), strict=True) if m]) for i, row in enumerate(log_ratios)]
    return [(i, row) for i, row in rows if row]


def test_unlearned_sft_takes_only_verified_failures() -> None:
    inputs = replace(make(), loss_mask=torch.ones(5, 6))
    chosen = torch.zeros(5, 6, dtype=torch.float64)
    chosen[[1, 3]] = 1
    FLOAT64.assert_close(gradient(run("sft", inputs, unlearn=True), inputs), -chosen)


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sapo", "mse", "ce"])
def test_unlearning_turns_the_gradient_at_the_base_policy_around(name: str) -> None:
    """For `sapo` too: 4/tau sigma'(0) tau = 1, so the temperatures, which follow the sign, don't matter at rho = 1."""
    inputs = make(spread=0.0)
    FLOAT64.assert_close(gradient(run(name, inputs, unlearn=True), inputs), -gradient(run(name, inputs), inputs))


@pytest.mark.parametrize("name", REPLAY_LOSSES)
@pytest.mark.parametrize("extreme", [-200.0, 200.0])
def test_extreme_log_ratios_stay_finite_in_fp32(name: str, extreme: float) -> None:
    inputs = make()
    policy = (inputs.old_log_probs + extreme).float().requires_grad_()
    fp32 = ReplayInputs(
        policy, inputs.old_log_probs.float(), MASK.float(), inputs.advantages.float(), inputs.rewards.float()
    )
    output = run(name, fp32)
    assert bool(output.loss_sum.isfinite()) and bool(gradient(output, fp32).isfinite().all())
    assert all(bool(total.isfinite()) for total, _ in output.metrics.values())


def test_ce_at_extreme_logits_is_linear_not_infinite() -> None:
    policy = torch.tensor([[1000.0]], requires_grad=True)
    inputs = ReplayInputs(policy, torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1), torch.zeros(1))
    output = run("ce", inputs, beta=1.0)
    FP32.assert_close(output.loss_sum, 1000.0)
    FP32.assert_close(gradient(output, inputs), [[1.0]])


def test_metrics_by_hand_and_the_same_for_all_losses() -> None:
    inputs = make()
    rows = rows_of(inputs)
    tokens = [x for _, row in rows for x in row]
    expected = {
        "log_ratio": (sum(tokens), len(tokens)),
        "reward_weighted_log_ratio": (sum(float(inputs.advantages[i]) * sum(row) for i, row in rows), len(rows)),
        "importance_ratio": (sum(map(math.exp, tokens)), len(tokens)),
        "kl_k1": (-sum(tokens), len(tokens)),
        "kl_k3": (sum(math.exp(x) - 1 - x for x in tokens), len(tokens)),
    }
    for name in REPLAY_LOSSES:
        metrics = run(name, inputs).metrics
        assert set(metrics) == METRICS
        assert not any(item.requires_grad for pair in metrics.values() for item in pair)
        for key, (total, count) in expected.items():
            FLOAT64.assert_close(metrics[key][0], total, f"{name} {key}")
            assert int(metrics[key][1]) == count
    assert float(run("sapo", inputs).metrics["clip_fraction"][0]) == 0


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo"])
def test_clip_fraction_counts_tokens_at_the_clip(name: str) -> None:
    inputs = make()
    slopes = gradient(run(name, inputs), inputs)
    if name != "cispo":
        clipped = int((MASK.bool() & (slopes == 0)).sum())
    else:
        ratios = (inputs.policy_log_probs - inputs.old_log_probs).exp()
        clipped = int((MASK.bool() & (ratios > 1.3)).sum())
    assert 0 < clipped < int(MASK.sum())
    assert int(run(name, inputs).metrics["clip_fraction"][0]) == clipped


def test_the_ratio_is_constant_beyond_its_guard() -> None:
    policy = torch.tensor([[MAX_LOG_RATIO + 1]], requires_grad=True)
    inputs = ReplayInputs(policy, torch.zeros(1, 1), torch.ones(1, 1), -torch.ones(1), torch.zeros(1))
    output = REPLAY_LOSSES["ppo"](inputs)
    FP32.assert_close(output.loss_sum, math.exp(MAX_LOG_RATIO))
    assert float(gradient(output, inputs)) == 0


@pytest.mark.parametrize("reward", [1.5, -0.1, math.nan, math.inf])
def test_ce_is_nan_for_rewards_outside_of_zero_to_one(reward: float) -> None:
    inputs = make()
    inputs.loss_mask[0] = 0
    for row in (3, 0):  # the second has no trained token
        rewards = inputs.rewards.clone()
        rewards[row] = reward
        assert bool(run("ce", replace(inputs, rewards=rewards)).loss_sum.isnan()) == (row == 3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ppo", {"clip_low": 1.1}, "clip_low"),
        ("ppo", {"clip_high": -0.1}, "clip_high"),
        ("ppo", {"dual_clip": 1.0}, "dual_clip must be above 1"),
        ("gspo", {"clip_low": -0.1}, "clip_low"),
        ("cispo", {"clip_high": math.nan}, "clip_high"),
        ("sapo", {"tau_negative": 0.0}, "tau_negative"),
        ("ce", {"beta": 0.0}, "beta"),
        ("mse", {"agg": "max"}, "agg 'max' is unknown"),
        ("ppo", {"aggregation": "sum"}, "aggregation 'sum' is unknown"),
    ],
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(name, make(), **settings)


@pytest.mark.parametrize("name", ["mse", "gspo"])
def test_sequence_losses_refuse_token_advantages(name: str) -> None:
    with pytest.raises(ErpdError, match=f"loss {name} needs advantages per sequence"):
        run(name, make(token_advantages=True))


def test_inputs_of_other_shapes_are_named() -> None:
    inputs = make()
    with pytest.raises(ErpdError, match=r"old_log_probs must have the shape \[5, 6\]"):
        replace(inputs, old_log_probs=torch.zeros(5, 7))
    with pytest.raises(ErpdError, match=r"advantages must have the shape \[5\] or \[5, 6\]"):
        replace(inputs, advantages=torch.zeros(6))
    with pytest.raises(ErpdError, match=r"policy_log_probs must have the shape \[b, s\]"):
        replace(inputs, policy_log_probs=torch.zeros(6))
    with pytest.raises(ErpdError, match="importance_weights"):
        replace(inputs, importance_weights=torch.zeros(5))
