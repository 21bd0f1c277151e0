"""TP 4 x PP 2 for every family, mixtures with and without expert parallelism: logits, and a round trip of each bit.

`long`: four ranks split the same tensors in the same ways (`test_conversion.py`, `test_mixtures.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_erpd.checkpoint import compare_weights, write_checkpoint
from tests.distributed.checkpoint import test_conversion, test_mixtures
from tests.distributed.checkpoint.tiny_models import MIXTURES, MODELS, VOCAB_SIZE, save_hf_model
from tests.distributed.harness import Case, run_cases

CASES = [*((name, 1) for name in (*MODELS, *MIXTURES)), *((name, 2) for name in MIXTURES)]
"""Model and EP."""

NUM_RANKS = 8

pytestmark = pytest.mark.long


def exported(folder: Path, name: str, ep: int) -> Path:
    return folder / f"{name}-exported-{ep}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eight")
    tokens = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    for name in (*MODELS, *MIXTURES):
        model = save_hf_model(name, folder / name)
        write_checkpoint(folder / name, folder / f"{name}-checkpoint", dict, block_bytes=3000)
        if name in MIXTURES:
            reference, margin = test_mixtures.transformers_reference(model, tokens)
            assert margin > test_mixtures.MARGIN
            save_file(reference, folder / f"{name}-reference.safetensors")
        else:
            with torch.no_grad():
                logits = model(tokens).logits
            save_file({"tokens": tokens, "logits": logits}, folder / f"{name}-logits.safetensors")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[Any]]:
    cases: list[Case] = []
    for name, ep in CASES:
        given = (folder / name, exported(folder, name, ep), 4, 2)
        if name in MIXTURES:
            cases.append((f"{name} {ep}", test_mixtures.convert, (*given, ep, {})))
        else:
            cases.append((f"{name} {ep}", test_conversion.convert, given))
    return run_cases(cases, NUM_RANKS, timeout=280)


@pytest.mark.parametrize(("name", "ep"), CASES)
def test_logits_and_experts_are_those_of_transformers(results: dict[str, list[Any]], name: str, ep: int) -> None:
    found = [result for result in results[f"{name} {ep}"] if result is not None]
    if name in MIXTURES:
        assert all(same for result in found for same in result["experts"].values())
        logits = [result["logits"] for result in found if result["logits"] is not None]
        assert len(logits) == NUM_RANKS // 2 and all(comparison.agrees() for comparison in logits), logits
    else:
        assert len(found) == NUM_RANKS // 2 and all(result["agrees"] for result in found), found


@pytest.mark.parametrize(("name", "ep"), CASES)
def test_round_trip_keeps_every_bit(results: dict[str, list[Any]], folder: Path, name: str, ep: int) -> None:
    for export in (exported(folder, name, ep), folder / f"{name}-exported-{ep}-saved-exported"):
        assert compare_weights(folder / name, export) == []
