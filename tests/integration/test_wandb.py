"""Weights & Biases gets a training's metrics under the names of the other files, and is no part of the result.

wandb is not among the packages of the tests: a module of its name stands in for the calls that Megatron makes.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_erpd.manifest import read_manifest
from megatron_erpd.training.metrics import SAVE_TIME
from tests.distributed.harness import RankError, run_ranks
from tests.integration.stages import make_round, run_stages

STAND_IN = """
import json, os, types
nothing = lambda *a, **k: None
run = types.SimpleNamespace(entity="me", project="mine", log_artifact=nothing, use_artifact=nothing)
def _say(**record):
    with open(os.environ["SAID"], "a") as file:
        file.write(json.dumps(record) + "\\n")
config = types.SimpleNamespace(update=lambda *a, **k: None)
def init(dir, name, project, config, entity=None):
    assert os.path.isdir(dir)
    _say(init=[project, entity, name, dir, os.environ.get("WANDB_MODE")], steps=config["train_iters"])
def log(metrics, step): _say(step=step, metrics={name: float(value) for name, value in metrics.items()})
def finish(): _say(finished=True)
class Artifact:
    def __init__(self, *a, **k): pass
    def add_reference(self, *a, **k): pass
    def add_file(self, *a, **k): pass
"""


def with_stand_in(rank: int, world_size: int, folder: str, stages: list[tuple[str, list[str]]]) -> None:
    import os
    import sys

    sys.path.insert(0, folder)
    os.environ["SAID"] = f"{folder}/said.jsonl"
    run_stages(rank, world_size, stages)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    return folder


def training(made: Path, output: Path) -> list[str]:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    data += ["--base-log-probs", f"{made}/base-log-probs", "--global-batch-size", "40", "--micro-batch-size", "20"]
    return [*data, "--loss", "ce", "--epochs", "3", "--output", str(output)]


def test_every_metric_of_every_step_is_there(made: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(STAND_IN)
    output, plain = tmp_path / "run/round-01/teacher", tmp_path / "plain"
    asked = ["--wandb-project", "erpd", "--wandb-entity", "us", "--wandb-mode", "offline"]
    stages = [("train", [*training(made, output), *asked]), ("train", training(made, plain))]
    run_ranks(with_stand_in, 1, str(tmp_path), stages)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    folder = str(tmp_path / "run/round-01/wandb")
    assert said[0] == {"init": ["erpd", "us", "run/round-01/teacher", folder, "offline"], "steps": 3}
    assert said[-1] == {"finished": True} and sum("init" in record for record in said) == 1
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and "stage1/loss" in rows[0] and "iteration-time" in rows[1] and "world-size" in rows[1]
    for row in rows:
        logged = {k: v for r in said if r.get("step") == row["iteration"] for k, v in r["metrics"].items()}
        # Written after the step was logged: the number of the step, and the time of the save after it.
        shown = {name: value for name, value in row.items() if name not in ("iteration", SAVE_TIME)}
        assert {name: logged.get(name) for name in shown} == shown
    ours, theirs = read_manifest(output), read_manifest(plain)
    assert (ours.settings, ours.inputs) == (theirs.settings, theirs.inputs)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_without_wandb_nothing_is_begun(made: Path, tmp_path: Path) -> None:
    asked = [*training(made, tmp_path / "teacher"), "--wandb-project", "erpd"]
    with pytest.raises(RankError, match="--wandb-project: wandb isn't installed; pip install wandb"):
        run_ranks(run_stages, 1, [("train", asked)])
    assert not (tmp_path / "teacher").exists()


def test_megatrons_own_flags_are_refused(made: Path, tmp_path: Path) -> None:
    asked = [*training(made, tmp_path / "teacher"), "--", "--wandb-project", "erpd"]
    with pytest.raises(RankError, match="--wandb-project: Megatron's flags count as settings"):
        run_ranks(run_stages, 1, [("train", asked)])
