"""The table of parameters against the transformers library and against explicit rearrangements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_erpd.checkpoint.hugging_face.weights import HfWeights, check_tensors
from megatron_erpd.checkpoint.mapping.families import FAMILIES
from megatron_erpd.checkpoint.mapping.param_map import Segment, Unit, by_query_group, gate_then_up, hf_shapes, units
from megatron_erpd.checkpoint.mapping.shape import ModelShape

SHAPE = ModelShape(
    family=FAMILIES["Qwen2ForCausalLM"],
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_heads=6,
    num_query_groups=2,
    head_dim=4,
    vocab_size=11,
    tied_embeddings=False,
)


MIXTURE_SHAPE = replace(
    SHAPE, family=FAMILIES["MixtralForCausalLM"], num_experts=3, experts_per_token=2, expert_ffn_hidden_size=24
)


def hf_config(shape: ModelShape) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    if shape.family.mixture:
        sizes |= {"num_experts": shape.num_experts, shape.family.mixture.ffn_size_key: shape.expert_ffn_hidden_size}
    return AutoConfig.for_model(shape.family.name, **sizes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_writes(architecture: str, tied: bool, tmp_path: Path) -> None:
    """On disk: in memory transformers 5 holds a mixture's experts as one tensor, which it takes apart to save."""
    from transformers import AutoModelForCausalLM

    family = FAMILIES[architecture]
    shape = replace(MIXTURE_SHAPE if family.mixture else SHAPE, family=family, tied_embeddings=tied, num_heads=4)
    AutoModelForCausalLM.from_config(hf_config(shape)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_shapes(shape) == written


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_experts_that_were_saved_as_one_tensor_are_refused(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = replace(MIXTURE_SHAPE, family=FAMILIES[architecture], num_heads=4)
    model = AutoModelForCausalLM.from_config(hf_config(shape))
    for keeps_apart in (True, False):
        model.save_pretrained(tmp_path, save_original_format=keeps_apart)
        problems = check_tensors(HfWeights(tmp_path), shape)
        if keeps_apart:
            assert problems == []
        else:
            assert len(problems) == 1 and "holds all experts of a layer; write the folder again" in problems[0]


def _rearranged(segments: tuple[Segment, ...], sources: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([sources[s.tensor][s.start : s.start + s.count] for s in segments])


def test_query_groups_are_interleaved() -> None:
    q, k, v = (torch.randn(heads * 4, 16) for heads in (6, 2, 2))
    grouped = [x.view(2, -1, 4, 16) for x in (q, k, v)]
    expected = torch.cat(grouped, dim=1).reshape(-1, 16)
    assert torch.equal(_rearranged(by_query_group(SHAPE), [q, k, v]), expected)


def test_gate_comes_before_up() -> None:
    gate, up = torch.randn(24, 16), torch.randn(24, 16)
    layout = gate_then_up(lambda shape: shape.ffn_hidden_size)
    assert torch.equal(_rearranged(layout(SHAPE), [gate, up]), torch.cat([gate, up]))


@pytest.mark.parametrize("shape", [SHAPE, MIXTURE_SHAPE], ids=["dense", "mixture"])
def test_every_source_row_is_used_once(shape: ModelShape) -> None:
    for unit in units(shape):
        used = [(s.tensor, row) for s in unit.segments for row in range(s.start, s.start + s.count)]
        rows = [(i, row) for i, size in enumerate(unit.hf_shapes().values()) for row in range(size[0])]
        assert sorted(used) == rows, unit


def test_pieces_of_any_range() -> None:
    unit = next(unit for unit in units(SHAPE) if unit.key.endswith("linear_qkv.weight"))
    source = [(s.tensor, row) for s in unit.segments for row in range(s.start, s.start + s.count)]
    for start in range(len(source)):
        for count in range(1, len(source) - start + 1):
            found: dict[int, tuple[int, int]] = {}
            for at, s in unit.pieces(start, count):
                found |= {at + i: (s.tensor, s.start + i) for i in range(s.count)}
            assert [found[i] for i in range(count)] == source[start : start + count]


def test_places_of_any_range_of_a_source_tensor() -> None:
    unit = next(unit for unit in units(SHAPE) if unit.key.endswith("linear_qkv.weight"))
    source = [(s.tensor, row) for s in unit.segments for row in range(s.start, s.start + s.count)]
    for tensor, (rows, *_) in enumerate(unit.hf_shapes().values()):
        for start in range(rows):
            for count in range(1, rows - start + 1):
                found: dict[int, tuple[int, int]] = {}
                for at, row, number in unit.places(tensor, start, count):
                    found |= {at + i: source[row + i] for i in range(number)}
                assert found == {i: (tensor, start + i) for i in range(count)}


def test_padding_rows_have_no_source() -> None:
    unit: Unit = units(SHAPE)[0]
    assert unit.padded and unit.num_rows == 11
    assert unit.pieces(8, 8) == [(0, Segment(0, 8, 3))]
    assert unit.pieces(16, 8) == []


def test_experts_are_an_axis_after_the_layers() -> None:
    experts = [unit for unit in units(MIXTURE_SHAPE) if unit.expert is not None]
    places = [(layer, expert) for layer in range(2) for expert in range(3)]
    assert [unit.at for unit in experts] == [place for place in places for _ in ("fc1", "fc2")]
    assert {unit.axes for unit in experts} == {(2, 3)}
    first, second = experts[8:10]
    assert str(first) == "decoder.layers.mlp.experts.experts.linear_fc1.weight of layer 1, expert 1"
    block = "model.layers.1.block_sparse_moe.experts.1"
    assert first.hf_names == (f"{block}.w1.weight", f"{block}.w3.weight") and second.hf_names == (f"{block}.w2.weight",)
    dense = [unit for unit in units(MIXTURE_SHAPE) if unit.expert is None]
    assert {unit.axes for unit in dense} == {(), (2,)}
    assert "decoder.layers.pre_mlp_layernorm.weight" in {unit.key for unit in dense}


def test_units_are_in_the_models_order() -> None:
    names = [str(unit) for unit in units(SHAPE)]
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    layers = [unit.layer for unit in units(SHAPE)[1:-2]]
    assert layers == sorted(layers, key=lambda layer: -1 if layer is None else layer)
    assert len(set(names)) == len(names)
