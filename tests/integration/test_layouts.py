"""Every stage gives the same result at every layout: losses, gradients and cache rows.

The reference is one process with one micro-batch per step. Every other layout gets the reference's artifacts as inputs,
so that each stage is compared by itself, and another micro-batch size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_erpd.checkpoint import compare_weights
from megatron_erpd.teacher_cache.reader import CacheReader
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.test_bf16_layouts import states
from tests.integration.tiny import write_model, write_random_rollouts
from tests.tolerances import HALF_PRECISION, LAYOUT, LAYOUT_PROJECTION, SECOND_STEP

LAYOUTS = {
    "tp2": (2, ["--tensor-parallel", "2", "--micro-batch-size", "4"]),
    "tp2-sequence-parallel": (2, ["--tensor-parallel", "2", "--sequence-parallel", "--micro-batch-size", "8"]),
    "pp2": (2, ["--pipeline-parallel", "2", "--micro-batch-size", "4"]),
    "dp2": (2, ["--data-parallel", "2", "--micro-batch-size", "4"]),
    "tp2-pp2": (4, ["--tensor-parallel", "2", "--pipeline-parallel", "2", "--micro-batch-size", "8"]),
    "cp2": (2, ["--context-parallel", "2", "--micro-batch-size", "8"]),
    "cp2-tp2-sequence-parallel": (
        4,
        ["--context-parallel", "2", "--tensor-parallel", "2", "--sequence-parallel", "--micro-batch-size", "4"],
    ),
    # Of a single rollout one rank often has no response token.
    "cp2-pp2": (4, ["--context-parallel", "2", "--pipeline-parallel", "2", "--micro-batch-size", "1"]),
}
COMMON = ["--global-batch-size", "16", "--learning-rate", "1e-3", "--epochs", "0.8"]

GRADIENTS = ("train:ce", "train:exact", "distill:reverse", "distill:live", "distill:gradient")
"""Trainings that keep the checkpoint of their first step, of which every parameter's gradient is compared."""


def training_stages(reference: Path) -> dict[str, list[str]]:
    """Name to arguments, without output and layout."""
    data = ["--base", f"{reference}/base", "--rollouts", f"{reference}/rollouts.parquet", *COMMON]
    scored = [*data, "--base-log-probs", f"{reference}/base-log-probs"]
    live = ["--teacher", "live", "--policy", f"teacher={reference}/ce"]
    cached = ["--cache", f"{reference}/cache"]
    exact = ["--base-log-probs", f"{reference}/base-rows", "--kl-estimator", "exact"]
    hidden = ["--cache", f"{reference}/cache-hidden", "--teacher", "hidden", "--policy", f"teacher={reference}/ce"]
    gradient = ["--form", "policy_gradient", "--kl-budget", "0.001"]
    made = {
        "train:ce": [*scored, "--loss", "ce"],
        # At the first step the policy is the base and the KL 0: a weight that the second step can't overlook.
        "train:exact": [*data, *exact, "--loss", "sapo", "--kl-coefficient", "5", "--kl-topk", "8"],
        "train:sft": [*data, "--loss", "sft"],
        "distill:reverse": [*scored, *cached],
        "distill:live": [*scored, *live, "--delta", "0.05"],
        "distill:gathered": [*scored, *live, "--delta", "0.05", "--divergence", "js", "--gather-teacher"],
        "distill:hidden": [*scored, *hidden, "--delta", "0.05"],
        "distill:gradient": [*scored, *cached, *gradient],
        "distill:shuffled": [*scored, *cached, *gradient, "--shuffle-signal"],
    }
    return {name: [*argv, *["--checkpoints", "2"] * (name in GRADIENTS)] for name, argv in made.items()}


