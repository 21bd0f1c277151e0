"""Packs hold every rollout of a step once, within the budget, in few packs, with the same work on every rank."""

import itertools
from itertools import islice

import numpy as np
import pytest

from megatron_erpd.data.batch import packer
from megatron_erpd.data.packs import Packer
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.settings import Layout

LENGTHS = np.random.default_rng(0).lognormal(np.log(100), 1, size=1000).clip(2, 1600).astype(np.int64)
"""Spread as those of reasoning are."""
GLOBAL_BATCH, STEPS = 64, 20
SOME = np.random.default_rng(1).random(1000) < 0.01
"""With these alone about half of the batches are passed over."""


def order(trained: np.ndarray | None = None) -> BatchOrder:
    return BatchOrder(LENGTHS, GLOBAL_BATCH, 5, trained)


def packs_of(budget: int, attention_length: float = 600) -> Packer:
    return Packer(LENGTHS, LENGTHS * (1 + LENGTHS / attention_length), budget)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("trained", [None, SOME])
@pytest.mark.parametrize("budget", [100, 1600, 4000, 100_000])
def test_each_rank_and_micro_step_has_a_pack_and_each_row_is_in_one(
    ranks: int, trained: np.ndarray | None, budget: int
) -> None:
    packing, steps = packs_of(budget), 6
    count = order(trained).most_packs(packing, steps, ranks)
    dealt = [list(islice(order(trained).packs(0, packing, count, r, ranks), steps * count)) for r in range(ranks)]
    expected = list(islice(order(trained).micro_batches(0, GLOBAL_BATCH, 0, 1), steps))
    for step, rows in enumerate(expected):
        packs = [pack for of_rank in dealt for pack in of_rank[step * count : (step + 1) * count]]
        np.testing.assert_array_equal(np.sort(np.concatenate(packs)), np.sort(rows))
        assert all(pack.dtype == np.int64 for pack in packs)
        assert all(len(pack) < 2 or LENGTHS[pack].sum() <= budget for pack in packs)
    # Each rank's heaviest pack is its first, of which memory is known after one micro-step.
    for of_rank in dealt:
        work = np.array([packing.work[pack].sum() for pack in of_rank]).reshape(steps, count)
        assert (np.diff(work) <= 0).all()


def test_more_ranks_than_rows_leave_empty_packs() -> None:
    dealt = packs_of(1600).deal(np.arange(3), 5, 2)
    assert sorted(len(pack) for step in dealt for pack in step) == [0] * 7 + [1] * 3


