"""Every loss on rollouts, its gradient and its signal worked out by hand, token by token in Python floats.

What the tests of `objectives` compare with. Nothing here calls the package, and nothing is differentiated by a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

Array = np.ndarray
Aggregation = str


@dataclass(frozen=True)
class Batch:
    """Rollouts as a loss sees them: `[b, s]`, and `[b]` for advantages and rewards; `others` are further policies."""

    policy: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor
    rewards: Tensor
    weights: Tensor | None
    others: Mapping[str, Tensor]


class Token(NamedTuple):
    """A token's loss and its slope, d loss / d log pi, as a stop-gradient leaves it."""

    loss: float
    slope: float
    stopped: float = 0.0
    """What the stop-gradient took away: the derivative of the value is slope + stopped."""
    branch: str = "only"


@dataclass
class Expected:
    """A loss's sum, count and gradient; `stopped` and `branches` as in `Token`."""

    slopes: Array
    stopped: Array
    total: float = 0.0
    count: int = 0
    branches: set[str] = field(default_factory=set)


TokenLoss = Callable[[float, float, float], Token]
"""Of log-ratio, advantage and log pi."""


def ppo(low: float, high: float, dual: float | None = None) -> TokenLoss:
    def token(log_ratio: float, advantage: float, policy: float) -> Token:
        rho = math.exp(log_ratio)
        if advantage > 0 and rho > 1 + high:
            return Token(-(1 + high) * advantage, 0.0, branch="clipped above")
        if advantage < 0 and rho < 1 - low:
            return Token(-(1 - low) * advantage, 0.0, branch="clipped below")
        if advantage < 0 and dual is not None and rho > dual:
            return Token(-dual * advantage, 0.0, branch="dual clip")
        return Token(-rho * advantage, -rho * advantage, branch="free")

    return token


def cispo(high: float) -> TokenLoss:
    def token(log_ratio: float, advantage: float, policy: float) -> Token:
        rho = math.exp(log_ratio)
        if rho > 1 + high:
            return Token(-(1 + high) * advantage * policy, -(1 + high) * advantage, branch="capped")
        return Token(-rho * advantage * policy, -rho * advantage, -rho * advantage * policy, branch="free")

    return token


def sapo(tau_positive: float, tau_negative: float) -> TokenLoss:
    def token(log_ratio: float, advantage: float, policy: float) -> Token:
        rho, tau = math.exp(log_ratio), tau_positive if advantage > 0 else tau_negative
        gate = 1 / (1 + math.exp(-tau * (rho - 1)))
        slope = -4 * gate * (1 - gate) * rho * advantage
        return Token(-4 / tau * gate * advantage, slope, branch="positive" if advantage > 0 else "other")

    return token


def sft(log_ratio: float, advantage: float, policy: float) -> Token:
    return Token(-policy, -1.0)


def kl(estimator: str) -> TokenLoss:
    def token(log_ratio: float, advantage: float, policy: float) -> Token:
        rho = math.exp(log_ratio)
        if estimator == "k1":
            return Token(rho * log_ratio, rho * (log_ratio + 1))
        if estimator == "k2":
            return Token(rho * log_ratio**2 / 2, rho * log_ratio, rho * log_ratio**2 / 2)
        return Token(rho * log_ratio - rho + 1, rho * log_ratio)

    return token


def rows_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """The rows with trained tokens, each with these tokens' positions."""
    rows = [(i, [t for t, m in enumerate(row) if m > 0]) for i, row in enumerate(batch.mask.tolist())]
    return [(i, columns) for i, columns in rows if columns]


def nothing(batch: Batch) -> Expected:
    return Expected(np.zeros(batch.mask.shape), np.zeros(batch.mask.shape))


def log_ratios(batch: Batch) -> list[list[float]]:
    return (batch.policy.detach() - batch.old).tolist()


def weights_of(batch: Batch) -> list[list[float]]:
    return np.ones(batch.mask.shape).tolist() if batch.weights is None else batch.weights.tolist()


