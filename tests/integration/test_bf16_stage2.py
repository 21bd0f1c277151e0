"""Stage 2, its KL controller and the early stop of stage 1 as the recipes for GPUs run them: in bf16, at every layout.

The model's embeddings are not tied, so that both ends of a pipeline have weights of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.manifest import verify_manifest
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.test_bf16_layouts import GPU_RECIPE, LAYOUTS, assert_same_gradient, first_gradient, in_bf16
from tests.integration.test_early_stop import bound_crossed_at, unfinish
from tests.integration.test_resume_layouts import metrics
from tests.integration.tiny import write_model, write_random_rollouts
from tests.tolerances import BF16_KL, BF16_LOG_COEFFICIENT, BF16_LOSS, BF16_NORM, MIN_BF16_COSINE_STUDENT

STEPS = 6
MEGATRON = ["--", *GPU_RECIPE, "--overlap-param-gather"]
COMMON = ["--global-batch-size", "32", "--epochs", f"{STEPS}", "--precision", "bf16"]
SETTINGS = {
    "student": ["--learning-rate", "1e-4", "--checkpoints", f"{STEPS}"],
    "controlled": [
        *["--form", "policy_gradient", "--signal-weight", "0", "--advantage-weight", "1"],
        *["--kl-budget", "0.01", "--learning-rate", "1e-3"],
    ],
    "bounded": ["--loss", "sapo", "--learning-rate", "1e-3"],
}


def training(made: Path, kind: str, output: Path, *flags: str) -> tuple[str, list[str]]:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    data += ["--base-log-probs", f"{made}/base-log-probs", "--output", str(output)]
    data += ["--cache", f"{made}/cache"] if kind == "student" else []
    return "train" if kind == "bounded" else "distill", [*data, *COMMON, *SETTINGS[kind], *flags, *MEGATRON]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round, and each training in one process, that of stage 1 without a bound."""
    folder = tmp_path_factory.mktemp("stage2")
    for name, seed in {"base": 0, "teacher": 1}.items():
        in_bf16(write_model(folder / f"hf-{name}", seed=seed, tied=False))
    write_random_rollouts(folder / "rollouts.parquet", 8)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet", "--precision", "bf16"]
    target = ["--policy", f"teacher={folder}/teacher", "--k", "8", "--delta", "0.5", "--topk-dtype", "float32"]
    stages: Stages = [
        *(("import", ["--hf", f"{folder}/hf-{name}", "--output", f"{folder}/{name}"]) for name in ("base", "teacher")),
        ("precompute", [*data, "--kind", "token", "--output", f"{folder}/base-log-probs"]),
        ("precompute", [*data, *target, "--output", f"{folder}/cache"]),
        *(training(folder, kind, folder / kind, *LAYOUTS["one"][1]) for kind in SETTINGS),
    ]
    (seen,) = run_ranks(run_watched, 1, stages)
    (folder / "coefficients.json").write_text(json.dumps([value for _, value in seen["coefficient"]]))
    return folder


@pytest.mark.parametrize(
    "layout", ["tp2-sequence-parallel", *(pytest.param(name, marks=pytest.mark.long) for name in ("dp2", "pp2", "cp2"))]
)
def test_student_of_a_cache_is_that_of_one_process(layout: str, made: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    run_ranks(run_stages, processes, [training(made, "student", tmp_path / "student", *flags)])
    ours, theirs = tmp_path / "student", made / "student"
    losses, expected = ([row["stage2/loss"] for row in metrics(folder)] for folder in (ours, theirs))
    assert len(expected) == STEPS and expected[-1] < 0.95 * expected[0]
    BF16_LOSS.assert_close(losses, expected, "losses")
    BF16_NORM.assert_close(metrics(ours)[0]["grad-norm"], metrics(theirs)[0]["grad-norm"], "norm of the gradient")
    gradient = first_gradient(theirs)
    assert_same_gradient(first_gradient(ours), gradient, dict.fromkeys(gradient, MIN_BF16_COSINE_STUDENT))


@pytest.mark.parametrize("layout", ["dp2", pytest.param("pp2", marks=pytest.mark.long)])
def test_budget_and_bound_act_alike_on_all_ranks(layout: str, made: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    bound = bound_crossed_at(5, metrics(made / "bounded"))
    stopped = training(made, "bounded", tmp_path / "bounded", "--max-kl", repr(bound), *flags)
    stages: Stages = [training(made, "controlled", tmp_path / "controlled", *flags), stopped]
    ranks = [seen for seen in run_ranks(run_watched, processes, stages) if seen]
    assert len(ranks) == (1 if layout == "pp2" else 2)  # of the last stage
    assert all(seen == ranks[0] for seen in ranks)
    assert [step for step, _ in ranks[0]["coefficient"]] == list(range(1, STEPS + 1))

    kls = ([row["stage2/policy_base_kl"] for row in metrics(folder / "controlled")] for folder in (tmp_path, made))
    BF16_KL.assert_close(*kls, "KL")
    alone = json.loads((made / "coefficients.json").read_text())
    coefficients = [value for _, value in ranks[0]["coefficient"]]
    paths = ([math.log(value) for value in path] for path in (coefficients, alone))
    BF16_LOG_COEFFICIENT.assert_close(*paths, "log of the coefficient")

    reasons = ranks[0]["reason"]
    assert [reason is None for _, reason in reasons] == [True] * 4 + [False]
    manifest = verify_manifest(tmp_path / "bounded")
    assert manifest.summary["iterations"] == 5
    unfinish(tmp_path / "bounded")  # as a kill leaves it, right after the stop
    assert not any(run_ranks(run_watched, processes, [stopped]))
    assert verify_manifest(tmp_path / "bounded").digest == manifest.digest


def run_watched(rank: int, world_size: int, stages: Stages) -> dict[str, list[tuple[int, Any]]]:
    """Runs stages; returns what this rank's controller and its early stop made of each step."""
    from megatron_erpd.training.early_stop import EarlyStop
    from megatron_erpd.training.kl_budget import KlBudget

    seen: dict[str, list[tuple[int, Any]]] = {}
    control, crossed = KlBudget.after_step, EarlyStop._crossed

    def controlled(self: KlBudget, means: Mapping[str, float]) -> None:
        control(self, means)
        seen.setdefault("coefficient", []).append((self.iteration, self.coefficient))

    def noted(self: EarlyStop, entropy: float, kl: float | None) -> str | None:
        reason = crossed(self, entropy, kl)
        seen.setdefault("reason", []).append((self.iteration, reason))
        return reason

    KlBudget.after_step = controlled  # type: ignore[method-assign]
    EarlyStop._crossed = noted  # type: ignore[method-assign]
    run_stages(rank, world_size, stages)
    return seen
