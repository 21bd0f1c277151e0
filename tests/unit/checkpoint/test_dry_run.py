"""A dry run's figures for published models, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_erpd.checkpoint.dry_run import DryRun, dry_run, print_dry_run
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.parameter_count import active_parameters, count_parameters
from megatron_erpd.errors import CheckpointError, LayoutError
from megatron_erpd.settings import Layout
from tests.distributed.checkpoint.published import LLAMA_31_70B, PUBLISHED, QWEN3_235B_A22B

LARGE = Layout(tensor_parallel=8, pipeline_parallel=4, precision="bf16")
MIXTURE = LARGE.model_copy(update={"expert_parallel": 8})


def run(folder: Path, config: dict[str, Any], layout: Layout, *args: Any) -> DryRun:
    (folder / "config.json").write_text(json.dumps(config))
    return dry_run(folder, layout, *args)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_parameters_of_published_models(tmp_path: Path, name: str, parameters: int) -> None:
    found = run(tmp_path, PUBLISHED[name], LARGE)
    assert found.parameters == parameters
    assert found.source_dtype == "bfloat16" and found.source_bytes == 2 * parameters


def test_parameters_of_a_mixture_that_a_token_meets(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_235B_A22B))
    shape = read_model_shape(tmp_path)
    assert round(active_parameters(shape) / 1e9) == 22  # as its name says
    idle = 94 * (128 - 8) * 3 * 1536 * 4096
    assert active_parameters(shape) == count_parameters(shape) - idle


def test_the_share_of_every_stage(tmp_path: Path) -> None:
    found = run(tmp_path, LLAMA_31_70B, LARGE, 1, 2e9)
    # A layer's projections split over 8 ranks, and its two norms; a vocabulary of 128,256 padded to 126 x 1,024.
    layer = (8192 + 2 * 1024 + 8192) * 8192 // 8 + 3 * 28672 * 8192 // 8 + 2 * 8192
    first, second, _, last = found.stages
    assert (second.layers, second.parameters) == ([(20, 39)], 20 * layer)
    assert first.parameters == 20 * layer + 129_024 // 8 * 8192
    assert last.parameters == first.parameters + 8192
    assert second.weight_bytes == second.read_bytes == 2 * 20 * layer
    assert second.read_seconds == second.read_bytes / 2e9
    assert found.import_seconds == 2 * 70_553_706_496 / 32 / 2e9
    assert run(tmp_path, LLAMA_31_70B, Layout(pipeline_parallel=4)).stages[1].weight_bytes == 4 * 20 * (
        (8192 + 2 * 1024 + 8192) * 8192 + 3 * 28672 * 8192 + 2 * 8192
    )


def test_chunks_of_an_interleaved_pipeline(tmp_path: Path) -> None:
    stages = run(tmp_path, LLAMA_31_70B, LARGE, 2).stages
    assert [stage.layers for stage in stages] == [[(i, i + 9), (i + 40, i + 49)] for i in (0, 10, 20, 30)]


def test_layers_that_are_alike_are_told_once(tmp_path: Path) -> None:
    found = run(tmp_path, QWEN3_235B_A22B, MIXTURE)
    assert found.megatron_flags.keys() == {
        "account_for_loss_in_pipeline_split",
        "account_for_embedding_in_pipeline_split",
    }
    by_key = {tensor.key: tensor for tensor in found.tensors}
    assert len(by_key) == len(found.tensors) == 12
    experts = by_key["decoder.layers.[0-93].mlp.experts.experts.linear_fc1.weight"]
    block = "model.layers.[0-93].mlp.experts.[0-127]"
    assert experts.hf_names == [f"{block}.gate_proj.weight", f"{block}.up_proj.weight"]
    assert experts.rows == "1536 of gate_proj, 1536 of up_proj"
    assert experts.global_shape == [94, 128, 3072, 4096] and experts.local_shape == [3072, 4096]
    assert experts.split == "16 experts each over EP 8"
    attention = by_key["decoder.layers.[0-93].self_attention.linear_qkv.weight"]
    assert attention.rows == "4 times (2048 of q_proj, 128 of k_proj, 128 of v_proj)"
    assert (attention.local_shape, attention.split) == ([1152, 4096], "rows over TP 8")
    output = by_key["decoder.layers.[0-93].self_attention.linear_proj.weight"]
    assert (output.local_shape, output.split) == ([4096, 1024], "columns over TP 8")
    assert by_key["decoder.layers.[0-93].mlp.router.weight"].split == "whole"


def test_tables_show_every_figure(tmp_path: Path) -> None:
    found = run(tmp_path, QWEN3_235B_A22B, MIXTURE, 1, 1e9)
    console = Console(width=200)
    with console.capture() as capture:
        print_dry_run(found, console)
    text = " ".join(capture.get().split())
    for words in (
        "235,093,634,560 parameters, 470.2 GB as bfloat16",
        "TP 8, PP 4, EP 8, bf16; processes: 32",
        "every process reads 14.7 GB, 14.7 s at 1.0 GB/s",
        "94 x 128 x 3072 x 4096",
        "23-46 7,474,452,480 14.9 GB 14.9 GB 14.9 s",
        "--account-for-embedding-in-pipeline-split",
    ):
        assert words in text, text
    assert json.loads(json.dumps(found.to_json()))["stages"][1]["layers"] == [[23, 46]]


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="does not divide the model's 80 layers"):
        run(tmp_path, LLAMA_31_70B, Layout(pipeline_parallel=11))
    with pytest.raises(LayoutError, match="does not divide the 4 processes of a pipeline stage"):
        run(tmp_path, QWEN3_235B_A22B, Layout(tensor_parallel=4, expert_parallel=8))
    with pytest.raises(LayoutError, match="2 chunks per pipeline stage need pipeline parallelism"):
        run(tmp_path, LLAMA_31_70B, Layout(), 2)
    with pytest.raises(CheckpointError, match="dtype is None; set it to one of"):
        run(tmp_path, {**LLAMA_31_70B, "torch_dtype": None}, Layout())
