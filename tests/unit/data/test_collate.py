from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_erpd.data.batch import collate, gather_response_rows, scatter_response_rows
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.errors import RolloutError
from megatron_erpd.model.forward import SequenceShard, at_positions

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
        seq_rows={"rewards": two.rewards[[0, 1]], "group": np.array([3, 4])},
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [6, 7, PAD, PAD]]
    assert batch.labels.tolist() == [[2, 3, 4, 5], [7, 8, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.token_rows["old_log_probs"].tolist() == [[0, 0, -0.5, -1], [-2, -3, 0, 0]]
    assert batch.seq_rows["rewards"].tolist() == [1, 0] and batch.seq_rows["rewards"].dtype == torch.float32
    assert batch.seq_rows["group"].tolist() == [3, 4] and batch.seq_rows["group"].dtype == torch.int64
    assert batch.row_indices.tolist() == [0, 1]
    assert batch.response_positions.tolist() == [1, 3, 4, 6]  # by position, then by row
    assert batch.packed_seq_params is None
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert all(t.is_contiguous() for t in (batch.tokens, batch.labels, batch.position_ids, batch.loss_mask))


def test_random_rows_against_a_loop(rollouts: Rollouts) -> None:
    indices = np.array([7, 0, 29, 13, 13])
    batch = collate(rollouts, indices, pad_token_id=0)
    assert batch.tokens.shape[1] == max(rollouts.lengths[indices]) - 1
    for b, i in enumerate(indices):
        prompt, response = rollouts.prompt_tokens(i).tolist(), rollouts.response_tokens(i).tolist()
        whole, trained = prompt + response, []
        for t in range(batch.tokens.shape[1]):
            if t < len(whole) - 1:
                assert batch.tokens[b, t] == whole[t] and batch.labels[b, t] == whole[t + 1]
            if batch.loss_mask[b, t]:
                trained.append(int(batch.labels[b, t]))
        assert trained == response
        assert batch.loss_mask[b].nonzero()[0] == len(prompt) - 1


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 64])
def test_pad_multiple_rounds_the_sequence_length(rollouts: Rollouts, multiple: int) -> None:
    plain, padded = (collate(rollouts, range(6), pad_token_id=0, pad_multiple=m) for m in (1, multiple))
    length = plain.tokens.shape[1]
    assert padded.tokens.shape[1] % multiple == 0 and 0 <= padded.tokens.shape[1] - length < multiple
    assert torch.equal(padded.tokens[:, :length], plain.tokens)
    assert padded.loss_mask.sum() == plain.loss_mask.sum() == rollouts.response_lengths[:6].sum()
    assert padded.loss_mask[:, length:].sum() == 0


def test_scatter_and_gather_are_inverse(rollouts: Rollouts) -> None:
    indices, rng = [4, 2, 19], np.random.default_rng(0)
    lengths = rollouts.response_lengths[indices]
    rows = {
        "flat": [rng.normal(size=n).astype(np.float32) for n in lengths],
        "half": [rng.normal(size=n).astype(np.float16) for n in lengths],
        "double": [rng.integers(0, 9, size=n).astype(np.float64) for n in lengths],
        "short": [rng.integers(-9, 9, size=(n, 3)).astype(np.int16) for n in lengths],
        "bytes": [rng.integers(0, 9, size=(n, 2)).astype(np.uint8) for n in lengths],
        "topk": [rng.normal(size=(n, 3)).astype(np.float32) for n in lengths],
        "ids": [rng.integers(0, 9, size=(n, 3)).astype(np.int32) for n in lengths],
    }
    batch = collate(rollouts, indices, pad_token_id=0, pad_multiple=16, token_rows=rows)
    for name, expected in rows.items():
        grid = batch.token_rows[name]
        kept = {"half": torch.float16, "short": torch.int16, "bytes": torch.uint8, "ids": torch.int64}
        assert grid.dtype == kept.get(name, torch.float32)
        assert torch.count_nonzero(grid[batch.loss_mask == 0]) == 0
        for got, row in zip(gather_response_rows(grid, batch), expected, strict=True):
            np.testing.assert_array_equal(got, row)


def test_gather_takes_gradients_and_bfloat16_and_owns_its_rows(rollouts: Rollouts) -> None:
    batch = collate(rollouts, [4, 2], pad_token_id=0)
    values = torch.randn(batch.tokens.shape, requires_grad=True)
    rows = gather_response_rows(values.to(torch.bfloat16), batch)
    assert [len(row) for row in rows] == rollouts.response_lengths[[4, 2]].tolist()
    assert rows[0].dtype == np.float32 and rows[0].base is None
    with pytest.raises(AssertionError, match="grid"):
        gather_response_rows(values[:, 1:], batch)


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
    tensors = [meta.tokens, meta.labels, meta.position_ids, meta.loss_mask, meta.row_indices]
    assert {t.device.type for t in [*tensors, meta.token_rows["x"], meta.seq_rows["r"]]} == {"meta"}
    assert batch.tokens.device.type == "cpu"


@pytest.mark.parametrize("size", [1, 2])
def test_positions_are_those_of_the_slice_that_the_model_sees(rollouts: Rollouts, size: int) -> None:
    trained, seen = np.arange(6) != 4, []
    for rank in range(size):
        batch = collate(
            rollouts, range(6), pad_token_id=PAD, pad_multiple=2 * size, trained=trained, context_parallel=(rank, size)
        )
        local = SequenceShard(rank, size).slice(batch)
        positions = local.response_positions
        assert bool((positions.diff() > 0).all())
        places = torch.arange(batch.tokens.numel()).view_as(batch.tokens)
        whole = at_positions(SequenceShard(rank, size).take(places), positions)
        assert torch.equal(at_positions(local.labels, positions), batch.labels.flatten()[whole])
        seen.append(whole)
    assert torch.equal(torch.cat(seen).sort().values, batch.loss_mask.flatten().nonzero().squeeze(-1))
    assert not batch.loss_mask[4].any() and batch.loss_mask[5].any()
