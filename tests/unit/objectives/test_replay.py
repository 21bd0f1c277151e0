"""Replay losses against formulas written with Python floats, and gradients worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.ratios import MAX_LOG_RATIO
from megatron_erpd.objectives.reduction import AGGREGATIONS, aggregate
from megatron_erpd.objectives.replay import REPLAY_LOSSES
from megatron_erpd.objectives.types import Aggregation, LossOutput, ReplayInputs
from tests.tolerances import FINITE_DIFFERENCE, FLOAT64, FP32

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
TOKEN_LOSSES = ("ppo", "cispo", "sapo")


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


def token_reference(name: str, log_ratio: float, advantage: float, policy: float) -> tuple[float, float]:
    """(loss, d loss / d log pi) of one token, by cases."""
    rho = math.exp(log_ratio)
    if name == "ppo":
        if advantage >= 0:
            return (-rho * advantage, -rho * advantage) if rho < 1.3 else (-1.3 * advantage, 0.0)
        if rho < 0.8:
            return -0.8 * advantage, 0.0
        return (-rho * advantage, -rho * advantage) if rho < 1.5 else (-1.5 * advantage, 0.0)
    if name == "cispo":
        weight = min(rho, 1.3) * advantage
        return -weight * policy, -weight
    tau = 1.0 if advantage > 0 else 1.05
    gate = 1 / (1 + math.exp(-tau * (rho - 1)))
    return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * rho * advantage


@pytest.mark.parametrize("token_advantages", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses_by_hand(name: str, aggregation: Aggregation, token_advantages: bool) -> None:
    inputs = make(token_advantages=token_advantages)
    output = run(name, inputs, aggregation=aggregation)
    loss, slope = torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
    for i, j in MASK.nonzero().tolist():
        policy, old = inputs.policy_log_probs[i, j].item(), inputs.old_log_probs[i, j].item()
        advantage = float(inputs.advantages[i, j] if token_advantages else inputs.advantages[i])
        loss[i, j], slope[i, j] = token_reference(name, policy - old, advantage, policy)
    total, count = aggregate(loss, MASK, aggregation)
    FLOAT64.assert_close(output.loss_sum, total)
    assert int(output.count) == int(count)
    per_token_weight = (
        1 / MASK.double().sum(1, keepdim=True).clamp(min=1) if aggregation == "seq_mean_token_mean" else 1
    )
    FLOAT64.assert_close(gradient(output, inputs), slope * per_token_weight)


def rows_of(inputs: ReplayInputs) -> list[tuple[int, list[float]]]:
    log_ratios = (inputs.policy_log_probs - inputs.old_log_probs).tolist()
    rows = [(i, [x for x, m in zip(row, MASK[i].tolist(), strict=True) if m]) for i, row in enumerate(log_ratios)]
    return [(i, row) for i, row in rows if row]


@pytest.mark.parametrize("agg", ["sum", "mean"])
def test_ce_by_hand(agg: str) -> None:
    inputs = make()
    output = run("ce", inputs, agg=agg)
    expected, slopes = 0.0, torch.zeros(5, 6, dtype=torch.float64)
    for i, row in rows_of(inputs):
        scale = 0.7 if agg == "sum" else 0.7 / len(row)
        p = 1 / (1 + math.exp(-scale * sum(row)))
        r = float(inputs.rewards[i])
        expected -= r * math.log(p) + (1 - r) * math.log(1 - p)
        slopes[i] = MASK[i].double() * scale * (p - r)
    FLOAT64.assert_close(output.loss_sum, expected)
    FLOAT64.assert_close(gradient(output, inputs), slopes)
    assert int(output.count) == 4


@pytest.mark.parametrize("agg", ["sum", "mean"])
def test_mse_by_hand(agg: str) -> None:
    inputs = make()
    output = run("mse", inputs, agg=agg)
    expected, slopes = 0.0, torch.zeros(5, 6, dtype=torch.float64)
    for i, row in rows_of(inputs):
        scale = 0.7 if agg == "sum" else 0.7 / len(row)
        error = scale * sum(row) - float(inputs.advantages[i])
        expected += error**2
        slopes[i] = MASK[i].double() * 2 * error * scale
    FLOAT64.assert_close(output.loss_sum, expected)
    FLOAT64.assert_close(gradient(output, inputs), slopes)
    assert int(output.count) == 4


def test_gspo_by_hand() -> None:
    inputs = make()
    output = run("gspo", inputs)
    expected, slopes = 0.0, torch.zeros(5, 6, dtype=torch.float64)
    clipped = 0
    for i, row in rows_of(inputs):
        ratio, advantage = math.exp(sum(row) / len(row)), float(inputs.advantages[i])
        bounded = min(max(ratio, 0.95), 1.05)
        free = ratio * advantage <= bounded * advantage
        expected -= min(ratio * advantage, bounded * advantage)
        slopes[i] = MASK[i].double() * (-ratio * advantage / len(row) if free else 0.0)
        clipped += 0 if free else len(row)
    FLOAT64.assert_close(output.loss_sum, expected)
    FLOAT64.assert_close(gradient(output, inputs), slopes)
    assert int(output.count) == 4 and clipped > 0
    FLOAT64.assert_close(output.metrics["clip_fraction"][0], clipped)


def test_sft_takes_only_good_rows() -> None:
    inputs = make()
    output = run("sft", inputs)
    chosen = MASK.bool() & torch.tensor([True, False, False, False, True]).unsqueeze(-1)
    FLOAT64.assert_close(output.loss_sum, -inputs.policy_log_probs[chosen].sum())
    FLOAT64.assert_close(gradient(output, inputs), -chosen.double())
    assert int(output.count) == 8
    assert int(run("sft", inputs, aggregation="seq_mean_token_mean").count) == 2


def test_unlearned_sft_takes_only_verified_failures() -> None:
    inputs = replace(make(), loss_mask=torch.ones(5, 6))
    chosen = torch.zeros(5, 6, dtype=torch.float64)
    chosen[[1, 3]] = 1
    FLOAT64.assert_close(gradient(run("sft", inputs, unlearn=True), inputs), -chosen)


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sapo", "mse"])
def test_unlearning_is_training_on_flipped_advantages(name: str) -> None:
    inputs = make()
    flipped = replace(inputs, advantages=-inputs.advantages)
    unlearned, expected = run(name, inputs, unlearn=True), run(name, flipped)
    FLOAT64.assert_close(unlearned.loss_sum, expected.loss_sum)
    FLOAT64.assert_close(gradient(unlearned, inputs), gradient(expected, flipped))


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sapo", "mse", "ce"])
def test_unlearning_turns_the_gradient_at_the_base_policy_around(name: str) -> None:
    """For `sapo` too: 4/tau sigma'(0) tau = 1, so the temperatures, which follow the sign, don't matter at rho = 1."""
    inputs = make(spread=0.0)
    FLOAT64.assert_close(gradient(run(name, inputs, unlearn=True), inputs), -gradient(run(name, inputs), inputs))


@pytest.mark.parametrize("name", REPLAY_LOSSES)
def test_untrained_positions_touch_neither_loss_nor_gradient_nor_metrics(name: str) -> None:
    inputs = make()
    trained = MASK.bool()
    rows = trained.any(1)
    nan, inf = math.nan, math.inf
    policy = torch.where(trained, inputs.policy_log_probs.detach(), nan).requires_grad_()
    dirty = ReplayInputs(
        policy,
        torch.where(trained, inputs.old_log_probs, -inf),
        inputs.loss_mask,
        torch.where(rows, inputs.advantages, nan),
        torch.where(rows, inputs.rewards, -inf),
        torch.where(trained, 1.0, inf),
    )
    clean_output, dirty_output = run(name, inputs), run(name, dirty)
    FLOAT64.assert_close(dirty_output.loss_sum, clean_output.loss_sum)
    assert int(dirty_output.count) == int(clean_output.count)
    clean_gradient, dirty_gradient = gradient(clean_output, inputs), gradient(dirty_output, dirty)
    FLOAT64.assert_close(dirty_gradient, clean_gradient)
    assert bool((dirty_gradient[~trained] == 0).all())
    for key, (total, count) in dirty_output.metrics.items():
        FLOAT64.assert_close(total, clean_output.metrics[key][0], key)
        assert int(count) == int(clean_output.metrics[key][1])


@pytest.mark.parametrize("name", REPLAY_LOSSES)
def test_empty_masks_give_zero(name: str) -> None:
    inputs = replace(make(), loss_mask=torch.zeros(5, 6))
    output = run(name, inputs)
    assert float(output.loss_sum.detach()) == 0 and int(output.count) == 0
    assert bool((gradient(output, inputs) == 0).all())


def rows_only(inputs: ReplayInputs, rows: list[int], policy: Tensor) -> ReplayInputs:
    weights = inputs.importance_weights
    return ReplayInputs(
        policy[rows],
        inputs.old_log_probs[rows],
        inputs.loss_mask[rows],
        inputs.advantages[rows],
        inputs.rewards[rows],
        None if weights is None else weights[rows],
    )


@pytest.mark.parametrize("name", REPLAY_LOSSES)
def test_micro_batches_add_up_for_loss_and_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = replace(make(), importance_weights=torch.rand(5, 6, dtype=torch.float64, generator=generator))
    whole = run(name, inputs)
    policy = inputs.policy_log_probs.detach().clone().requires_grad_()
    parts = [run(name, rows_only(inputs, rows, policy)) for rows in ([0, 3], [2], [4, 1])]
    for part in parts:
        part.loss_sum.backward()
    FLOAT64.assert_close(sum(part.loss_sum.detach() for part in parts), whole.loss_sum)
    assert sum(int(part.count) for part in parts) == int(whole.count)
    assert policy.grad is not None
    FLOAT64.assert_close(policy.grad, gradient(whole, inputs))
    for key, (total, count) in whole.metrics.items():
        FLOAT64.assert_close(sum(part.metrics[key][0] for part in parts), total, key)
        assert sum(int(part.metrics[key][1]) for part in parts) == int(count)


@pytest.mark.parametrize("name", [name for name in REPLAY_LOSSES if name != "cispo"])
def test_gradients_are_finite_differences(name: str) -> None:
    """`cispo` is left out: its stop-gradient is not the derivative of its value (checked by hand above)."""
    inputs = make(seed=1)
    slopes = gradient(run(name, inputs), inputs)
    base = inputs.policy_log_probs.detach()
    step = 1e-5
    for i, j in [(0, 1), (1, 4), (3, 2), (4, 5), (2, 2), (0, 0)]:
        losses = []
        for sign in (1, -1):
            moved = base.clone()
            moved[i, j] += sign * step
            losses.append(float(run(name, replace(inputs, policy_log_probs=moved)).loss_sum))
        FINITE_DIFFERENCE.assert_close((losses[0] - losses[1]) / (2 * step), slopes[i, j], f"{i}, {j}")


@pytest.mark.parametrize("name", [*TOKEN_LOSSES, "sft", "gspo"])
def test_importance_weights_multiply_token_losses(name: str) -> None:
    inputs = make()
    doubled = replace(inputs, importance_weights=torch.full((5, 6), 2.0, dtype=torch.float64))
    FLOAT64.assert_close(run(name, doubled).loss_sum, 2 * run(name, inputs).loss_sum)
    only = torch.zeros(5, 6, dtype=torch.float64)
    only[0, 2] = 1
    slopes = gradient(run(name, replace(inputs, importance_weights=only), aggregation="token_mean"), inputs)
    rest = slopes.clone()
    rest[0] = 0
    assert bool((rest == 0).all())


@pytest.mark.parametrize("name", ["ce", "mse"])
def test_sequence_losses_take_the_mean_weight_of_a_row(name: str) -> None:
    inputs = make()
    weights = torch.rand(5, 6, dtype=torch.float64)
    row_weight = (weights * MASK).sum(1) / MASK.sum(1).clamp(min=1)
    slopes = gradient(run(name, replace(inputs, importance_weights=weights)), inputs)
    FLOAT64.assert_close(slopes, gradient(run(name, inputs), inputs) * row_weight.unsqueeze(-1))


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


@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_clip_fraction_counts_tokens_at_the_clip(name: str) -> None:
    inputs = make()
    slopes = gradient(run(name, inputs), inputs)
    if name == "ppo":
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
def test_ce_refuses_rewards_outside_of_zero_to_one(reward: float) -> None:
    rewards = make().rewards.clone()
    rewards[3] = reward
    with pytest.raises(ErpdError, match=r"row 3 .* rewards in \[0, 1\]"):
        run("ce", replace(make(), rewards=rewards))


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
