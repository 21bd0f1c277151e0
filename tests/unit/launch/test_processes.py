"""What stages share, what they are told, and what is read from their logs."""

from __future__ import annotations

import json
import os
import time

import pytest

from megatron_erpd.launch.processes import Slots, StageProcess, error_message, visible_gpus
from tests.unit.fake_request import prepare_stage


def test_gpus_belong_to_one_stage_at_a_time():
    slots = Slots(gpus=["0", "1", "2"], cores=12)
    assert slots.fits(3) and not slots.fits(4) and not slots.fits(2, besides=2)
    taken = slots.take(2)
    assert taken == ["0", "1"] and slots.fits(1) and not slots.fits(2)
    assert slots.threads == 6
    slots.give_back(2, taken)
    assert sorted(slots.take(3)) == ["0", "1", "2"]


def test_cores_may_be_shared_only_by_a_stage_that_runs_alone():
    slots = Slots(gpus=[], cores=2)
    assert slots.fits(4)  # nothing else runs
    assert slots.take(4) == [] and slots.threads == 1 and not slots.fits(1)
    slots.give_back(4, [])
    slots.take(1)
    assert slots.fits(1) and not slots.fits(1, besides=1) and not slots.fits(2) and slots.threads == 2


@pytest.mark.parametrize(
    ("value", "there", "expected"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("-1", 0, []),
        ("0", 0, []),
        ("NoDevFiles", 0, []),
        ("GPU-8932f937,MIG-2f0", 0, []),
        ("3", 1, ["3"]),
        ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("1,0,99,2", 2, ["1", "0"]),  # CUDA stops at the first that isn't there
    ],
)
def test_visible_gpus_are_those_that_cuda_finds(monkeypatch, value, there, expected):
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: there > 0)
    # 1 without any: what `platform` says to Megatron in a process on a CPU.
    monkeypatch.setattr("torch.cuda.device_count", lambda: there or 1)
    assert visible_gpus() == expected


def test_the_last_error_of_a_log():
    lines = ["working", "error: first", "x", "[rank1]:error: no such row", "[rank1]:  in file a", "Traceback", "  more"]
    assert error_message(lines) == "no such row\n  in file a"
    assert error_message(["all is well", "ValueError: error: x"]) == ""


def test_a_stage_gets_its_gpus_and_none_of_its_parents_launcher(tmp_path, monkeypatch):
    launchers = ("RANK", "WORLD_SIZE", "MASTER_PORT", "PET_NNODES", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")
    for name in launchers:
        monkeypatch.setenv(name, "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    stage = prepare_stage("a", f'python -c "{code}"', tmp_path)
    process = StageProcess(stage, tmp_path / "a.log", gpus=["2", "5"], threads=3)
    assert process.process.wait(30) == 0
    environment = json.loads(process.log.read_text().splitlines()[-1])
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert not set(launchers) & environment.keys()
    assert environment["OMP_NUM_THREADS"] == "3"


def test_progress_is_the_last_whole_step(tmp_path):
    said = "sampled 1 of 2\\n/x.py:3: UserWarning: 1 of 2 was 3 of 4\\n  warnings.warn()\\nwarning: skipped 1 of 2"
    stage = prepare_stage("a", f"python -c \"print('{said}')\"", tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 3, "stage1/loss": 0.5}\n')
    os.utime(metrics, (time.time() - 60, time.time() - 60))
    process = StageProcess(stage, tmp_path / "a.log", [], 1)
    process.process.wait(30)
    assert process.progress() == "sampled 1 of 2"  # the step is an earlier attempt's
    metrics.write_text('{"iteration": 4, "stage1/loss": 0.25, "stage1/kl_k3": 0.0125, "learning-rate": 1e-4}\n{"iter')
    assert process.progress() == "iteration 4, loss 0.25, kl_k3 0.0125"
    metrics.write_text('{"iteration": 1, "seconds": 3.0, "sample/responses": 16}\n')
    assert process.progress() == "sampled 1 of 2"  # what doesn't train tells in its log how far it is
