"""Activations, tensor by tensor and against Megatron's own estimate, which weights are held to on published models."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.mapping.config import model_flags, read_model_shape
from megatron_erpd.checkpoint.mapping.families import FAMILIES
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.errors import RecipeError
from megatron_erpd.plan.activations import (
    MicroBatch,
    Recompute,
    head_bytes,
    in_flight,
    layer_bytes,
    recompute_of,
    training_bytes,
)
from megatron_erpd.plan.memory import stage_memory
from megatron_erpd.recipe.requests import TrainTeacher
from megatron_erpd.recipe.stages import Stage, flags_of
from megatron_erpd.settings import Layout, ReplaySettings
from tests.distributed.checkpoint.published import PUBLISHED
from tests.tolerances import FLOAT64, MEMORY_REPORT

SHAPE = ModelShape(
    family=FAMILIES["LlamaForCausalLM"],
    num_layers=12,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_heads=8,
    num_query_groups=4,
    head_dim=64,
    vocab_size=1000,
    tied_embeddings=False,
)
BATCH = MicroBatch(tokens=128, longest=64)
LAYER = 128 * (4 * 2 * 512 + 2 * (2 * 512 + 2 * 256) + 4 * 8 + 2 * 3 * 1536)
"""One process: norms and their outputs; query, key, value, attention's output and log-sums; gate, up, product."""


def layout(**sizes: Any) -> Layout:
    return Layout(**{"precision": "bf16", **sizes})


def test_a_layer() -> None:
    assert layer_bytes(SHAPE, layout(), BATCH) == LAYER
    between, inside = 128 * 4 * 2 * 512, LAYER - 128 * 4 * 2 * 512
    assert layer_bytes(SHAPE, layout(tensor_parallel=2), BATCH) == between + inside // 2
    assert layer_bytes(SHAPE, layout(tensor_parallel=2, sequence_parallel=True), BATCH) == LAYER // 2
    assert layer_bytes(SHAPE, layout(context_parallel=4), BATCH) == LAYER // 4


def test_key_value_heads_are_whole_where_they_are_fewer_than_the_ranks() -> None:
    found = layer_bytes(SHAPE, layout(tensor_parallel=8, sequence_parallel=True), BATCH)
    assert found == LAYER // 8 + 128 * 2 * 2 * (64 - 32)


def test_attention_keeps_its_probabilities_in_fp32_on_a_gpu_unless_they_are_recomputed() -> None:
    fused = 128 * (4 * 4 * 512 + 4 * (2 * 512 + 2 * 256) + 4 * 8 + 4 * 3 * 1536)
    assert layer_bytes(SHAPE, Layout(), BATCH, Recompute("selective")) == fused
    assert layer_bytes(SHAPE, Layout(), BATCH, on_gpu=False) == fused
    assert layer_bytes(SHAPE, Layout(), BATCH) == fused + 4 * 2 * 8 * 64 * 64


