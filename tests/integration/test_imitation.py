"""Imitation where few rollouts are chosen: a batch without any is no step, on any layout and after any interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollouts import write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.manifest import read_manifest
from tests.distributed.harness import run_ranks
from tests.integration.stages import run_stages
from tests.integration.tiny import write_model

NUM_ROLLOUTS, BATCH, EPOCHS = 24, 4, 4
CHOSEN = 5


def train(made: Path, output: Path, ranks: int, *flags: str) -> list[dict[str, float | None]]:
    argv = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--output", str(output)]
    argv += ["--loss", "sft", "--epochs", str(EPOCHS), "--global-batch-size", str(BATCH), "--micro-batch-size", "2"]
    argv += ["--learning-rate", "1e-2", "--weight-decay", "0.1", "--tensor-parallel", "1", *flags]
    run_ranks(run_stages, ranks, [("train", argv)])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imitation")
    write_model(folder / "hf")
    rows = [
        Rollout(
            prompt_token_ids=np.array([1, 2]),
            response_token_ids=np.array([3, 4 + i]),
            reward=float(i == CHOSEN),
            group_id=0,
        )
        for i in range(NUM_ROLLOUTS)
    ]
    write_rollouts(folder / "rollouts.parquet", rows)
    run_ranks(run_stages, 1, [("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"])])
    return folder


def test_a_step_is_made_of_every_batch_with_a_chosen_rollout_and_of_no_other(made: Path, tmp_path: Path) -> None:
    order = BatchOrder([4] * NUM_ROLLOUTS, BATCH, 1)
    total = NUM_ROLLOUTS * EPOCHS // BATCH
    expected = sum(CHOSEN in order.global_batch(i * BATCH) for i in range(total))
    assert expected == EPOCHS  # one in each pass
    alone = train(made, tmp_path / "alone", 1)
    assert [row["iteration"] for row in alone] == list(range(1, expected + 1))
    assert all(isinstance(value, int | float) for row in alone for value in row.values())
    # The chosen rollout gets likelier with every step.
    losses = [row["stage1/loss"] for row in alone]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    summary = read_manifest(tmp_path / "alone").summary
    assert (summary["imitated"], summary["batches_left_out"]) == (1, total - expected)

    spread = train(made, tmp_path / "spread", 2)
    np.testing.assert_allclose([row["stage1/loss"] for row in spread], losses, rtol=1e-4)
