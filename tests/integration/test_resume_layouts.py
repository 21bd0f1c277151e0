"""A training that is interrupted under one layout goes on under another: to the same rollouts, losses and weights."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file

from megatron_erpd.checkpoint.torch_dist.iterations import latest_iteration
from megatron_erpd.data.batch import Batch
from megatron_erpd.training.run import ReplayRun
from tests.distributed.harness import RankError, run_ranks
from tests.integration.stages import make_round, run_stages
from tests.tolerances import LAYOUT

STEPS, BATCH = 10, 16
SETTINGS = ["--epochs", "4", "--global-batch-size", f"{BATCH}", "--learning-rate", "1e-3", "--save-interval", "2"]
FORMS = {
    "train": ["--loss", "sapo", "--kl-coefficient", "0.1"],
    # Its controller has a state of its own, which a rank of the last pipeline stage keeps.
    "distill": [
        *["--form", "policy_gradient", "--signal-weight", "0", "--advantage-weight", "1"],
        *["--kl-budget", "0.001"],
    ],
}


class Part(NamedTuple):
    """A training under one layout, up to the step in which it is stopped."""

    processes: int
    layout: list[str]
    stop: str = ""
    """`signal`: SIGTERM at one rank. `kill`: SIGKILL of one rank."""
    at: int = STEPS + 1
    done: int = STEPS
    """The steps that are kept: with the signal that one too, else those of the last checkpoint."""


ONE = (1, ["--micro-batch-size", "16"])
DP = (2, ["--data-parallel", "2", "--micro-batch-size", "4"])
TP = (2, ["--tensor-parallel", "2", "--micro-batch-size", "8"])
PP = (2, ["--pipeline-parallel", "2", "--micro-batch-size", "4"])
CP = (2, ["--context-parallel", "2", "--micro-batch-tokens", "50"])
PACKED = (1, ["--micro-batch-tokens", "60"])
PACKED_DP = (2, ["--data-parallel", "2", "--micro-batch-tokens", "90"])
PARTS = {
    "train": [Part(*ONE, "signal", 3, 3), Part(*DP, "kill", 6, 4), Part(*TP, "signal", 7, 7), Part(*PP)],
    "distill": [Part(*PACKED_DP, "kill", 4, 2), Part(*PACKED, "signal", 5, 5), Part(*CP, "kill", 8, 6), Part(*ONE)],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_each_part_goes_on_under_another_layout(form: str, made: Path, tmp_path: Path) -> None:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    argv = [*data, "--base-log-probs", f"{made}/base-log-probs", *FORMS[form], *SETTINGS]
    whole, output = tmp_path / "whole", tmp_path / "parts"
    expected = train(form, argv, whole, Part(*ONE), tmp_path)
    assert sorted(expected) == list(range(1, STEPS + 1))

    done = 0
    for part in PARTS[form]:
        seen = train(form, argv, output, part, tmp_path)
        # From the step after the last one that was kept, the same rollouts.
        assert sorted(seen) == list(range(done + 1, min(part.at, STEPS) + 1)), part
        last = {part.at} if part.stop == "kill" else set()  # cut off
        assert all(seen[step] == expected[step] for step in seen.keys() - last), part
        done = latest_iteration(output / "megatron")
        assert done == part.done

    ours, theirs = metrics(output), metrics(whole)
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs] == list(range(1, STEPS + 1))
    prefix = "stage1" if form == "train" else "stage2"
    for name in (f"{prefix}/loss", "grad-norm"):
        LAYOUT.assert_close([row[name] for row in ours], [row[name] for row in theirs], name)
    a, b = weights(output, tmp_path), weights(whole, tmp_path)
    assert a.keys() == b.keys()
    for name in b:
        LAYOUT.assert_close(a[name].tolist(), b[name].tolist(), name)


def train(form: str, argv: list[str], output: Path, part: Part, folder: Path) -> dict[int, list[int]]:
    """Runs a part; returns the rollouts of each of its steps, in order, whatever ranks had them."""
    for path in folder.glob("seen-*"):
        path.unlink()
    words = [*argv, "--output", str(output), *part.layout]
    if part.stop:
        # The rank that is left may see the end of the other first.
        message = (
            "died|closed by peer|reset by peer"
            if part.stop == "kill"
            else f"stopped at iteration {part.done} of {STEPS}"
        )
        with pytest.raises(RankError, match=message):
            run_ranks(_train_until, part.processes, form, words, folder, part.stop, part.at)
    else:
        run_ranks(_train_until, part.processes, form, words, folder, part.stop, part.at)
    return rollouts_of_steps(folder)


def rollouts_of_steps(folder: Path) -> dict[int, list[int]]:
    steps: dict[int, dict[int, list[int]]] = {}
    for path in sorted(folder.glob("seen-*")):
        of_rank: dict[int, list[int]] = {}
        for line in path.read_text().splitlines():
            step, data_rank, rows = json.loads(line)
            of_rank.setdefault(step, []).extend(rows)
        for step, rows in of_rank.items():
            # All ranks of one place in the data-parallel group read the same rollouts, as far as a kill lets them.
            shorter, longer = sorted((rows, steps.setdefault(step, {}).get(data_rank, [])), key=len)
            assert longer[: len(shorter)] == shorter
            steps[step][data_rank] = longer
    return {step: sorted(row for rows in ranks.values() for row in rows) for step, ranks in steps.items()}


def _train_until(rank: int, world_size: int, form: str, argv: list[str], folder: Path, stop: str, at: int) -> None:
    """A rank that writes down which rollouts it is given, and is stopped in a step."""
    from megatron.core import mpu

    batches = ReplayRun.batches

    def noted(self: ReplayRun, args: argparse.Namespace) -> Iterator[Batch]:
        packed, data_rank = self.layout.pack_tokens is not None, mpu.get_data_parallel_rank()
        per_step = self.packs_of_step() if packed else BATCH // self.layout.batch_unit
        consumed = args.consumed_train_samples
        with (folder / f"seen-{rank}").open("w") as file:
            for number, batch in enumerate(batches(self, args)):
                step = consumed // BATCH + number // per_step + 1
                file.write(json.dumps([step, data_rank, batch.row_indices.tolist()]) + "\n")
                file.flush()
                if stop and step == at and rank == world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL if stop == "kill" else signal.SIGTERM)
                yield batch

    ReplayRun.batches = noted  # type: ignore[method-assign]
    run_stages(rank, world_size, [(form, argv)])


def metrics(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]


def weights(artifact: Path, folder: Path) -> dict[str, Any]:
    output = folder / f"export-{artifact.name}"
    run_ranks(run_stages, 1, [("export", ["--checkpoint", f"policy={artifact}", "--output", str(output)])])
    return load_file(output / "policy" / "model.safetensors")
