"""Counted parameters against those of real models, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.checkpoint import model_flags
from megatron_erpd.checkpoint.hf_config import read_model_shape
from megatron_erpd.checkpoint.parameter_count import count_parameters, parameters_per_process
from tests.distributed.checkpoint.tiny_models import MODELS, build_megatron_model, save_hf_model, set_layout
from tests.distributed.harness import Case, run_cases

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def held(rank: int, world_size: int, source: Path, tp: int, pp: int) -> int:
    """Parameters of this rank's part of the model; tied embeddings on one stage are one tensor."""
    set_layout(tp, pp)
    return sum(p.numel() for p in build_megatron_model(model_flags(source, tp, pp)).parameters())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_hf_model(name, root / name)
    return {name: root / name for name in MODELS}


def test_the_largest_process(folders: dict[str, Path]) -> None:
    cases: list[Case] = [
        (f"{name} {tp} {pp}", held, (folder, tp, pp)) for tp, pp in LAYOUTS for name, folder in folders.items()
    ]
    found = run_cases(cases, 4)
    for case, ranks in found.items():
        name, tp, pp = case.split()
        assert max(ranks) == parameters_per_process(read_model_shape(folders[name]), int(tp), int(pp)), case


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model(name: str, tmp_path: Path) -> None:
    model = save_hf_model(name, tmp_path / name)
    assert count_parameters(read_model_shape(tmp_path / name)) == model.num_parameters()