@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("budget", [1600, 3200, 6400])
def test_one_number_of_packs_the_largest_that_a_step_needs(ranks: int, budget: int) -> None:
    packing = packs_of(budget)
    needed = [packing.packs_per_rank(order().global_batch(number * GLOBAL_BATCH), ranks) for number in range(STEPS)]
    by_volume = [
        -(-int(LENGTHS[order().global_batch(number * GLOBAL_BATCH)].sum()) // (budget * ranks))
        for number in range(STEPS)
    ]
    assert order().most_packs(packing, STEPS, ranks) == max(needed)
    assert all(volume <= found <= volume + 1 for volume, found in zip(by_volume, needed, strict=True))
    # With one pack less there is no room, or none was found.
    tightest = order().global_batch(int(np.argmax(needed)) * GLOBAL_BATCH)
    with pytest.raises(AssertionError, match="too few packs"):
        packing.deal(tightest, ranks, max(needed) - 1)


def test_packs_after_a_resumption_are_the_rest() -> None:
    packing, ranks = packs_of(1600), 2
    count = order().most_packs(packing, STEPS, ranks)
    for rank in range(ranks):
        whole = list(islice(order().packs(0, packing, count, rank, ranks), STEPS * count))
        for done in (1, 7):
            rest = order().packs(done * GLOBAL_BATCH, packing, count, rank, ranks)
            for expected, pack in zip(whole[done * count :], rest, strict=False):
                np.testing.assert_array_equal(pack, expected)


@pytest.mark.parametrize(("ranks", "count"), [(2, 1), (3, 1), (2, 2), (2, 3)])
def test_work_is_within_grahams_bound_of_the_best(ranks: int, count: int) -> None:
    """Longest processing time first: at most 4/3 - 1/(3m) of the shortest that the longest of m can be."""
    draw = np.random.default_rng(ranks)
    for _ in range(30):
        packing = Packer(np.ones(8, np.int64), draw.integers(1, 20, 8).astype(float), 100)
        steps = packing.deal(np.arange(8), ranks, count)
        own = [np.concatenate(packs) for packs in zip(*steps, strict=True)]
        longest = max(packing.work[rows].sum() for rows in own)
        assert longest <= (4 / 3 - 1 / (3 * ranks)) * shortest(packing.work, ranks)
        for rank, rows in enumerate(own):
            longest = max(packing.work[step[rank]].sum() for step in steps)
            assert longest <= (4 / 3 - 1 / (3 * count)) * shortest(packing.work[rows], count)


def shortest(work: np.ndarray, machines: int) -> float:
    """The least that the largest sum can be, over all assignments of the work to machines."""
    assigned = np.array(list(itertools.product(range(machines), repeat=len(work))))
    sums = np.stack([(work * (assigned == machine)).sum(1) for machine in range(machines)])
    return float(sums.max(0).min())


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("attention_length", [600, 2000, np.inf])
@pytest.mark.parametrize("budget", [1600, 3200])
def test_ranks_have_the_same_work(ranks: int, attention_length: float, budget: int) -> None:
    packing, batches = packs_of(budget, attention_length), BatchOrder(LENGTHS, 256, 5)
    count = batches.most_packs(packing, 12, ranks)
    for number in range(12):
        rows = batches.global_batch(number * 256)
        work = [
            sum(packing.work[pack].sum() for pack in packs)
            for packs in zip(*packing.deal(rows, ranks, count), strict=True)
        ]
        assert max(work) <= 1.01 * np.mean(work)


def test_packs_that_must_be_full_are_filled_first() -> None:
    tokens = np.array([5, 5, 4, 3, 3])  # by the least work: 5 4, 5 3, and no room for 3
    packing = Packer(tokens, tokens.astype(float), 10)
    assert packing.packs_per_rank(np.arange(5), 2) == 1
    assert sorted(sorted(tokens[pack].tolist()) for pack in packing.deal(np.arange(5), 2, 1)[0]) == [[3, 3, 4], [5, 5]]
    assert [pack.tolist() for pack in packing.fill(np.arange(5))] == [[0, 1], [2, 3, 4]]
    # A rank takes no more packs than it may, however little work is in them.
    tokens = np.array([5, 10, 10, 4, 5, 3, 3])
    first, second = Packer(tokens, np.array([100.0, 1, 1, 1, 1, 1, 1]), 10).deal(np.arange(7), 2, 2)
    assert [pack.tolist() for pack in (*first, *second)] == [[0, 4], [3, 5, 6], [2], [1]]
    # Of many rollouts.
    every = np.arange(len(LENGTHS))
    filled = packs_of(1600).fill(every)
    assert len(filled) == -(-int(LENGTHS.sum()) // 1600)
    np.testing.assert_array_equal(np.sort(np.concatenate(filled)), every)


def test_a_pack_is_no_longer_than_the_budget_when_it_is_rounded_up() -> None:
    layout = Layout(tensor_parallel=2, context_parallel=2, sequence_parallel=True, micro_batch_tokens=1001)
    packing = packer(layout, np.array([2, 5, 6]), np.inf)
    assert packing.tokens.tolist() == [4, 4, 8]
    assert packing.max_tokens == 2000  # of 2 x 1001, and packs are multiples of 8