@pytest.mark.parametrize(
    ("sizes", "longest", "tokens"),
    [
        ({"micro_batch_size": 4}, 30, 4 * 30),
        ({"micro_batch_size": 4, "context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True}, 30, 4 * 32),
        ({"micro_batch_tokens": 100}, 30, 100),
        ({"micro_batch_tokens": 100, "context_parallel": 2}, 30, 200),
        # A longer rollout has a pack of its own; a pack is rounded up as a whole.
        ({"micro_batch_tokens": 100}, 130, 130),
        ({"micro_batch_tokens": 101, "tensor_parallel": 4, "sequence_parallel": True}, 30, 104),
    ],
)
def test_the_largest_micro_batch(sizes: dict[str, Any], longest: int, tokens: int) -> None:
    batch = MicroBatch.largest(layout(**sizes), longest)
    assert batch.tokens == tokens
    assert batch.longest == (longest if "micro_batch_tokens" in sizes else tokens // 4)


def test_experts_get_equal_shares_of_the_tokens() -> None:
    sizes = {"num_experts": 16, "experts_per_token": 2, "expert_ffn_hidden_size": 256}
    mixture = ModelShape(**{**vars(SHAPE), "family": FAMILIES["Qwen3MoeForCausalLM"], **sizes})
    dense = LAYER - 128 * 2 * 3 * 1536
    expected = dense + 128 * 2 * (512 + 256) + 128 * 2 * 4 * 16 + 128 * 2 * 2 * (2 * 512 + 3 * 256)
    assert layer_bytes(mixture, layout(), BATCH) == expected  # with normed queries and keys


def test_full_recomputation_keeps_the_inputs_of_layers() -> None:
    entry = 128 * 2 * 512
    for how, expected in (
        (Recompute(), 3 * 6 * LAYER),
        (Recompute("full"), 3 * 6 * entry + LAYER),
        (Recompute("full", "uniform", 4), 3 * 2 * entry + 4 * LAYER),
        (Recompute("full", "block", 4), 3 * (4 * entry + 2 * LAYER) + LAYER),
    ):
        assert training_bytes(SHAPE, layout(), BATCH, how, num_layers=6, in_flight=3) == expected
        assert recompute_of(flags_of(how.flags())) == how


def test_earlier_pipeline_stages_wait_for_more_micro_batches() -> None:
    assert [in_flight(4, stage, 100) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    # Chunks: one more than the warm-up of Megatron's interleaved schedule; no more than there are.
    assert [in_flight(4, stage, 100, 3, 4) for stage in range(4)] == [15, 13, 11, 9]
    assert [in_flight(4, stage, 4, 3, 4) for stage in range(4)] == [12, 12, 11, 9]
    assert in_flight(4, 0, 100, 3, 6) == 19


def test_hidden_states_at_the_output_layer() -> None:
    rows = 128 * 2 * 512
    assert head_bytes(SHAPE, layout(), BATCH, trains=False, num_frozen=2) == 2 * rows
    sharded = layout(tensor_parallel=4, sequence_parallel=True)
    assert head_bytes(SHAPE, sharded, BATCH, trains=True, num_frozen=1) == rows + 2 * rows // 4 + 2 * rows


@pytest.mark.parametrize(
    "flags",
    [
        {"recompute-granularity": "full"},
        {"recompute-granularity": "all"},
        {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 0},
    ],
)
def test_unknown_recomputation(flags: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--recompute-granularity (full|all): Megatron takes selective, or full"):
        recompute_of(flags_of(flags))


def test_flags_of_recomputation() -> None:
    assert recompute_of(("--recompute-activations",)) == recompute_of(("--recompute-granularity=selective",))
    assert recompute_of(("--lr", "full")) == Recompute()


SIZES = {
    "llama-3.1-70b": {"tensor_parallel": 8, "pipeline_parallel": 4, "data_parallel": 2},
    "qwen2.5-72b": {"tensor_parallel": 4, "pipeline_parallel": 8, "data_parallel": 4},
    "qwen3-235b-a22b": {"tensor_parallel": 4, "pipeline_parallel": 2, "data_parallel": 16, "expert_parallel": 8},
}


def megatron_arguments(folder: Path, sizes: Layout, **changes: Any) -> Namespace:
    """What Megatron's estimate reads of its arguments."""
    flags = model_flags(folder, sizes.tensor_parallel, sizes.pipeline_parallel, sizes.expert_parallel)
    multiple = int(flags["make_vocab_size_divisible_by"]) * sizes.tensor_parallel  # type: ignore[call-overload]
    names = ("num_experts", "moe_shared_expert_intermediate_size", "mtp_num_layers", "moe_latent_size")
    defaults: dict[str, Any] = {**dict.fromkeys(names), "multi_latent_attention": False, "add_bias_linear": False}
    return Namespace(
        **{
            **defaults,
            **flags,
            "padded_vocab_size": -(-int(flags["vocab_size"]) // multiple) * multiple,  # type: ignore[call-overload]
            "tensor_model_parallel_size": sizes.tensor_parallel,
            "pipeline_model_parallel_size": sizes.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": None,
            "expert_model_parallel_size": sizes.expert_parallel,
            "expert_tensor_parallel_size": 1,
            "data_parallel_size": sizes.data_parallel,
            "world_size": sizes.num_processes,
            "use_distributed_optimizer": True,
            "micro_batch_size": sizes.micro_batch_size,
            "seq_length": 4096,
            **changes,
        }
    )


@pytest.fixture(params=list(PUBLISHED))
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Layout]:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[request.param]))
    return tmp_path, layout(sequence_parallel=True, micro_batch_size=2, **SIZES[request.param])


def stage(sizes: Layout) -> Stage:
    return Stage(
        "teacher",
        TrainTeacher(
            base=Path("base"),
            rollouts=Path("rollouts"),
            settings=ReplaySettings(global_batch_size=1024),
            output=Path("teacher"),
            layout=sizes,
            megatron=("--use-distributed-optimizer",),
        ),
    )


def test_weights_and_optimizer_are_those_of_megatrons_report(published: tuple[Path, Layout]) -> None:
    """Megatron counts no biases and no norms of queries and keys, and the last norm once over all pipeline stages: less
    than a thousandth."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    folder, sizes = published
    memory = stage_memory(stage(sizes), read_model_shape(folder), 4096)
    expected = compute_weight_and_optimizer_memory(megatron_arguments(folder, sizes))
    MEMORY_REPORT.assert_close(float(memory.weights + memory.gradients + memory.optimizer), expected)
    whole = compute_weight_and_optimizer_memory(megatron_arguments(folder, sizes, use_distributed_optimizer=False))
    assert whole > 1.3 * expected


@pytest.mark.parametrize("name", ["llama-3.1-70b", "qwen2.5-72b"])
def test_activations_differ_from_megatrons_report_by_what_it_counts_otherwise(name: str, tmp_path: Path) -> None:
    """Its layer has full-width keys and values, two dropout masks and one feed-forward projection in, kept before and
    after its activation; ours grouped keys and values, log-sums and a gated projection."""
    from megatron.training.theoretical_memory_usage import compute_activation_memory

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    sizes = layout(sequence_parallel=True, micro_batch_size=2, **SIZES[name])
    shape, tp, pp = read_model_shape(tmp_path), sizes.tensor_parallel, sizes.pipeline_parallel
    arguments = megatron_arguments(tmp_path, sizes)
    tokens, width = 2 * 4096, shape.hidden_size
    theirs = compute_activation_memory(arguments, num_microbatches=64)
    theirs -= (8 * tokens * pp + tokens * width * pp) / tp  # the embedding's input and dropout mask
    layers = shape.num_layers // pp
    batch = MicroBatch(2 * 4096, 4096)
    ours = training_bytes(shape, sizes, batch, Recompute(), layers, in_flight(pp, 0, 64))
    fewer = 2 * tokens * width + 2 * 2 * tokens * (width - shape.key_value_size)
    more = 4 * tokens * shape.num_heads + 2 * tokens * shape.ffn_hidden_size
    FLOAT64.assert_close(float(ours), theirs + shape.num_layers * (more - fewer) / tp)
    # Virtual stages multiply all of it, at the first pipeline stage.
    interleaved = megatron_arguments(tmp_path, sizes, virtual_pipeline_model_parallel_size=2)
    times = [compute_activation_memory(given, num_microbatches=64) for given in (arguments, interleaved)]
    waiting = in_flight(pp, 0, 64, 2, pp)
    virtual = training_bytes(shape, sizes, batch, Recompute(), layers // 2, waiting)
    FLOAT64.assert_close(virtual / ours, times[1] / times[0])
