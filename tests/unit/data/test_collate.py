from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_erpd.data.batch import Batch, Padding, collate, rank_positions, scatter_response_rows
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.errors import RolloutError

PAD = 9


@pytest.fixture
def two(tmp_path: Path) -> Rollouts:
    rows = [
        {"prompt_token_ids": [1, 2, 3], "response_token_ids": [4, 5], "group_id": 0, "reward": 1.0},
        {"prompt_token_ids": [6], "response_token_ids": [7, 8], "group_id": 0, "reward": 0.0},
    ]
    write_rollouts(tmp_path / "two.parquet", rows)
    return read_rollouts(tmp_path / "two.parquet")


def test_grid_by_hand(two: Rollouts) -> None:
    batch = collate(
        two,
        [0, 1],
        pad_token_id=PAD,
        token_rows={"old_log_probs": [np.array([-0.5, -1.0], np.float32), np.array([-2.0, -3.0], np.float32)]},
        target_rows={"ids": [np.array([[4, 40], [5, 50]]), np.array([[7, 70], [8, 80]])]},
        seq_rows={"rewards": two.rewards[[0, 1]], "group": np.array([3, 4])},
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [6, 7, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.token_rows["old_log_probs"].tolist() == [[0, 0, -0.5, -1], [-2, -3, 0, 0]]
    assert batch.seq_rows["rewards"].tolist() == [1, 0] and batch.seq_rows["rewards"].dtype == torch.float32
    assert batch.seq_rows["group"].tolist() == [3, 4] and batch.seq_rows["group"].dtype == torch.int64
    assert batch.row_indices.tolist() == [0, 1]
    assert batch.response_positions.tolist() == [1, 3, 4, 6]  # by position, then by row
    assert batch.response_places.tolist() == [4, 5, 2, 3]
    assert batch.labels.tolist() == [7, 8, 4, 5]
    assert batch.target_rows["ids"].tolist() == [[7, 70], [8, 80], [4, 40], [5, 50]]
    assert batch.response_order().tolist() == [2, 3, 0, 1]
    assert batch.segments is None and batch.segment_ends is None
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert all(t.is_contiguous() for t in (batch.tokens, batch.position_ids, batch.loss_mask))


def test_pack_by_hand(two: Rollouts) -> None:
    batch = collate(
        two,
        [0, 1],
        pad_token_id=PAD,
        packed=True,
        padding=Padding(sequence=1, total=8),
        token_rows={"old_log_probs": [np.array([-0.5, -1.0], np.float32), np.array([-2.0, -3.0], np.float32)]},
        target_rows={"ids": [np.array([[4, 40], [5, 50]]), np.array([[7, 70], [8, 80]])]},
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 6, 7, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert batch.segments == (4, 2, 2)  # the last is of no rollout
    assert batch.segment_ends is not None and batch.segment_ends.tolist() == [0, 4, 6, 8]
    assert batch.segment_ends.dtype == torch.int32
    assert batch.loss_mask[:, :4].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch.response_positions.tolist() == [2, 3, 4, 5]
    assert batch.labels.tolist() == [4, 5, 7, 8]
    assert batch.target_rows["ids"].tolist() == [[4, 40], [5, 50], [7, 70], [8, 80]]
    assert batch.response_order().tolist() == [0, 1, 2, 3]
    assert batch.token_rows["old_log_probs"][:, :4].tolist() == [[0, 0, -0.5, -1], [-2, -3, 0, 0]]


def read_as(batch: Batch, rank: int, size: int) -> list[tuple[int, int]]:
    """Of each row of the model's hidden states: which of the batch's rollouts it is of, and which position."""
    if batch.segments is None:
        b, s = batch.loss_mask.shape
        positions = rank_positions(s, rank, size).tolist() if size > 1 else range(s)
        return [(row, position) for position in positions for row in range(b)]
    found = []
    for row, length in enumerate(batch.segments):
        found += [(row, p) for p in (rank_positions(length, rank, size).tolist() if size > 1 else range(length))]
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_random_rows_against_a_loop(rollouts: Rollouts, packed: bool, size: int) -> None:
    """Every response token of a trained rollout is predicted once, on one rank, from the token before it."""
    indices, trained = np.array([7, 0, 29, 13, 13]), np.array([True, True, False, True, True])
    padding = Padding(2 * size, 6 * size) if size > 1 else Padding(1, 3)
    targets = [np.arange(3 * n).reshape(n, 3) + 100 * i for i, n in enumerate(rollouts.response_lengths[indices])]
    seen = []
    for rank in range(size):
        batch = collate(
            rollouts,
            indices,
            pad_token_id=0,
            padding=padding,
            packed=packed,
            target_rows={"x": targets},
            trained=trained,
            context_parallel=(rank, size),
        )
        rows = read_as(batch, rank, size)
        held = batch.tokens.T.flatten().tolist()
        assert len(held) == len(rows) and len(held) % (padding.total // size) == 0
        for token, position_id, (row, position) in zip(
            held, batch.position_ids.T.flatten().tolist(), rows, strict=True
        ):
            assert position_id == position
            if row < len(indices):
                prompt, response = rollouts.prompt_tokens(indices[row]), rollouts.response_tokens(indices[row])
                whole = [*prompt.tolist(), *response.tolist()]
                assert token == (whole[position] if position < len(whole) - 1 else 0)
        assert bool((batch.response_positions.diff() > 0).all())
        length = batch.loss_mask.shape[1]
        for at, place, label, target in zip(
            batch.response_positions.tolist(),
            batch.response_places.tolist(),
            batch.labels.tolist(),
            batch.target_rows["x"].tolist(),
            strict=True,
        ):
            row, position = rows[at]
            assert place == row * length + position and trained[row]
            number = position + 1 - rollouts.prompt_lengths[indices[row]]
            assert label == rollouts.response_tokens(indices[row])[number]
            assert target == targets[row][number].tolist()
        seen += batch.response_places.tolist()
    assert sorted(seen) == batch.loss_mask.flatten().nonzero().squeeze(-1).tolist()
    assert batch.loss_mask.sum(dim=1).tolist() == (rollouts.response_lengths[indices] * trained).tolist()


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 64])
def test_pad_multiple_rounds_the_sequence_length(rollouts: Rollouts, multiple: int) -> None:
    plain, padded = (collate(rollouts, range(6), pad_token_id=0, padding=Padding(m, m)) for m in (1, multiple))
    length = plain.tokens.shape[1]
    assert padded.tokens.shape[1] % multiple == 0 and 0 <= padded.tokens.shape[1] - length < multiple
    assert torch.equal(padded.tokens[:, :length], plain.tokens)
    assert padded.loss_mask.sum() == plain.loss_mask.sum() == rollouts.response_lengths[:6].sum()
    assert padded.loss_mask[:, length:].sum() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_rows_keep_their_types(rollouts: Rollouts, packed: bool) -> None:
    indices, rng = [4, 2, 19], np.random.default_rng(0)
    lengths = rollouts.response_lengths[indices]
    rows = {
        "flat": [rng.normal(size=n).astype(np.float32) for n in lengths],
        "half": [rng.normal(size=n).astype(np.float16) for n in lengths],
        "double": [rng.integers(0, 9, size=n).astype(np.float64) for n in lengths],
        "short": [rng.integers(-9, 9, size=n).astype(np.int16) for n in lengths],
        "bytes": [rng.integers(0, 9, size=n).astype(np.uint8) for n in lengths],
        "ids": [rng.integers(0, 9, size=n).astype(np.int32) for n in lengths],
    }
    wide = {name: [np.stack([row, row], -1) for row in values] for name, values in rows.items()}
    batch = collate(
        rollouts, indices, pad_token_id=0, padding=Padding(1, 16), packed=packed, token_rows=rows, target_rows=wide
    )
    kept = {"half": torch.float16, "short": torch.int16, "bytes": torch.uint8, "ids": torch.int64}
    for name, expected in rows.items():
        grid, values = batch.token_rows[name], batch.target_rows[name]
        assert grid.dtype == values.dtype == kept.get(name, torch.float32)
        assert torch.count_nonzero(grid[batch.loss_mask == 0]) == 0
        np.testing.assert_array_equal(grid[batch.loss_mask > 0], np.concatenate(expected))
        assert torch.equal(values[:, 0], grid.flatten()[batch.response_places]) and values.shape[1] == 2


def test_scatter_alone() -> None:
    grid = scatter_response_rows([np.array([1, 2]), np.array([3])], [0, 2], 4)
    assert grid.tolist() == [[1, 2, 0, 0], [0, 0, 3, 0]]


def test_rows_of_other_rollouts_are_refused_by_name(rollouts: Rollouts) -> None:
    wrong = [np.zeros(n + 1, np.float32) for n in rollouts.response_lengths[[4, 2]]]
    with pytest.raises(RolloutError, match=rf"teacher_log_probs: .* of sample {rollouts.sample_ids[4]}"):
        collate(rollouts, [4, 2], pad_token_id=0, token_rows={"teacher_log_probs": wrong})
    with pytest.raises(RolloutError, match="1 rows for a batch of 2"):
        collate(rollouts, [4, 2], pad_token_id=0, token_rows={"x": wrong[:1]})
    with pytest.raises(RolloutError, match="advantages: shape"):
        collate(rollouts, [4, 2], pad_token_id=0, seq_rows={"advantages": [1.0]})


def test_to_moves_every_tensor(two: Rollouts) -> None:
    rows = [np.zeros(2, np.float32)] * 2
    batch = collate(two, [0, 1], pad_token_id=PAD, token_rows={"x": rows}, seq_rows={"r": two.rewards})
    meta = batch.to("meta")
    tensors = [meta.tokens, meta.labels, meta.position_ids, meta.loss_mask, meta.row_indices, meta.response_places]
    assert {t.device.type for t in [*tensors, meta.token_rows["x"], meta.seq_rows["r"]]} == {"meta"}
    assert batch.tokens.device.type == "cpu"
