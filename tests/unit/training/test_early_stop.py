"""What is measured over a step's micro-batches, and when it ends a training."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_erpd.errors import StageError
from megatron_erpd.training.early_stop import EarlyStop, Stop, read_stop
from megatron_erpd.training.step import step_means

SIGNAL = signal.SIGUSR1


@pytest.fixture
def received() -> Iterator[list[int]]:
    """The signals that came."""
    seen: list[int] = []
    before = signal.signal(SIGNAL, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(SIGNAL, before)


def watch(output: Path, decides: bool = True, **bounds: float) -> EarlyStop:
    bounds = {"max_kl": None, "min_entropy": None, **bounds}  # type: ignore[dict-item]
    return EarlyStop(**bounds, output=output, iteration=3, decides=decides, exit_signal=SIGNAL)


def test_means_weigh_micro_batches_by_their_counts():
    assert step_means([torch.tensor([3.0, 3, 1, 4]), torch.tensor([7.0, 1, 0, 0])]) == [10 / 4, 1 / 4]
    assert step_means([torch.tensor([0.0, 0])]) == [0.0], "no token: nothing to divide"


def test_a_kl_above_the_ceiling_ends_the_step(tmp_path, received):
    stop = watch(tmp_path, max_kl=0.25)
    for _ in range(2):
        stop.after_step({"entropy": 1.0, "policy_base_kl": 0.25})  # not above it
    assert not received and read_stop(tmp_path) is None
    stop.after_step({"entropy": 1.0, "policy_base_kl": 0.3125})
    assert received == [SIGNAL]
    assert read_stop(tmp_path) == Stop(6, "max_kl 0.3125 > 0.25")
    assert str(read_stop(tmp_path)) == "max_kl 0.3125 > 0.25 at iteration 6"


def test_an_entropy_below_the_floor_ends_the_step(tmp_path, received):
    stop = watch(tmp_path, min_entropy=0.5)
    stop.after_step({"entropy": 0.4})
    assert received == [SIGNAL] and read_stop(tmp_path) == Stop(4, "min_entropy 0.4 < 0.5")


def test_only_one_rank_decides(tmp_path, received):
    (tmp_path / "early_stop.json").write_text(json.dumps({"iteration": 5, "reason": "max_kl 1 > 0.5"}))
    stop = watch(tmp_path, decides=False, max_kl=0.3)
    stop.after_step({"entropy": 1.0, "policy_base_kl": 1.0})
    assert not received and read_stop(tmp_path) == Stop(5, "max_kl 1 > 0.5")
    watch(tmp_path, max_kl=0.3)
    assert read_stop(tmp_path) is None, "a reason of a step that comes again counts no more"


def test_a_damaged_reason_is_named(tmp_path):
    (tmp_path / "early_stop.json").write_text("{")
    with pytest.raises(StageError, match=r"early_stop\.json: not a reason to stop"):
        read_stop(tmp_path)