def precompute_stages(reference: Path) -> dict[str, list[str]]:
    data = ["--base", f"{reference}/base", "--rollouts", f"{reference}/rollouts.parquet"]
    policies = [*data, "--policy", f"teacher={reference}/ce"]
    target = [*policies, "--k", "8", "--delta", "0.002", "--topk-dtype", "float32"]
    return {
        "base-log-probs": [*data, "--kind", "token"],
        "base-rows": [*data, "--signal", "none", "--k", "8"],
        "cache": target,
        "cache-global": [*target, "--projection", "global"],
        "cache-hidden": [*target, "--keep-hidden"],
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All artifacts, made by one process."""
    folder = tmp_path_factory.mktemp("reference")
    write_model(folder / "hf")
    write_random_rollouts(folder / "rollouts.parquet")
    stages: Stages = [("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"])]
    precomputed, trained = precompute_stages(folder), training_stages(folder)
    layout = ["--micro-batch-size", "16"]

    def precompute(name: str) -> None:
        stages.append(("precompute", [*precomputed[name], "--output", f"{folder}/{name}", *layout]))

    def train(name: str) -> None:
        command, _, output = name.partition(":")
        stages.append((command, [*trained[name], "--output", f"{folder}/{output}", *layout]))

    precompute("base-log-probs")
    precompute("base-rows")
    train("train:ce")
    precompute("cache")
    precompute("cache-global")
    precompute("cache-hidden")
    for name in trained:
        if name != "train:ce":
            train(name)
    run_ranks(run_stages, 1, stages, timeout=240)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Each is in a layout of four processes; DP in that of tests/integration/test_resume_layouts.py.
ALONE = ("tp2", "pp2", "cp2", "dp2", "tp2-sequence-parallel")
LONG = [pytest.param(name, marks=pytest.mark.long) if name in (*ALONE, "cp2-pp2") else name for name in LAYOUTS]


@pytest.mark.parametrize("layout", LONG)
def test_layout_gives_the_result_of_one_process(layout: str, reference: Path, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    stages: Stages = [("import", ["--hf", f"{reference}/hf", "--output", f"{tmp_path}/base"])]
    for name, argv in precompute_stages(reference).items():
        stages.append(("precompute", [*argv, "--output", f"{tmp_path}/{name}", *flags]))
    for name, argv in training_stages(reference).items():
        command, _, output = name.partition(":")
        stages.append((command, [*argv, "--output", f"{tmp_path}/{output}", *flags]))
    stages.append(("export", ["--checkpoint", f"initial={tmp_path}/base", "--output", f"{tmp_path}/export"]))
    run_ranks(run_stages, world_size, stages, timeout=400)

    for name in precompute_stages(reference):
        assert_same_rows(CacheReader(tmp_path / name), CacheReader(reference / name))
    for name in training_stages(reference):
        output = name.partition(":")[2]
        assert_same_training(metrics(tmp_path / output), metrics(reference / output), name)
        if name not in GRADIENTS:
            continue
        # After the first step Adam's first moment is the gradient, but for one factor.
        ours, theirs = (states(folder / output, "exp_avg", iteration=1) for folder in (tmp_path, reference))
        assert ours.keys() == theirs.keys()
        bound = LAYOUT_PROJECTION if name == "distill:reverse" else LAYOUT
        for parameter, gradient in theirs.items():
            bound.assert_close(ours[parameter], gradient, f"{name}, gradient of {parameter}")
    assert compare_weights(reference / "hf", tmp_path / "export" / "initial") == []


def assert_same_training(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> None:
    assert len(ours) == len(theirs) == 2
    assert ours[0].keys() == theirs[0].keys()
    (loss,) = (key for key in ours[0] if key in ("stage1/loss", "stage2/loss"))
    for step, (a, b, bound) in enumerate(zip(ours, theirs, (LAYOUT, SECOND_STEP), strict=True)):
        for key in (loss, "grad-norm"):
            what = f"{name}, step {step + 1}, {key}"
            assert a[key] == pytest.approx(b[key], rel=bound.rtol, abs=1e-7), what


def assert_same_rows(ours: CacheReader, theirs: CacheReader) -> None:
    assert ours.meta.kind == theirs.meta.kind and ours.num_rows == theirs.num_rows == 40
    assert set(ours.sample_ids()) == set(theirs.sample_ids())
    half = theirs.meta.topk_dtype == "float16"
    for name in theirs.sample_ids():
        for policy in theirs.meta.policies:
            np.testing.assert_allclose(ours.token_row(policy, name), theirs.token_row(policy, name), atol=1e-5)
            if theirs.meta.hidden_size is not None:
                a, b = ours.hidden_row(policy, name).float(), theirs.hidden_row(policy, name).float()
                HALF_PRECISION.assert_close(a, b)
        if theirs.meta.kind == "topk":
            for a, b in zip(ours.topk_row(name)[1:], theirs.topk_row(name)[1:], strict=True):
                (HALF_PRECISION if half or theirs.meta.hidden_size else LAYOUT).assert_close(a, b)
    for name, values in theirs.statistics.items():
        for key, value in values.items():
            # A small KL is a difference of numbers near 1: its error is absolute.
            tolerance = 1e-2 if theirs.meta.hidden_size else 1e-4
            assert ours.statistics[name][key] == pytest.approx(value, rel=tolerance, abs=1e-5), f"{name} {key}"
