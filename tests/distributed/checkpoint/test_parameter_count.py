"""Counted parameters against those of real models, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.checkpoint import model_flags
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.parameter_count import count_parameters, parameters_per_stage
from tests.distributed.checkpoint.tiny_models import (
    MIXTURES,
    MODELS,
    build_megatron_model,
    save_hf_model,
    set_layout,
)
from tests.distributed.harness import Case, run_cases

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 4), (2, 2, 2)]
"""TP x PP x EP on four ranks."""


def held(rank: int, world_size: int, source: Path, tp: int, pp: int, ep: int) -> tuple[int, int]:
    """Dense and expert parameters of this rank's part of the model; tied embeddings on one stage are one tensor."""
    set_layout(tp, pp, expert_parallel=ep)
    sizes = {name: p.numel() for name, p in build_megatron_model(model_flags(source, tp, pp, ep)).named_parameters()}
    experts = sum(size for name, size in sizes.items() if "local_experts" in name)
    return sum(sizes.values()) - experts, experts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = [*MODELS, *MIXTURES]
    for name in names:
        save_hf_model(name, root / name)
    return {name: root / name for name in names}


def test_the_largest_process(folders: dict[str, Path]) -> None:
    cases: list[Case] = [
        (f"{name} {tp} {pp} {ep}", held, (folder, tp, pp, ep))
        for tp, pp, ep in LAYOUTS
        for name, folder in folders.items()
        if (ep > 1) == (name in MIXTURES)
    ]
    found = run_cases(cases, 4)
    for case, ranks in found.items():
        name, *sizes = case.split()
        stages = parameters_per_stage(read_model_shape(folders[name]), *map(int, sizes))
        assert max(ranks, key=sum) == max(((s.dense, s.experts) for s in reversed(stages)), key=sum), case


@pytest.mark.parametrize("name", [*MODELS, *MIXTURES])
def test_the_whole_model(name: str, tmp_path: Path) -> None:
    model = save_hf_model(name, tmp_path / name)
    assert count_parameters(read_model_shape(tmp_path / name)) == model.num_parameters()
