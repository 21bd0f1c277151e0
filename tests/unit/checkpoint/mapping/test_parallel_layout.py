"""Layers, heads and experts among the ranks of a layout."""

from __future__ import annotations

import pytest

from megatron_erpd.checkpoint.mapping.families import FAMILIES
from megatron_erpd.checkpoint.mapping.parallel_layout import check_expert_groups, pipeline_flags, stage_layers
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