def token_losses(
    batch: Batch,
    token: TokenLoss,
    aggregation: Aggregation,
    advantages: Array,
    chosen: Callable[[float], bool] = lambda reward: True,
) -> Expected:
    """A loss that is a sum over tokens; on the rows whose reward is chosen, with advantages `[b]` or `[b, s]`."""
    expected, ratios, policy, weights = nothing(batch), log_ratios(batch), batch.policy.tolist(), weights_of(batch)
    grid = np.broadcast_to(advantages.reshape(len(policy), -1), batch.mask.shape).tolist()
    for i, columns in rows_of(batch):
        if not chosen(float(batch.rewards[i])):
            continue
        share = 1 / len(columns) if aggregation == "seq_mean_token_mean" else 1.0
        expected.count += len(columns) if aggregation == "token_mean" else 1
        for t in columns:
            found, weight = token(ratios[i][t], grid[i][t], policy[i][t]), share * weights[i][t]
            expected.total += weight * found.loss
            expected.slopes[i, t] = weight * found.slope
            expected.stopped[i, t] = weight * found.stopped
            expected.branches.add(found.branch)
    return expected


def gspo(batch: Batch, low: float, high: float, aggregation: Aggregation, advantages: Array) -> Expected:
    """The ratio of a row is exp(mean l): each of its n tokens moves all of its n terms by 1/n."""
    expected, ratios, weights = nothing(batch), log_ratios(batch), weights_of(batch)
    for i, columns in rows_of(batch):
        n = len(columns)
        found = ppo(low, high)(sum(ratios[i][t] for t in columns) / n, float(advantages[i]), 0.0)
        share = 1 / n if aggregation == "seq_mean_token_mean" else 1.0
        weight = share * sum(weights[i][t] for t in columns)
        expected.count += n if aggregation == "token_mean" else 1
        expected.total += weight * found.loss
        expected.slopes[i, columns] = weight * found.slope / n
        expected.branches.add(found.branch)
    return expected


def sequence_losses(
    batch: Batch, loss: Callable[[float, float], tuple[float, float]], targets: Array, beta: float, agg: str
) -> Expected:
    """A loss with one term per row: of its implicit reward z and its target, with the derivative by z."""
    expected, ratios, weights = nothing(batch), log_ratios(batch), weights_of(batch)
    for i, columns in rows_of(batch):
        scale = beta if agg == "sum" else beta / len(columns)
        value, slope = loss(scale * sum(ratios[i][t] for t in columns), float(targets[i]))
        weight = sum(weights[i][t] for t in columns) / len(columns)
        expected.count += 1
        expected.total += weight * value
        expected.slopes[i, columns] = weight * slope * scale
        expected.branches.add("only")
    return expected


def cross_entropy(z: float, label: float) -> tuple[float, float]:
    p = 1 / (1 + math.exp(-z))
    return -label * math.log(p) - (1 - label) * math.log(1 - p), p - label


def squared_error(z: float, target: float) -> tuple[float, float]:
    return (z - target) ** 2, 2 * (z - target)


def signal_advantages(
    batch: Batch, weights: Mapping[str, float], scale: float, clip: float, alpha: float, agree: bool
) -> tuple[Array, set[str]]:
    """`[b, s]` token advantages of the signal that is this weighted sum of the policies' log-probs."""
    advantages, branches = np.zeros(batch.mask.shape), set()
    policies = {name: (batch.old if name == "base" else batch.others[name]).tolist() for name in weights}
    for i, columns in rows_of(batch):
        outcome = float(batch.advantages[i])
        for t in columns:
            s = sum(weight * policies[name][i][t] for name, weight in weights.items())
            branches.add("clipped" if abs(s / scale) > clip else "within")
            advantage = max(-clip, min(clip, s / scale)) + alpha * outcome
            if agree:
                branches.add("agrees" if advantage * outcome > 0 else "disagrees")
                advantage = advantage if advantage * outcome > 0 else 0.0
            advantages[i, t] = advantage
    return advantages, branches
