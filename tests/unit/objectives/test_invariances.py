"""Every loss and signal, with every two of its settings together: value and gradient by hand, `gradcheck`, stopped
gradients, and that neither micro-batches, data-parallel shards, padding nor the order of the rows change a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_erpd.objectives.per_token import AGGREGATIONS, KL_ESTIMATORS, kl_penalty
from megatron_erpd.objectives.replay import REPLAY_LOSSES
from megatron_erpd.objectives.signals import combine, parse_signal, token_advantages
from megatron_erpd.objectives.types import KlEstimator, LossOutput, ReplayInputs
from tests.tolerances import FINITE_DIFFERENCE, FLOAT64
from tests.unit.objectives import derivations
from tests.unit.objectives.derivations import Batch, Expected, TokenLoss

MASK = torch.tensor(
    [
        [0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
    ]
)
B, S = MASK.shape
MICRO_BATCHES = ([0, 3], [2], [4, 1], [5])
RANKS = (([0, 3], [2]), ([4, 1], [5]))


def make(weighted: bool) -> Batch:
    """Five rollouts of different lengths and an empty row, on which every branch of every loss is reached."""
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(B, S, dtype=torch.float64, generator=generator)

    old = -normal().abs() - 0.1
    return Batch(
        policy=(old + 0.5 * normal()).requires_grad_(),
        old=old,
        mask=MASK.double(),
        advantages=torch.tensor([1.2, -0.7, 5.0, -1.4, 0.4, 0.0], dtype=torch.float64),
        rewards=torch.tensor([1.0, 0.0, math.nan, 0.25, 0.75, 0.5], dtype=torch.float64),
        weights=torch.rand(B, S, dtype=torch.float64, generator=generator) + 0.5 if weighted else None,
        others={name: old + normal() for name in ("teacher", "second", "third", "unlearned")},
    )


Evaluate = Callable[[Batch], LossOutput]
Derive = Callable[[Batch], Expected]


@dataclass(frozen=True)
class Case:
    """A function of the package and its derivation by hand."""

    name: str
    evaluate: Evaluate
    expected: Derive
    branches: set[str]
    weighted: bool = False

    def batch(self) -> Batch:
        return make(self.weighted)


def inputs_of(batch: Batch, advantages: Tensor) -> ReplayInputs:
    return ReplayInputs(batch.policy, batch.old, batch.mask, advantages, batch.rewards, batch.weights)


CLIPPED = {"free", "clipped above", "clipped below"}
ONLY = {"only"}
# Of each loss on tokens: its settings, the same by hand, and what is to be reached.
TOKEN_LOSSES: dict[str, tuple[str, dict[str, Any], TokenLoss, set[str]]] = {
    "ppo": ("ppo", {"clip_low": 0.2, "clip_high": 0.3}, derivations.ppo(0.2, 0.3), CLIPPED),
    "ppo dual clip": (
        "ppo",
        {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5},
        derivations.ppo(0.2, 0.3, 1.5),
        CLIPPED | {"dual clip"},
    ),
    "cispo": ("cispo", {"clip_high": 0.3}, derivations.cispo(0.3), {"free", "capped"}),
    "sapo": (
        "sapo",
        {"tau_positive": 0.9, "tau_negative": 1.3},
        derivations.sapo(0.9, 1.3),
        {"positive", "other"},
    ),
}


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few of all combinations, in which every two values of two factors meet."""

    def pairs(combination: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        return set(combinations(enumerate(combination), 2))

    every = list(product(*factors))
    missing = set[tuple[Any, ...]]().union(*map(pairs, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda combination: len(pairs(combination) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def on_tokens(loss: str, aggregation: str, unlearn: bool) -> tuple[Evaluate, Derive, set[str]]:
    """A loss that is a sum over tokens: the package's, the one by hand, and what is to be reached."""
    more = {"aggregation": aggregation, "unlearn": unlearn}
    sign = -1.0 if unlearn else 1.0
    if loss == "gspo":
        return (
            lambda b: REPLAY_LOSSES["gspo"](inputs_of(b, b.advantages), clip_low=0.05, clip_high=0.05, **more),
            lambda b: derivations.gspo(b, 0.05, 0.05, aggregation, sign * b.advantages.numpy()),
            CLIPPED,
        )
    if loss == "sft":
        return (
            lambda b: REPLAY_LOSSES["sft"](inputs_of(b, b.advantages), threshold=0.5, **more),
            lambda b: derivations.token_losses(
                b,
                derivations.sft,
                aggregation,
                b.advantages.numpy(),
                lambda reward: reward <= 0.5 if unlearn else reward > 0.5,
            ),
            ONLY,
        )
    name, settings, token, branches = TOKEN_LOSSES[loss]
    return (
        lambda b: REPLAY_LOSSES[name](inputs_of(b, b.advantages), **settings, **more),
        lambda b: derivations.token_losses(b, token, aggregation, sign * b.advantages.numpy()),
        branches,
    )


def on_sequences(loss: str, agg: str, unlearn: bool) -> tuple[Evaluate, Derive, set[str]]:
    """A loss on the log-ratios of whole responses, as `on_tokens`."""

    def target(batch: Batch) -> Tensor:
        if loss == "ce":
            return 1 - batch.rewards if unlearn else batch.rewards
        return -batch.advantages if unlearn else batch.advantages

    by_hand = {"ce": derivations.cross_entropy, "mse": derivations.squared_error}[loss]
    return (
        lambda b: REPLAY_LOSSES[loss](inputs_of(b, b.advantages), beta=0.7, agg=agg, unlearn=unlearn),
        lambda b: derivations.sequence_losses(b, by_hand, target(b).numpy(), 0.7, agg),
        ONLY,
    )


def losses_on_sequence_advantages() -> Iterator[Case]:
    for of, losses, aggregations in (
        (on_tokens, (*TOKEN_LOSSES, "gspo", "sft"), AGGREGATIONS),
        (on_sequences, ("ce", "mse"), ("sum", "mean")),
    ):
        for loss, aggregation, unlearn, weighted in pairwise(losses, aggregations, (False, True), (False, True)):
            form = f"{loss} {aggregation}{' unlearn' * unlearn}{' weighted' * weighted}"
            yield Case(form, *of(loss, aggregation, unlearn), weighted)


# Each signal as a recipe writes it, and the weight it gives to the log-probs of each policy.
SIGNALS: dict[str, dict[str, float]] = {
    "strong": {"teacher": 1, "base": -1},
    "unlearned": {"teacher": 1, "unlearned": -1},
    "contrast": {"base": 1, "unlearned": -1},
    "0.5*strong + 0.8*second/unlearned - 0.3*third/base": {
        **{"teacher": 0.5, "second": 0.8, "third": -0.3},
        **{"unlearned": -0.8, "base": -0.2},
    },
}
# scale, clip, alpha, sign agreement; and what is to be reached.
SHAPES: dict[str, tuple[float, float, float, bool, set[str]]] = {
    "as it is": (1.0, 50.0, 0.0, False, {"within"}),
    "clipped": (1.0, 0.5, 0.0, False, {"within", "clipped"}),
    "scaled and clipped": (2.0, 0.5, 0.0, False, {"within", "clipped"}),
    "with the outcome": (2.0, 0.5, 0.4, False, {"within", "clipped"}),
    "where signs agree": (2.0, 0.5, 0.4, True, {"within", "clipped", "agrees", "disagrees"}),
    "where the signal agrees": (1.0, 50.0, 0.0, True, {"within", "agrees", "disagrees"}),
}


def policy_gradient(label: str, signal: str, shape: str, aggregation: str, weighted: bool = False) -> Case:
    name, settings, token, branches = TOKEN_LOSSES[label]
    scale, clip, alpha, agree, shaped = SHAPES[shape]

    def evaluate(batch: Batch) -> LossOutput:
        values = combine(parse_signal(signal), {**batch.others, "base": batch.old})
        advantages = token_advantages(values, scale, clip, alpha, batch.advantages, agree)
        return REPLAY_LOSSES[name](inputs_of(batch, advantages), **settings, aggregation=aggregation)

    def expected(batch: Batch) -> Expected:
        advantages, reached = derivations.signal_advantages(batch, SIGNALS[signal], scale, clip, alpha, agree)
        result = derivations.token_losses(batch, token, aggregation, advantages)
        result.branches |= reached
        return result

    form = f"{label} on {signal}, {shape}, {aggregation}{' weighted' * weighted}"
    return Case(form, evaluate, expected, branches | shaped, weighted)


def losses_on_token_advantages() -> Iterator[Case]:
    # The signal's forms with stage 2's surrogates; the aggregations and weights with all that take token advantages.
    for label, signal, shape in pairwise(("ppo", "sapo"), list(SIGNALS), list(SHAPES)):
        yield policy_gradient(label, signal, shape, "token_mean")
    for label, aggregation in product(TOKEN_LOSSES, AGGREGATIONS):
        yield policy_gradient(label, "unlearned", "clipped", aggregation, weighted=True)


def kl_penalties() -> Iterator[Case]:
    for estimator, aggregation in product(get_args(KlEstimator), AGGREGATIONS):
        yield Case(
            f"{estimator} {aggregation}",
            lambda b, e=estimator, a=aggregation: LossOutput(*kl_penalty(b.policy, b.old, b.mask, e, a), {}),
            lambda b, e=estimator, a=aggregation: derivations.token_losses(
                b, derivations.kl(e), a, b.advantages.numpy()
            ),
            ONLY,
        )


CASES = [*losses_on_sequence_advantages(), *losses_on_token_advantages(), *kl_penalties()]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def slopes_of(output: LossOutput, policy: Tensor) -> Tensor:
    return torch.autograd.grad(output.loss_sum, policy)[0]


def assert_same_metrics(parts: list[LossOutput], whole: LossOutput) -> None:
    for key, (total, count) in whole.metrics.items():
        FLOAT64.assert_close(sum(part.metrics[key][0] for part in parts), total, key)
        assert sum(int(part.metrics[key][1]) for part in parts) == int(count)


def test_every_two_values_meet() -> None:
    factors = ("ab", range(3), "xyz", (True, False))
    found = pairwise(*factors)
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in found} == set(product(factors[i], factors[j]))
    assert 9 <= len(found) < 18  # of 36


def test_nothing_is_left_out() -> None:
    names = {case.name.split()[0] for case in CASES}
    assert names == {*REPLAY_LOSSES, *KL_ESTIMATORS}
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_value_and_gradient_by_hand(case: Case) -> None:
    batch = case.batch()
    output, expected = case.evaluate(batch), case.expected(batch)
    FLOAT64.assert_close(output.loss_sum, expected.total)
    assert int(output.count) == expected.count
    FLOAT64.assert_close(slopes_of(output, batch.policy), torch.from_numpy(expected.slopes))
    assert expected.branches >= case.branches, "the batch reaches too little"


@every_case
def test_gradcheck(case: Case) -> None:
    """The gradient is the derivative of the value, but for what a stop-gradient takes away (`cispo`, `k2`)."""
    batch = case.batch()
    trained = MASK > 0

    def value(tokens: Tensor) -> Tensor:
        policy = torch.zeros(B, S, dtype=torch.float64).masked_scatter(trained, tokens)
        return case.evaluate(replace(batch, policy=policy)).loss_sum

    tokens = batch.policy.detach()[trained].requires_grad_()
    stopped = torch.from_numpy(case.expected(batch).stopped)[trained]
    assert bool(stopped.any()) == case.name.startswith(("cispo", "k2"))
    if not stopped.any():
        assert torch.autograd.gradcheck(value, tokens, fast_mode=True)
        return
    (slopes,) = torch.autograd.grad(value(tokens), tokens)
    for i in range(len(tokens)):
        step = 1e-5 * torch.eye(len(tokens), dtype=torch.float64)[i]
        difference = (value(tokens.detach() + step) - value(tokens.detach() - step)) / 2e-5
        FINITE_DIFFERENCE.assert_close(difference, slopes[i] + stopped[i], f"token {i}")


@every_case
def test_only_the_policy_gets_a_gradient(case: Case) -> None:
    batch = case.batch()
    fixed = {
        "old": batch.old.clone(),
        "advantages": batch.advantages.clone(),
        "rewards": batch.rewards.clone(),
        "weights": None if batch.weights is None else batch.weights.clone(),
    }
    others = {name: values.clone() for name, values in batch.others.items()}
    leaves = [leaf.requires_grad_() for leaf in [*fixed.values(), *others.values()] if leaf is not None]
    output = case.evaluate(replace(batch, **fixed, others=others))  # type: ignore[arg-type]
    gradients = torch.autograd.grad(output.loss_sum, leaves, allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    assert not any(item.requires_grad for pair in output.metrics.values() for item in pair)


@dataclass(frozen=True)
class Placement:
    """Where a batch's rows and columns lie in a larger grid. All the rest is padding, and holds no numbers."""

    rows: tuple[int, ...] = tuple(range(B))
    """The new place of each row."""
    num_rows: int = B
    left: int = 0
    right: int = 0

    def place(self, batch: Batch) -> Batch:
        trained = batch.mask > 0

        def tokens(values: Tensor, garbage: float) -> Tensor:
            grid = torch.full((self.num_rows, self.left + S + self.right), garbage, dtype=values.dtype)
            grid[list(self.rows), self.left : self.left + S] = torch.where(trained, values.detach(), garbage)
            return grid

        def per_row(values: Tensor) -> Tensor:
            column = torch.full((self.num_rows,), math.nan, dtype=values.dtype)
            column[list(self.rows)] = torch.where(trained.any(1), values, math.nan)
            return column

        return Batch(
            policy=tokens(batch.policy, math.nan).requires_grad_(),
            old=tokens(batch.old, -math.inf),
            mask=tokens(batch.mask, 0.0),
            advantages=per_row(batch.advantages),
            rewards=per_row(batch.rewards),
            weights=None if batch.weights is None else tokens(batch.weights, math.inf),
            others={name: tokens(values, math.nan) for name, values in batch.others.items()},
        )


PLACEMENTS = {
    "no numbers where untrained": Placement(),
    "padding columns": Placement(left=2, right=3),
    "padding rows": Placement(rows=(1, 2, 3, 5, 6, 8), num_rows=9),
    "other order": Placement(rows=(4, 0, 5, 1, 3, 2)),
}


@every_case
def test_padding_and_order_change_nothing(case: Case) -> None:
    batch = case.batch()
    whole = case.evaluate(batch)
    expected = slopes_of(whole, batch.policy)
    for name, placement in PLACEMENTS.items():
        placed = placement.place(batch)
        output = case.evaluate(placed)
        FLOAT64.assert_close(output.loss_sum, whole.loss_sum, name)
        assert int(output.count) == int(whole.count), name
        assert_same_metrics([output], whole)
        slopes = slopes_of(output, placed.policy)
        there = slopes[list(placement.rows), placement.left : placement.left + S]
        FLOAT64.assert_close(there, expected, name)
        assert bool((slopes[placed.mask == 0] == 0).all()), name


def rows_only(batch: Batch, rows: list[int], policy: Tensor) -> Batch:
    return Batch(
        policy[rows],
        batch.old[rows],
        batch.mask[rows],
        batch.advantages[rows],
        batch.rewards[rows],
        None if batch.weights is None else batch.weights[rows],
        {name: values[rows] for name, values in batch.others.items()},
    )


@every_case
def test_micro_batches_add_up(case: Case) -> None:
    batch = case.batch()
    whole = case.evaluate(batch)
    policy = batch.policy.detach().clone().requires_grad_()
    parts = [case.evaluate(rows_only(batch, rows, policy)) for rows in MICRO_BATCHES]
    for part in parts:
        part.loss_sum.backward()
    FLOAT64.assert_close(sum(part.loss_sum.detach() for part in parts), whole.loss_sum)
    assert sum(int(part.count) for part in parts) == int(whole.count)
    assert policy.grad is not None
    FLOAT64.assert_close(policy.grad, slopes_of(whole, batch.policy))
    assert_same_metrics(parts, whole)


@every_case
def test_data_parallel_shards_divide_once(case: Case) -> None:
    """Two replicas of a model with three weights: sums, counts and gradients are added up, then divided."""
    batch, expected = case.batch(), case.expected(case.batch())
    features = torch.randn(B, S, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    total, count, gradient = 0.0, 0, torch.zeros(3, dtype=torch.float64)
    for micro_batches in RANKS:
        weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for rows in micro_batches:
            policy = batch.policy.detach() + features @ weights
            output = case.evaluate(rows_only(batch, rows, policy))
            output.loss_sum.backward()
            total, count = total + float(output.loss_sum.detach()), count + int(output.count)
        assert weights.grad is not None
        gradient += weights.grad
    FLOAT64.assert_close(total / count, expected.total / expected.count)
    slopes = torch.from_numpy(expected.slopes)
    FLOAT64.assert_close(gradient / count, torch.einsum("bs,bsf->f", slopes, features) / expected.count)


@every_case
def test_an_empty_batch_gives_zero(case: Case) -> None:
    batch = case.batch()
    empty = Placement().place(replace(batch, mask=torch.zeros(B, S)))
    output = case.evaluate(empty)
    assert float(output.loss_sum.detach()) == 0 and int(output.count) == 0
    assert bool((slopes_of(output, empty.policy) == 0).all())
