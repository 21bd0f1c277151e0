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
from tests.tolerances import HALF_PRECISION, LAYOUT, SECOND_STEP

PACKED = {
    "packed": (1, []),
    "packed-tp2": (2, ["--tensor-parallel", "2"]),
    "packed-cp2": (2, ["--context-parallel", "2"]),
    "packed-pp2": (2, ["--pipeline-parallel", "2"]),
    "packed-dp2": (2, ["--data-parallel", "2"]),
    "packed-cp2-tp2-sequence-parallel": (
        4,
        ["--context-parallel", "2", "--tensor-parallel", "2", "--sequence-parallel"],
    ),
    "packed-cp2-pp2": (4, ["--context-parallel", "2", "--pipeline-parallel", "2"]),
}
"""Packs of two and more rollouts, which are of up to 25 tokens."""
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
    **{name: (size, [*flags, "--micro-batch-tokens", "50"]) for name, (size, flags) in PACKED.items()},
}
COMMON = ["--global-batch-size", "16", "--learning-rate", "1e-3", "--epochs", "0.8"]

MAIN = ("base-log-probs", "cache", "train:ce", "train:ppo", "distill:reverse", "distill:live")
"""What is run for every layout."""
SHORT = {
    "packed": (),
    "packed-tp2": ("cache-global", "distill:gathered", "distill:gradient"),
    "packed-cp2": ("base-rows", "cache-hidden", "train:exact", "distill:hidden"),
    "packed-pp2": (),
    "packed-cp2-tp2-sequence-parallel": (),
    "tp2-pp2": (),
}
"""The layouts of `make test`, and what is run for them beside: what they do their own way. For all others everything is
run; padded each is in a layout of four processes, or in another test of `make test`."""


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
        "train:ppo": [*scored, "--loss", "ppo"],
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
    return {name: [*argv, "--checkpoints", "2"] for name, argv in made.items()}


def precompute_stages(reference: Path) -> dict[str, list[str]]:
    data = ["--base", f"{reference}/base", "--rollouts", f"{reference}/rollouts.parquet"]
    policies = [*data, "--policy", f"teacher={reference}/ce"]
    target = [*policies, "--k", "8", "--delta", "0.05", "--topk-dtype", "float32"]
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


MARKED = [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]


@pytest.mark.parametrize("layout", MARKED)
def test_layout_gives_the_result_of_one_process(layout: str, reference: Path, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    made = {**precompute_stages(reference), **training_stages(reference)}
    chosen = [name for name in made if layout not in SHORT or name in (*MAIN, *SHORT[layout])]
    stages: Stages = [("import", ["--hf", f"{reference}/hf", "--output", f"{tmp_path}/base"])]
    for name in chosen:
        command, _, output = name.rpartition(":")
        once = ["--epochs", "0.4", "--checkpoints", "1"] if command and layout in SHORT and world_size > 1 else []
        stages.append((command or "precompute", [*made[name], *once, "--output", f"{tmp_path}/{output}", *flags]))
    stages.append(("export", ["--checkpoint", f"initial={tmp_path}/base", "--output", f"{tmp_path}/export"]))
    run_ranks(run_stages, world_size, stages, timeout=400)

    for name in chosen:
        output = name.rpartition(":")[2]
        if name == output:
            assert_same_rows(CacheReader(tmp_path / name), CacheReader(reference / name))
        else:
            assert_same_training(metrics(tmp_path / output), metrics(reference / output), name)
            assert_same_gradients(tmp_path / output, reference / output, name)
    assert compare_weights(reference / "hf", tmp_path / "export" / "initial") == []


def train_with_more_packs(rank: int, world_size: int, stages: Stages) -> None:
    from megatron_erpd.training.run import TrainingRun

    # More than a step has rollouts, as a schedule of virtual pipeline stages may want.
    TrainingRun.packs_for = lambda self, least: 20  # type: ignore[method-assign]
    run_stages(rank, world_size, stages)


def test_empty_packs_change_nothing(reference: Path, tmp_path: Path) -> None:
    flags = ["--data-parallel", "2", "--micro-batch-tokens", "50", "--epochs", "0.4", "--checkpoints", "1"]
    names, made = ("train:ce", "distill:live"), training_stages(reference)
    stages: Stages = []
    for name in names:
        command, _, output = name.rpartition(":")
        stages.append((command, [*made[name], *flags, "--output", f"{tmp_path}/{output}"]))
    run_ranks(train_with_more_packs, 2, stages)
    for name in names:
        output = name.rpartition(":")[2]
        assert_same_training(metrics(tmp_path / output), metrics(reference / output), name)
        assert_same_gradients(tmp_path / output, reference / output, name)


def assert_same_gradients(ours: Path, theirs: Path, name: str) -> None:
    """Of the first step: after it Adam's first moment is the gradient, but for one factor."""
    found, expected = (states(folder, "exp_avg", iteration=1) for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        LAYOUT.assert_close(found[parameter], gradient, f"{name}, gradient of {parameter}")


def assert_same_training(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> None:
    assert 1 <= len(ours) <= len(theirs) <= 2
    assert ours[0].keys() == theirs[0].keys()
    (loss,) = (key for key in ours[0] if key in ("stage1/loss", "stage2/loss"))
    for step, (a, b, bound) in enumerate(zip(ours, theirs, (LAYOUT, SECOND_STEP), strict=False)):
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
