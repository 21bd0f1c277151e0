"""The table of parameters against the transformers library and against explicit rearrangements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_erpd.checkpoint.hf_config import FAMILIES, ModelShape
from megatron_erpd.checkpoint.param_map import Segment, Unit, by_query_group, gate_then_up, hf_shapes, units

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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(architecture: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = replace(SHAPE, family=FAMILIES[architecture], tied_embeddings=tied, num_heads=4)
    config: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": tied,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.family.name, **config))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_shapes(shape) == expected


def _rearranged(segments: tuple[Segment, ...], sources: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([sources[s.tensor][s.start : s.start + s.count] for s in segments])


def test_query_groups_are_interleaved() -> None:
    q, k, v = (torch.randn(heads * 4, 16) for heads in (6, 2, 2))
    grouped = [x.view(2, -1, 4, 16) for x in (q, k, v)]
    expected = torch.cat(grouped, dim=1).reshape(-1, 16)
    assert torch.equal(_rearranged(by_query_group(SHAPE), [q, k, v]), expected)


def test_gate_comes_before_up() -> None:
    gate, up = torch.randn(24, 16), torch.randn(24, 16)
    assert torch.equal(_rearranged(gate_then_up(SHAPE), [gate, up]), torch.cat([gate, up]))


def test_every_source_row_is_used_once() -> None:
    for unit in units(SHAPE):
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


def test_padding_rows_have_no_source() -> None:
    unit: Unit = units(SHAPE)[0]
    assert unit.padded and unit.num_rows == 11
    assert unit.pieces(8, 8) == [(0, Segment(0, 8, 3))]
    assert unit.pieces(16, 8) == []


def test_units_are_in_the_models_order() -> None:
    names = [str(unit) for unit in units(SHAPE)]
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    layers = [unit.layer for unit in units(SHAPE)[1:-2]]
    assert layers == sorted(layers, key=lambda layer: -1 if layer is None else layer)
    assert len(set(names)) == len(names)
