"""What a dry run says of every rank against what Megatron-Core builds there, tensor by tensor.

Megatron is built rank after rank in one process, over process groups that talk to nobody, on a device without memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_erpd.checkpoint.dry_run import dry_run
from megatron_erpd.checkpoint.mapping.config import model_flags, read_model_shape
from megatron_erpd.checkpoint.mapping.parallel_layout import pipeline_flags
from megatron_erpd.checkpoint.mapping.rank_shards import Sharding
from megatron_erpd.settings import Layout
from tests.distributed.checkpoint.published import PUBLISHED
from tests.distributed.checkpoint.tiny_models import build_megatron_model, save_hf_model, set_layout
from tests.forked import CONTEXT

Shards = list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Key, shape of the whole, shape of the part, and where it begins."""

LARGE = {
    "llama-3.1-70b": (Layout(tensor_parallel=8, pipeline_parallel=4), list(range(32))),
    "qwen2.5-72b": (Layout(tensor_parallel=8, pipeline_parallel=4), list(range(32))),
    "qwen3-235b-a22b": (
        Layout(tensor_parallel=8, pipeline_parallel=4, expert_parallel=8),
        [0, 5, 10, 15, 16, 21, 26, 31],
    ),
}
"""Model to layout and the ranks that are looked at; of the last, every stage and each rank of TP and EP once."""

SMALL = {
    "qwen3-tied": (Layout(pipeline_parallel=2, data_parallel=2), 1),
    "qwen3-untied": (Layout(pipeline_parallel=2, tensor_parallel=2), 2),
    "qwen3-moe": (Layout(pipeline_parallel=2, data_parallel=4, tensor_parallel=2, expert_parallel=4), 1),
    "mixtral": (Layout(pipeline_parallel=2, data_parallel=2, expert_parallel=2), 1),
}
"""Model to layout and virtual stages; all ranks are looked at."""


def megatron_shards(folder: Path, layout: Layout, virtual_stages: int, ranks: Sequence[int]) -> list[list[Shards]]:
    """By rank and chunk, what the state of Megatron's model consists of."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_erpd import platform

    platform.enable_cpu()
    sizes = (layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel)
    flags = {**model_flags(folder, *sizes), **pipeline_flags_of(folder, layout, virtual_stages)}
    chunks = virtual_stages if virtual_stages > 1 else None
    found = []
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.num_processes)
        set_layout(*sizes[:2], chunks, layout.expert_parallel, create_gloo_process_groups=False)
        found.append([chunk_shards(flags, chunks, number if chunks else None) for number in range(virtual_stages)])
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def pipeline_flags_of(folder: Path, layout: Layout, virtual_stages: int) -> dict[str, Any]:
    return pipeline_flags(read_model_shape(folder).num_layers, layout.pipeline_parallel, virtual_stages)


def chunk_shards(flags: dict[str, Any], chunks: int | None, number: int | None) -> Shards:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    with torch.device("meta"):
        model = build_megatron_model(flags, chunks, number, perform_initialization=False)
        state = model.sharded_state_dict()
        tensors: list[ShardedTensor] = []
        for value in state.values():
            tensors += value.build() if isinstance(value, ShardedTensorFactory) else [value]
    return sorted(
        (t.key, tuple(t.global_shape), tuple(t.local_shape), tuple(t.global_offset))
        for t in tensors
        if isinstance(t, ShardedTensor)
    )


def planned_shards(folder: Path, layout: Layout, virtual_stages: int, ranks: Sequence[int]) -> list[list[Shards]]:
    sharding = Sharding(read_model_shape(folder), layout, virtual_stages)
    return [
        [
            sorted((shard.unit.key, shard.global_shape, shard.local_shape, shard.offset) for shard in chunk)
            for chunk in sharding.chunks(sharding.coordinates(rank))
        ]
        for rank in ranks
    ]


def assert_same(ours: list[list[Shards]], theirs: list[list[Shards]], ranks: Sequence[int]) -> None:
    for rank, mine, built in zip(ranks, ours, theirs, strict=True):
        assert len(mine) == len(built)
        for chunk, (a, b) in enumerate(zip(mine, built, strict=True)):
            assert a and len(set(a)) == len(a)
            # Sets: pytest would take minutes to tell two long lists apart.
            assert set(a) == set(b), f"rank {rank}, chunk {chunk}: {sorted(set(a) ^ set(b))[:4]}"


@pytest.fixture(scope="module")
def megatron() -> Any:
    """A process in which Megatron is built. Its process groups are global."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        yield lambda *args: pool.submit(megatron_shards, *args).result()


@pytest.mark.parametrize("name", LARGE)
def test_ranks_of_a_large_model(name: str, megatron: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    layout, ranks = LARGE[name]
    assert layout.num_processes == 32
    assert_same(planned_shards(tmp_path, layout, 1, ranks), megatron(tmp_path, layout, 1, ranks), ranks)


@pytest.mark.parametrize("name", SMALL)
def test_all_ranks_of_a_small_model(name: str, megatron: Any, tmp_path: Path) -> None:
    save_hf_model(name, tmp_path)
    layout, virtual_stages = SMALL[name]
    ranks = range(layout.num_processes)
    ours = planned_shards(tmp_path, layout, virtual_stages, ranks)
    assert_same(ours, megatron(tmp_path, layout, virtual_stages, ranks), ranks)
    # The dry run's sums are those of the ranks.
    found = dry_run(tmp_path, layout, virtual_stages)
    sharding = Sharding(read_model_shape(tmp_path), layout, virtual_stages)
    for rank in ranks:
        place = sharding.coordinates(rank)
        held = sum(shard.size for chunk in sharding.chunks(place) for shard in chunk)
        assert found.stages[place.pipeline].parameters == held
