"""What a stage's process tells Megatron of its batches, and what it keeps out of the log."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from megatron_erpd import meeting
from megatron_erpd.errors import ErpdError, LayoutError
from megatron_erpd.model import runtime
from megatron_erpd.model.arguments import own_flags
from megatron_erpd.settings import Layout
from tests.distributed.harness import run_ranks
from tests.unit.launch.test_preflight import write_model


@pytest.mark.parametrize("layout", [{}, {"context_parallel": 3}, {"context_parallel": 3, "tensor_parallel": 2}])
def test_rollouts_as_long_as_the_context_fit_with_their_padding(layout: dict[str, int], tmp_path: Path) -> None:
    write_model(tmp_path)
    context = own_flags(tmp_path, Layout(), {}, [], 1)["max_position_embeddings"]
    assert isinstance(context, int)
    flags = own_flags(tmp_path, Layout(**layout), {}, [], context)  # type: ignore[arg-type]
    length, positions = flags["seq_length"], flags["max_position_embeddings"]
    assert isinstance(length, int) and isinstance(positions, int)
    assert positions == length >= context and length % (2 * Layout(**layout).num_processes) == 0  # type: ignore[arg-type]


def test_packs_of_virtual_stages_are_no_fewer_than_pipeline_stages(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=4)
    layout, run = Layout(pipeline_parallel=2, micro_batch_tokens=64), {"global_batch_size": 3}
    flags = ["--num-virtual-stages-per-pipeline-rank", "2"]
    assert own_flags(tmp_path, layout, run, flags, 2)
    with pytest.raises(LayoutError, match=r"^--microbatch-group-size-per-virtual-pipeline-stage 1: is less than"):
        own_flags(tmp_path, layout, run, [*flags, "--microbatch-group-size-per-virtual-pipeline-stage", "1"], 2)


def one_layout(rank: int, world_size: int) -> str:
    """What a rank is told whose GPU has less memory than the others'."""
    with meeting.meeting(None):
        runtime.check_same_layout(Layout(micro_batch_tokens=4096, data_parallel=2))
        try:
            runtime.check_same_layout(Layout(micro_batch_tokens=4096 if rank == 0 else 2048, data_parallel=2))
        except ErpdError as error:
            return str(error)
    return ""


def test_ranks_of_one_layout() -> None:
    told = run_ranks(one_layout, 2)
    assert told[0] == told[1] and "rank 1 has micro_batch_tokens 2048 and not 4096, as rank 0 has" in told[0]


def collectives_of_a_stage(rank: int, world_size: int) -> list[str]:
    """Runs the collectives whose names PyTorch has changed; what is said of it."""
    from megatron_erpd.model.runtime import stage_process

    warnings.simplefilter("always")
    values, own = torch.ones(2), torch.empty(1)
    with warnings.catch_warnings(record=True) as said, stage_process():
        torch.distributed.all_gather_into_tensor(values, own)
        torch.distributed.reduce_scatter_tensor(own, values)
    return [str(warning.message) for warning in said]


def test_former_names_of_collectives_are_no_news() -> None:
    assert run_ranks(collectives_of_a_stage, 2) == [[], []]
