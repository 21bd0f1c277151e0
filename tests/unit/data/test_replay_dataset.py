from itertools import islice

import numpy as np
import pytest

from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.errors import LayoutError, RolloutError

LENGTHS = np.random.default_rng(0).integers(2, 200, size=37)
GLOBAL_BATCH = 12


def order(seed: int = 5, global_batch_size: int = GLOBAL_BATCH) -> BatchOrder:
    return BatchOrder(LENGTHS, global_batch_size, seed)


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (2, 1), (12, 1), (1, 2), (3, 2), (1, 12), (2, 3), (6, 2), (1, 4)])
def test_ranks_and_micro_steps_make_up_the_slice_of_the_stream(mbs: int, dp: int) -> None:
    batches, steps = 8, GLOBAL_BATCH // (mbs * dp)
    ranks = [list(islice(order().micro_batches(0, mbs, rank, dp), batches * steps)) for rank in range(dp)]
    assert all(rows.shape == (mbs,) and rows.dtype == np.int64 for rank in ranks for rows in rank)
    for i in range(batches):
        dealt = np.concatenate([rank[i * steps + k] for k in range(steps) for rank in ranks])
        expected = order().stream(i * GLOBAL_BATCH, GLOBAL_BATCH)
        np.testing.assert_array_equal(np.sort(dealt), np.sort(expected))
        # Dealt in micro-step, rank order the rows are the sorted batch: similar lengths run side by side.
        assert (np.diff(LENGTHS[dealt]) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_each_epoch_holds_each_row_once(seed: int) -> None:
    stream = order(seed).stream(0, 4 * 37)
    for epoch in range(4):
        np.testing.assert_array_equal(np.sort(stream[epoch * 37 : (epoch + 1) * 37]), np.arange(37))
        np.testing.assert_array_equal(stream[epoch * 37 : (epoch + 1) * 37], order(seed).permutation(epoch))
    assert not np.array_equal(stream[:37], stream[37:74])
    assert not np.array_equal(stream[:37], order(seed + 1).stream(0, 37))


def test_permutation_does_not_depend_on_lengths_or_batch_size() -> None:
    other = BatchOrder(LENGTHS[::-1], 5, 5)
    np.testing.assert_array_equal(other.permutation(3), order().permutation(3))


def test_permutation_is_pinned() -> None:
    # A run resumed under another numpy must see the same order: this must never change.
    assert BatchOrder([1] * 8, 4, 7).permutation(1).tolist() == [1, 3, 2, 7, 4, 5, 0, 6]


def test_permutations_are_close_to_uniform() -> None:
    first = np.array([BatchOrder([1] * 4, 4, seed).permutation(0) for seed in range(2000)])
    counts = np.array([[(first[:, position] == row).sum() for row in range(4)] for position in range(4)])
    # Each is binomial(2000, 1/4): standard deviation 19.4; five of them.
    assert np.abs(counts - 500).max() < 97


@pytest.mark.parametrize(("mbs", "dp"), [(2, 2), (3, 1), (1, 4)])
def test_resume_from_the_middle_continues_identically(mbs: int, dp: int) -> None:
    steps = GLOBAL_BATCH // (mbs * dp)
    for rank in range(dp):
        whole = list(islice(order().micro_batches(0, mbs, rank, dp), 10 * steps))
        for done in (1, 4, 7):
            resumed = order().micro_batches(done * GLOBAL_BATCH, mbs, rank, dp)
            for expected, got in zip(whole[done * steps :], resumed, strict=False):
                np.testing.assert_array_equal(got, expected)


def test_resume_under_another_global_batch_size_neither_skips_nor_repeats() -> None:
    first = order().global_batch(0)
    rest = list(islice(BatchOrder(LENGTHS, 5, 5).micro_batches(GLOBAL_BATCH, 5, 0, 1), 5))
    np.testing.assert_array_equal(np.sort(np.concatenate([first, *rest])), np.arange(37))


def test_batch_larger_than_the_data() -> None:
    rows = BatchOrder([3, 2, 1], 8, 0).global_batch(0)
    assert np.bincount(rows).sum() == 8 and np.bincount(rows[:]).min() >= 2


def test_memory_is_a_few_permutations_however_long_the_run() -> None:
    long = order()
    for _ in islice(long.micro_batches(0, 12, 0, 1), 500):
        assert len(long._permutations) <= 2


@pytest.mark.parametrize("mbs", [2, 4, 8])
def test_sorting_pads_less(mbs: int) -> None:
    lengths = np.random.default_rng(1).integers(10, 2000, size=256)
    batches = BatchOrder(lengths, 64, 0)
    unsorted = batches.stream(0, 256).reshape(-1, mbs)
    in_order = np.stack(list(islice(batches.micro_batches(0, mbs, 0, 1), 256 // mbs)))

    def padding(micro_batches: np.ndarray) -> int:
        tokens = lengths[micro_batches]
        return int((tokens.max(axis=1, keepdims=True) - tokens).sum())

    assert padding(in_order) < 0.4 * padding(unsorted)


def test_bad_layouts_are_errors_at_the_call() -> None:
    with pytest.raises(LayoutError, match="isn't a multiple of micro-batch size 5 x data-parallel size 1"):
        order().micro_batches(0, 5, 0, 1)
    with pytest.raises(LayoutError, match="dp_rank=2"):
        order().micro_batches(0, 1, 2, 2)
    with pytest.raises(LayoutError, match="consumed_samples is -1"):
        order().micro_batches(-1, 1, 0, 1)
    with pytest.raises(LayoutError, match="global_batch_size is 0"):
        BatchOrder([1], 0, 0)
    with pytest.raises(LayoutError, match="seed is -1"):
        BatchOrder([1], 1, -1)
    with pytest.raises(RolloutError, match="lengths"):
        BatchOrder([], 1, 0)


@pytest.mark.parametrize(("trained", "num_steps"), [([36], 12), ([0, 5, 20], 40), (range(36), 30)])
def test_a_batch_without_a_trained_row_is_passed_over_and_the_others_stay(trained, num_steps: int) -> None:
    takes_part = np.isin(np.arange(37), list(trained))
    all_batches = [order().global_batch(i * GLOBAL_BATCH) for i in range(300)]
    expected = [rows for rows in all_batches if takes_part[rows].any()]
    some = BatchOrder(LENGTHS, GLOBAL_BATCH, 5, takes_part)
    assert some.num_batches(300) == len(expected) >= num_steps
    for dp in (1, 2):
        ranks = [islice(some.micro_batches(0, 6, rank, dp), 2 // dp * num_steps) for rank in range(dp)]
        seen = [np.concatenate(parts) for parts in zip(*ranks, strict=True)]
        np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(expected[:num_steps]))
    # Resumed after any step, by an order that has seen none before.
    for step in (1, 7, num_steps - 1):
        resumed = BatchOrder(LENGTHS, GLOBAL_BATCH, 5, takes_part).global_batch(step * GLOBAL_BATCH)
        np.testing.assert_array_equal(resumed, expected[step])


def test_without_such_batches_the_order_is_the_plain_one() -> None:
    # One of 12 rows is enough: rows 0..35 are in every batch.
    some = BatchOrder(LENGTHS, GLOBAL_BATCH, 5, np.arange(37) < 36)
    for step in range(20):
        np.testing.assert_array_equal(some.global_batch(step * GLOBAL_BATCH), order().global_batch(step * GLOBAL_BATCH))
    with pytest.raises(RolloutError, match="none of the 37 rollouts"):
        BatchOrder(LENGTHS, GLOBAL_BATCH, 5, np.zeros(37, bool))
