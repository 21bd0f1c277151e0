"""Layers, heads and experts among the ranks of a layout."""

from __future__ import annotations

import pytest

from megatron_erpd.checkpoint.mapping.families import FAMILIES
from megatron_erpd.checkpoint.mapping.parallel_layout import (
    Schedule,
    check_expert_groups,
    check_schedule,
    pipeline_flags,
    read_schedule,
    stage_layers,
)
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.errors import LayoutError
from megatron_erpd.settings import Layout

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_heads": 4,
    "num_query_groups": 4,
    "head_dim": 4,
    "vocab_size": 11,
}
DENSE = ModelShape(FAMILIES["LlamaForCausalLM"], **SIZES, tied_embeddings=False)
GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
MIXTURE = ModelShape(FAMILIES["MixtralForCausalLM"], **SIZES, tied_embeddings=False, num_experts=8)


def test_stages_are_contiguous_and_chunks_interleaved() -> None:
    assert stage_layers(8, 2) == [[range(0, 4)], [range(4, 8)]]
    assert stage_layers(8, 2, 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layers", [1, 4, 7, 10, 94])
def test_every_layer_is_on_one_stage(layers: int, pipeline: int, virtual: int) -> None:
    chunks = pipeline * virtual
    try:
        stages = stage_layers(layers, pipeline, virtual)
    except LayoutError:
        assert all((layers + spare) % chunks or (layers + spare) // chunks <= bool(spare) for spare in range(3))
        return
    assert sorted(layer for stage in stages for chunk in stage for layer in chunk) == list(range(layers))
    sizes = [len(stage[i]) for i in range(virtual) for stage in stages]
    spare = max(sizes) * chunks - layers
    assert min(sizes) >= 1 and len(pipeline_flags(layers, pipeline, virtual)) == spare
    assert set(sizes[1:-1]) <= {max(sizes)} and (spare < 2 or sizes[0] == sizes[-1])


@pytest.mark.parametrize(
    ("words", "layers", "stages", "expected"),
    [
        ("", 8, 4, Schedule()),
        ("--num-virtual-stages-per-pipeline-rank 2", 8, 4, Schedule(2, 4)),
        (f"--num-virtual-stages-per-pipeline-rank=2 {GROUP} 6", 8, 4, Schedule(2, 6)),
        ("--num-layers-per-virtual-pipeline-stage 2", 80, 8, Schedule(5, 8)),
        # 94 layers and the embedding and the output layer: six chunks of 4 on each of four stages.
        ("--num-layers-per-virtual-pipeline-stage 4", 94, 4, Schedule(6, 4)),
        ("--num-layers-per-virtual-pipeline-stage 2", 4, 2, Schedule(1, 2)),
        ("--num-layers-per-virtual-pipeline-stage 3", 8, 2, "can't be split into chunks of 3 on 2 pipeline stages"),
        ("--num-layers-per-virtual-pipeline-stage 2", 8, 1, "needs pipeline parallelism; raise pipeline_parallel"),
        ("--num-virtual-stages-per-pipeline-rank 3", 8, 2, "with 3 chunks each does not divide the model's 8 layers"),
        ("--num-virtual-stages-per-pipeline-rank two", 8, 2, "give a number of at least 1"),
        ("--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 2", 8, 2, "remove one"),
        (f"{GROUP} 4", 8, 2, "there are no virtual stages"),
    ],
)  # fmt: skip
def test_schedule_of_megatrons_flags(words: str, layers: int, stages: int, expected: Schedule | str) -> None:
    if isinstance(expected, Schedule):
        assert read_schedule(words.split(), layers, stages) == expected
        return
    with pytest.raises(LayoutError, match=expected) as caught:
        read_schedule(words.split(), layers, stages)
    assert str(caught.value).startswith("--")


@pytest.mark.parametrize("num_micro_batches", range(1, 14))
@pytest.mark.parametrize("group", range(1, 8))
def test_micro_batches_of_an_interleaved_schedule(num_micro_batches: int, group: int) -> None:
    """Megatron's own conditions, in words of a recipe."""
    last = num_micro_batches % group
    runs = 4 <= group <= num_micro_batches and (last == 0 or last >= 4)
    if runs:
        check_schedule(Schedule(2, group), 4, num_micro_batches)
    else:
        with pytest.raises(LayoutError, match="raise it|take a micro_batch_size or data_parallel"):
            check_schedule(Schedule(2, group), 4, num_micro_batches)
    check_schedule(Schedule(), 4, num_micro_batches)


def test_qwen3_235b_on_four_stages() -> None:
    assert [list(map(len, stage)) for stage in stage_layers(94, 4)] == [[23], [24], [24], [23]]


def test_experts_take_their_processes_from_the_others() -> None:
    check_expert_groups(MIXTURE, Layout(tensor_parallel=4, data_parallel=2, expert_parallel=8), trains=False)
    with pytest.raises(LayoutError, match=r"does not divide the 6 processes .*use 1, 2, 3 or 6"):
        check_expert_groups(MIXTURE, Layout(tensor_parallel=2, data_parallel=3, expert_parallel=4), trains=False)
    with pytest.raises(LayoutError, match="does not divide the 2 processes"):
        check_expert_groups(MIXTURE, Layout(pipeline_parallel=4, data_parallel=2, expert_parallel=4), trains=False)


def test_a_mixture_is_trained_under_tensor_parallelism_with_sequence_parallelism() -> None:
    layout = Layout(tensor_parallel=2)
    with pytest.raises(LayoutError, match="sequence_parallel: true"):
        check_expert_groups(MIXTURE, layout, trains=True)
    check_expert_groups(MIXTURE, layout, trains=False)
    check_expert_groups(DENSE, layout, trains=True)
    check_expert_groups(MIXTURE, Layout(tensor_parallel=2, sequence_parallel=True), trains=True)
