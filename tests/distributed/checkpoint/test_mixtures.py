"""Mixtures of experts on every layout: transformers' logits and choice of experts, and a round trip of each bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import (
    compare_weights,
    export_checkpoint,
    export_hf_weights,
    model_flags,
    write_checkpoint,
)
from megatron_erpd.model.logits import compare_logits, megatron_logits
from tests.distributed.checkpoint.tiny_models import (
    MIXTURES,
    VOCAB_SIZE,
    build_megatron_model,
    load_checkpoint,
    save_checkpoint,
    save_hf_model,
    set_layout,
)
from tests.distributed.harness import Case, run_cases

LAYOUTS = {
    "qwen3-moe": [(4, 1, 2), (1, 2, 2)],
    "qwen3-moe-unnormalized": [(2, 2, 2)],
    "mixtral": [(4, 1, 1), (2, 2, 1)],
}
"""TP x PP x EP on four ranks; the ranks left over are data-parallel replicas. TP, PP and EP, each with another and
without."""

EVERY = [(name, layout) for name in MIXTURES for layout in LAYOUTS[name]]

NUM_RANKS = 4

MARGIN = 1e-3
"""Least distance between the router's logits of the last expert taken and the first one left out."""


def transformers_reference(model: Any, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Logits, and of each layer which experts each token goes to (`[b, s, experts]`); and the smallest margin."""
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: routed.append((output[0], output[2])))
    with torch.no_grad():
        logits = model(tokens).logits
    found, margin = {"tokens": tokens, "logits": logits}, float("inf")
    for number, (scores, chosen) in enumerate(routed):
        best = scores.sort(dim=-1, descending=True).values
        k = chosen.shape[-1]
        margin = min(margin, float((best[:, k - 1] - best[:, k]).min()))
        taken = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)
        found[f"experts-{number}"] = taken.view(*tokens.shape, -1)
    return found, margin


def convert(
    rank: int, world_size: int, source: Path, exported: Path, tp: int, pp: int, ep: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """Load, forward, export from the model and from what Megatron saves of it.

    Returns which layers send every token to the same experts, and on the last stage the logits.
    """
    set_layout(tp, pp, expert_parallel=ep)
    model = build_megatron_model({**model_flags(source, tp, pp, ep), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_checkpoint([model], source.with_name(f"{source.name}-checkpoint"))
    reference = load_file(source.parent / f"{source.name}-reference.safetensors")
    same_experts: dict[int, bool] = {}

    def compare(number: int, routing: torch.Tensor) -> None:
        batch, length, experts = reference[f"experts-{number}"].shape
        ours = routing.view(length, batch, experts).transpose(0, 1)
        same_experts[number] = torch.equal(ours, reference[f"experts-{number}"])

    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        layer.mlp.router.register_forward_hook(lambda _, __, output, number=number: compare(number, output[1]))
    logits = megatron_logits([model], reference["tokens"])
    export_hf_weights([model], source, exported)
    saved = exported.with_name(f"{exported.name}-saved")
    save_checkpoint([model], saved)
    export_checkpoint(saved, source, saved.with_name(f"{saved.name}-exported"), max_shard_bytes=20_000)
    agreement = None if logits is None else compare_logits(logits, reference["logits"])
    return {"experts": same_experts, "logits": agreement}


class Workspace:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.margins: dict[str, float] = {}
        self.results: dict[str, list[Any]] = {}

    def exported(self, name: str, layout: tuple[int, ...]) -> Path:
        return self.folder / "-".join(map(str, (name, "exported", *layout)))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("mixtures"))
    tokens = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    for name in MIXTURES:
        model = save_hf_model(name, space.folder / name)
        write_checkpoint(space.folder / name, space.folder / f"{name}-checkpoint", dict, block_bytes=3000)
        reference, space.margins[name] = transformers_reference(model, tokens)
        save_file(reference, space.folder / f"{name}-reference.safetensors")
    cases: list[Case] = [
        (
            f"{name} {layout}",
            convert,
            (space.folder / name, space.exported(name, layout), *layout, {}),
        )
        # A change of layout costs more than a case.
        for name, layout in sorted(EVERY, key=lambda case: case[1])
    ]
    for name in ("qwen3-moe", "qwen3-moe-unnormalized"):
        source = space.folder / name
        swapped = {"moe_router_pre_softmax": not model_flags(source)["moe_router_pre_softmax"]}
        cases.append((f"control {name}", convert, (source, space.exported(name, (0,)), 2, 2, 2, swapped)))
    space.results = run_cases(cases, NUM_RANKS, timeout=200)
    return space


@pytest.mark.parametrize(("name", "layout"), EVERY, ids=str)
def test_experts_and_logits_are_those_of_transformers(space: Workspace, name: str, layout: tuple[int, ...]) -> None:
    # Nearer choices would be a matter of rounding, and the comparison one of luck.
    assert space.margins[name] > MARGIN
    results = space.results[f"{name} {layout}"]
    layers = {number for result in results for number in result["experts"]}
    assert layers == set(range(MIXTURES[name][1].get("num_hidden_layers", 2)))
    assert all(same for result in results for same in result["experts"].values()), results
    logits = [result["logits"] for result in results if result["logits"] is not None]
    assert len(logits) == NUM_RANKS // layout[1]
    assert all(found.agrees() for found in logits), logits


@pytest.mark.parametrize(("name", "layout"), EVERY, ids=str)
def test_round_trip_keeps_every_bit(space: Workspace, name: str, layout: tuple[int, ...]) -> None:
    exported = space.exported(name, layout)
    assert compare_weights(space.folder / name, exported) == []
    assert compare_weights(space.folder / name, exported.with_name(f"{exported.name}-saved-exported")) == []


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-unnormalized"])
def test_the_comparison_notices_weights_that_are_normalized_otherwise(space: Workspace, name: str) -> None:
    logits = [result["logits"] for result in space.results[f"control {name}"] if result["logits"] is not None]
    assert logits and not any(found.agrees() for found in logits)
