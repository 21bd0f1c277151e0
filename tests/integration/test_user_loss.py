"""A loss from a file of the user's: the same digits as the package's, an input of the artifact, clear errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_erpd.content import program_digest
from megatron_erpd.errors import RecipeError
from megatron_erpd.manifest import read_manifest
from megatron_erpd.objectives.types import ReplayInputs
from megatron_erpd.settings import ReplaySettings
from megatron_erpd.training.step import user_loss
from tests.distributed.harness import REPOSITORY, run_ranks
from tests.integration.stages import make_round, run_stages


def documented_loss() -> str:
    """The example of docs/extending.md as a file."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "def my_loss" in b)
    lines = [line[4:] for line in block.splitlines() if line[:4] in (">>> ", "... ")]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("log_probs"))]) + "\n"


def test_a_loss_of_the_user_trains_as_the_package_does(tmp_path: Path) -> None:
    make_round(tmp_path, num_prompts=4)
    file = tmp_path / "my_loss.py"
    file.write_text(documented_loss())
    common = ["--base", f"{tmp_path}/base", "--rollouts", f"{tmp_path}/rollouts.parquet", "--epochs", "1"]
    common += ["--base-log-probs", f"{tmp_path}/base-log-probs", "--learning-rate", "3e-3", "--unlearn"]
    common += ["--global-batch-size", "8", "--micro-batch-size", "4", "--kl-coefficient", "0.1"]
    losses = {"theirs": ["--loss", f"python:{file}:my_loss"]}
    losses["ours"] = ["--loss", "ppo", "--clip-low", "1", "--clip-high", "1e9"]
    stages = [("train", [*common, *flags, "--output", f"{tmp_path}/{name}"]) for name, flags in losses.items()]
    run_ranks(run_stages, 1, stages)

    def rows(name: str) -> list[dict[str, float]]:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if "time" not in k} for line in lines]

    assert len(rows("ours")) == 2 and rows("theirs") == rows("ours")
    assert read_manifest(tmp_path / "theirs").inputs["loss"] == program_digest(file)
    assert "loss" not in read_manifest(tmp_path / "ours").inputs


GOOD = "def my_loss(inputs):\n    return inputs.policy_log_probs.sum()\n"


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "my_loss", "no such file"),
        ("import nothing_of_this_name", "my_loss", "can't be imported: ModuleNotFoundError"),
        (GOOD, "other", "has no function 'other'; it has my_loss"),
    ],
)
def test_a_loss_that_cannot_be_loaded(code: str | None, name: str, message: str, tmp_path: Path) -> None:
    if code is not None:
        (tmp_path / "my_loss.py").write_text(code)
    with pytest.raises(RecipeError, match=message):
        user_loss(f"python:{tmp_path}/my_loss.py:{name}")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (GOOD, "returned Tensor; return objectives.types.LossOutput"),
        (
            "from megatron_erpd.objectives.types import LossOutput\n"
            "def my_loss(inputs):\n    return LossOutput(inputs.policy_log_probs, inputs.loss_mask.sum(), {})\n",
            "(?s)loss_sum is tensor.*must be a tensor without dimensions",
        ),
    ],
)
def test_a_loss_that_returns_something_else(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(code)
    loss, ones = user_loss(f"python:{tmp_path}/my_loss.py:my_loss"), torch.ones(2, 3)
    with pytest.raises(RecipeError, match=message):
        loss(ReplayInputs(ones, ones, ones, ones[:, 0], ones[:, 0]))


def test_names_of_losses() -> None:
    for wrong in ("ppo2", "python:my_loss:f", "python:my_loss.py"):
        with pytest.raises(ValueError, match=r"is unknown; choose one of ppo, .*python:FILE\.py:FUNCTION"):
            ReplaySettings(loss=wrong)
    settings = ReplaySettings(loss="python:a/my_loss.py:f")
    assert settings.loss_file == Path("a/my_loss.py") and ReplaySettings(loss="ppo").loss_file is None
    with pytest.raises(ValueError, match=r"beta 2\.0 has no effect"):
        ReplaySettings(loss="python:a/my_loss.py:f", beta=2.0)
