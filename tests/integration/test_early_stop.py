"""Stage 1 ends at a bound on KL or entropy with a complete artifact; checkpoints on the way are kept and pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.torch_dist.iterations import saved_iterations
from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.manifest import MANIFEST, REQUEST, read_manifest, verify_manifest
from megatron_erpd.objectives.advantages import zero_variance_groups
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, make_round, run_stages
from tests.tolerances import LAYOUT

# 10 steps on all of the rollouts, so that the KL grows from step to step.
TRAINING = ["--loss", "sapo", "--global-batch-size", "40", "--learning-rate", "1e-3", "--epochs", "10"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round, and in `whole` a training without bounds that keeps three checkpoints and saves more."""
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    flags = ["--checkpoints", "3", "--save-interval", "1", "--micro-batch-size", "20"]
    run_ranks(run_stages, 1, [training(folder, folder / "whole", *flags)])
    return folder


def training(made: Path, output: Path, *flags: str) -> tuple[str, list[str]]:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    return "train", [*data, "--base-log-probs", f"{made}/base-log-probs", *TRAINING, "--output", str(output), *flags]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bound_crossed_at(step: int, rows: list[dict[str, Any]]) -> float:
    """A ceiling on the KL that the curve crosses first at `step`."""
    values = [row["stage1/policy_base_kl"] for row in rows]
    assert max(values[: step - 1]) < values[step - 1], "the case should cross its bound once, at this step"
    return (max(values[: step - 1]) + values[step - 1]) / 2


def test_checkpoints_between_the_kept_ones_are_removed(made: Path) -> None:
    assert saved_iterations(made / "whole" / "megatron") == [4, 8, 10]
    manifest = verify_manifest(made / "whole")
    assert manifest.summary["iterations"] == 10 and "stopped" not in manifest.summary


def test_groups_without_a_signal_are_counted(made: Path) -> None:
    rollouts = read_rollouts(made / "rollouts.parquet")
    constant = zero_variance_groups(rollouts.rewards, rollouts.group_ids)
    num_constant = len(set(rollouts.group_ids[constant].tolist()))
    assert num_constant > 0, "the case should have some"
    summary = verify_manifest(made / "whole").summary
    assert (summary["groups"], summary["groups_without_signal"], summary["groups_of_one"]) == (10, num_constant, 0)


@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("--pipeline-parallel", "--context-parallel")),
        "--data-parallel",
    ],
)
def test_kl_ceiling_ends_the_training_on_all_ranks(layout: str, made: Path, tmp_path: Path) -> None:
    rows = metrics(made / "whole")
    bound = bound_crossed_at(6, rows)
    flags = ["--max-kl", repr(bound), "--checkpoints", "3", "--micro-batch-size", "4", layout, "2"]
    run_ranks(run_stages, 2, [training(made, tmp_path / "stopped", *flags)])
    manifest = verify_manifest(tmp_path / "stopped")
    assert manifest.summary["iterations"] == 6
    measured = rows[5]["stage1/policy_base_kl"]
    assert manifest.summary["stopped"] == f"max_kl {measured:.4g} > {bound:g} at iteration 6"
    assert saved_iterations(tmp_path / "stopped" / "megatron") == [4, 6]
    ours = metrics(tmp_path / "stopped")
    assert len(ours) == 6
    for a, b in zip(ours, rows, strict=False):
        assert a["stage1/loss"] == pytest.approx(b["stage1/loss"], rel=100 * LAYOUT.rtol, abs=1e-6)


def test_entropy_floor_of_an_imitation_without_log_probs(made: Path, tmp_path: Path) -> None:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--loss", "sft", "--epochs", "2"]
    flags = [
        *data,
        "--global-batch-size",
        "16",
        "--micro-batch-size",
        "16",
        "--min-entropy",
        "50",
        "--output",
        f"{tmp_path}/stopped",
    ]
    run_ranks(run_stages, 1, [("train", flags)])
    summary = verify_manifest(tmp_path / "stopped").summary
    assert summary["iterations"] == 1 and summary["stopped"].endswith("< 50 at iteration 1")


def test_a_kill_between_the_stop_and_the_manifest(made: Path, tmp_path: Path) -> None:
    """The next start writes the artifact and trains nothing; a reason without its checkpoint is done again."""
    bound = bound_crossed_at(6, metrics(made / "whole"))
    flags = ["--max-kl", repr(bound), "--save-interval", "4", "--micro-batch-size", "20"]
    stage: Stages = [training(made, tmp_path / "stopped", *flags)]
    run_ranks(run_stages, 1, stage)
    artifact = tmp_path / "stopped"
    first = read_manifest(artifact)
    assert first.summary["iterations"] == 6 and saved_iterations(artifact / "megatron") == [6]

    unfinish(artifact)
    lines = (artifact / "metrics.jsonl").read_bytes()
    (artifact / "megatron" / "iter_0000005").mkdir()  # the beginning of a checkpoint
    run_ranks(run_stages, 1, stage)
    again = verify_manifest(artifact)
    assert again.summary["stopped"] == first.summary["stopped"] and again.digest == first.digest
    assert (artifact / "metrics.jsonl").read_bytes() == lines

    # Stopped by somebody else's signal at the same step, without a reason: not complete.
    unfinish(artifact)
    (artifact / "early_stop.json").write_text(json.dumps({"iteration": 7, "reason": "max_kl 2 > 1"}))
    run_ranks(run_stages, 1, stage)
    goes_on = verify_manifest(artifact).summary
    assert goes_on["iterations"] >= 7 and "max_kl 2 > 1" not in goes_on.get("stopped", "")


def unfinish(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    request = {"stage": manifest.stage, "settings": manifest.settings, "inputs": manifest.inputs}
    (artifact / REQUEST).write_text(json.dumps(request))
    (artifact / MANIFEST).unlink()
