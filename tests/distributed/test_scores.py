"""Rows of the teacher cache from sequences spread over context-parallel ranks, and the output layer's digest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_erpd.data.batch import Batch, rank_positions
from megatron_erpd.model.forward import HiddenStates, SequenceShard
from megatron_erpd.precompute.scores import Scores, hidden_states, output_layer_digest, response_states
from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.vocab_parallel import VocabShard
from tests.batches import grid_batch
from tests.distributed.harness import run_ranks
from tests.tolerances import FP32

S, B, H, VOCAB = 16, 3, 5, 11


def make_batch(rank: int, world_size: int) -> Batch:
    """The second row's response lies in one rank's positions alone; the third has none."""
    labels = torch.arange(B * S).reshape(B, S) % VOCAB
    mask = torch.zeros(B, S)
    mask[0, 3:14], mask[1, 4:7] = 1, 1
    return grid_batch(labels, mask, context_parallel=(rank, world_size))


def rows_of_a_rank(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    sequence = SequenceShard.here()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, H, generator=generator)
    whole = [torch.randn(B, S, H, generator=generator) for _ in range(2)]
    own = [grid[:, rank_positions(S, rank, world_size)] for grid in whole]
    batch = make_batch(rank, world_size)
    states = [HiddenStates(grid.transpose(0, 1).flatten(0, 1), weight) for grid in own]
    scores = Scores(PrecomputeSettings(k=4, delta=0.1), ["base", "teacher"], VocabShard.dense(VOCAB, VOCAB), sequence)
    found = scores.target(batch, states) | {"teacher": scores.log_probs(batch, states[1])}
    kept = response_states(batch, states[1], sequence)
    again = hidden_states(batch, kept, weight)
    positions = batch.response_positions
    assert torch.equal(again.rows[positions], states[1].rows[positions])
    parallel_state.destroy_model_parallel()
    return found | {"hidden": [row.numpy() for row in kept]}


def test_context_parallel_ranks_give_whole_rows() -> None:
    expected = run_ranks(rows_of_a_rank, 1)[0]
    for found in run_ranks(rows_of_a_rank, 2):
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            assert [len(row) for row in found[name]] == [11, 3, 0]
            for a, b in zip(found[name], rows, strict=True):
                FP32.assert_close(torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b)), name)


def digest_of_a_rank(rank: int, world_size: int, change: float) -> str:
    """The layer is padded to a multiple of the ranks; what is in the padding doesn't count."""
    width = -(-VOCAB // world_size)
    layer = torch.randn(VOCAB, H, generator=torch.Generator().manual_seed(1))
    layer[VOCAB - 1, 0] += change
    padded = torch.full((world_size * width, H), float(rank + world_size))
    padded[:VOCAB] = layer
    group = torch.distributed.group.WORLD
    shard = VocabShard(rank * width, (rank + 1) * width, VOCAB, group)
    return output_layer_digest(padded[shard.start : shard.end], shard)


def test_the_digest_of_the_output_layer_is_the_same_under_any_tensor_parallelism() -> None:
    digests = [d for world_size in (1, 2, 4) for d in run_ranks(digest_of_a_rank, world_size, 0.0)]
    assert len(digests) == 7 and len(set(digests)) == 1
    assert run_ranks(digest_of_a_rank, 2, 1e-6)[0] != digests[0]
