"""The KL controller in a run: stage 2 ends at its budget, from a coefficient that is decades off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.integration.stages import make_round, run_stages

BUDGET = 0.02


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    return folder


def test_a_run_ends_at_its_budget(made: Path, tmp_path: Path) -> None:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    data += ["--base-log-probs", f"{made}/base-log-probs", "--global-batch-size", "40", "--micro-batch-size", "40"]
    control = ["--form", "policy_gradient", "--signal-weight", "0", "--advantage-weight", "1"]
    control += ["--kl-budget", str(BUDGET), "--learning-rate", "1e-4", "--epochs", "80"]
    firsts = {"weak": "0.05", "strong": "20"}
    run_ranks(
        run_stages,
        1,
        [
            ("distill", [*data, *control, "--kl-coefficient", first, "--output", f"{tmp_path}/{name}"])
            for name, first in firsts.items()
        ],
    )
    for name in firsts:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        kls = [row["stage2/policy_base_kl"] / BUDGET for row in rows]
        assert len(kls) == 80
        assert sum(kls[60:]) / 20 == pytest.approx(1, abs=0.1), kls
        assert max(kls) < 2, kls
