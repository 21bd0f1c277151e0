"""With virtual pipeline stages a process has several chunks of layers, which micro-batches reach in turns: the same
training, and the same artifact. The reference is one process with one micro-batch per step.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_erpd.manifest import read_manifest
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.test_bf16_layouts import GPU_RECIPE, in_bf16, states, tensors
from tests.integration.test_layouts import assert_same_training
from tests.integration.test_on_policy import VERIFIER, command, write_tokenizer
from tests.integration.test_resume_layouts import Part, metrics, train
from tests.integration.tiny import write_mixture, write_model, write_random_rollouts
from tests.tolerances import BF16_LOSS, LAYOUT, SECOND_STEP

SELECTIVE = ["--recompute-granularity", "selective"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
CHUNKS = ["--num-virtual-stages-per-pipeline-rank", "2"]
SCHEDULES = {
    "train:sapo": CHUNKS,
    "distill:cached": ["--num-layers-per-virtual-pipeline-stage", "1"],
    "distill:live": [*CHUNKS, "--microbatch-group-size-per-virtual-pipeline-stage", "4"],
    "distill:hidden": CHUNKS,
    "distill:gradient": CHUNKS,
    "train:stopped": CHUNKS,
    "on-policy:grpo": CHUNKS,
}
ONE, TWO = ["--micro-batch-size", "16"], ["--pipeline-parallel", "2", "--micro-batch-size", "4"]
SEQUENCE_PARALLEL = ["--tensor-parallel", "2", "--sequence-parallel"]
MODELS = {
    "tied": functools.partial(write_model, num_layers=4),
    "untied": functools.partial(write_model, num_layers=4, tied=False),
    "mixture": functools.partial(write_mixture, num_layers=4),
}
LAYOUTS = {
    # As many packs as the schedule's groups want.
    "pp2": ("tied", 2, ["--pipeline-parallel", "2", "--micro-batch-tokens", "60"], []),
    "pp2-tp2": ("untied", 4, [*TWO, *SEQUENCE_PARALLEL], FULL),
    "pp2-cp2": ("tied", 4, [*TWO, "--context-parallel", "2"], SELECTIVE),
    "pp2-tp2-ep2": ("mixture", 4, [*TWO, *SEQUENCE_PARALLEL, "--expert-parallel", "2"], []),
}
"""A model, the processes, their layout, and more of Megatron's flags."""


def trainings(made: Path) -> dict[str, list[str]]:
    """Of two steps, after which one is stopped: name to arguments, without output and layout."""
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--epochs", "0.8"]
    data += ["--base-log-probs", f"{made}/base-log-probs", "--global-batch-size", "16", "--learning-rate", "1e-3"]
    # Small steps: a gradient near 0, which is rounding, makes as large an update as any other.
    cached = ["--cache", f"{made}/cache", "--learning-rate", "3e-4"]
    live = ["--policy", f"teacher={made}/sapo", "--delta", "0.05", "--learning-rate", "3e-4"]
    stopped = ["--epochs", "1.6", "--warmup-fraction", "0", "--max-kl", "1e-5"]
    return {
        "train:sapo": [*data, "--loss", "sapo", "--kl-coefficient", "0.1"],
        "distill:cached": [*data, *cached],
        "distill:live": [*data, *live, "--teacher", "live"],
        "distill:hidden": [*data, *cached, *live, "--teacher", "hidden"],
        "distill:gradient": [*data, *cached, "--form", "policy_gradient", "--kl-budget", "0.001"],
        "train:stopped": [*data, "--loss", "sapo", *stopped],
        "on-policy:grpo": command(made, "grpo", "--updates", "2", "--kl-coefficient", "0.5"),
    }


def caching(made: Path, teacher: Path) -> list[str]:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--policy", f"teacher={teacher}"]
    return [*data, "--k", "8", "--delta", "0.05", "--topk-dtype", "float32", "--keep-hidden"]


def to_folders(folder: Path, layout: list[str], names: dict[str, list[str]], more: dict[str, list[str]]) -> Stages:
    """Trainings with a layout, and with Megatron's flags for each of them."""
    stages: Stages = []
    for name, argv in names.items():
        command, _, output = name.partition(":")
        kept = ["--checkpoints", "2"]
        stages.append((command, [*argv, *kept, "--output", f"{folder}/{output}", *layout, "--", *more[name]]))
    return stages


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """All artifacts of a model, made by one process."""
    return functools.cache(lambda model: make(tmp_path_factory.mktemp(model), MODELS[model]))


def make(folder: Path, write: Callable[[Path], Path]) -> Path:
    write(folder / "hf")
    write_random_rollouts(folder / "rollouts.parquet")
    write_tokenizer(folder / "hf")
    (folder / "prompts.jsonl").write_text('{"prompt": "w5 w7"}\n{"prompt": "w6 w9 w9"}\n')
    (folder / "verifier.py").write_text(VERIFIER)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet", *ONE]
    first, *others = to_folders(folder, ONE, trainings(folder), {name: [] for name in SCHEDULES})
    stages: Stages = [
        ("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"]),
        ("precompute", [*data, "--kind", "token", "--output", f"{folder}/base-log-probs"]),
        first,
        ("precompute", [*caching(folder, folder / "sapo"), "--output", f"{folder}/cache", *ONE]),
        *others,
    ]
    run_ranks(run_stages, 1, stages, timeout=240)
    return folder


@pytest.mark.parametrize(
    "layout", [name if name == "pp2" else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_training_is_that_of_one_process(layout: str, made_of: Callable[[str], Path], tmp_path: Path) -> None:
    model, processes, flags, more = LAYOUTS[layout]
    made = made_of(model)
    schedules = {name: [*chunks, *more] for name, chunks in SCHEDULES.items()}
    run_ranks(run_stages, processes, to_folders(tmp_path, flags, trainings(made), schedules), timeout=280)
    cache = [*caching(made, tmp_path / "sapo"), "--output", f"{tmp_path}/cache", *flags, "--", *CHUNKS]
    policies = [f"one={made}/live", f"two={tmp_path}/live"]
    export = [*(word for item in policies for word in ("--checkpoint", item)), "--output", f"{tmp_path}/export"]
    # In processes of their own: Megatron's state, which stages of a test share, says how many chunks there are.
    run_ranks(run_stages, processes, [("precompute", cache), ("export", export)], timeout=240)
    for name in SCHEDULES:
        output = name.partition(":")[2]
        assert_same_training(metrics(tmp_path / output), metrics(made / output), name)
        if name == "train:stopped":  # keeps no other checkpoint
            continue
        # After the first step Adam's first moment is the gradient, but for one factor.
        ours, theirs = (states(folder / output, "exp_avg", iteration=1) for folder in (tmp_path, made))
        assert ours.keys() == theirs.keys()
        for parameter, gradient in theirs.items():
            LAYOUT.assert_close(ours[parameter], gradient, f"{name}, gradient of {parameter}")
    exported = [load_file(tmp_path / "export" / name / "model.safetensors") for name in ("one", "two")]
    assert exported[0].keys() == exported[1].keys()
    for tensor, values in exported[0].items():
        SECOND_STEP.assert_close(exported[1][tensor], values, tensor)
    stops = [read_manifest(folder / "stopped").summary["stopped"] for folder in (tmp_path, made)]
    kl = metrics(made / "stopped")[-1]["stage1/policy_base_kl"]
    for stop in stops:
        assert stop.startswith("max_kl ") and stop.endswith(" > 1e-05 at iteration 2")
        assert float(stop.split()[1]) == pytest.approx(kl, rel=1e-3)
    # The same artifacts with and without virtual stages.
    for name in ("cache", *(() if more else ("live", "grpo"))):
        assert read_manifest(tmp_path / name).settings == read_manifest(made / name).settings


def test_bf16_training_resumes(tmp_path: Path) -> None:
    """Bit for bit with the same chunks; right when one process has gone on, and chunks after it."""
    in_bf16(write_model(tmp_path / "hf", num_layers=4))
    write_random_rollouts(tmp_path / "rollouts.parquet", 8, reward=1.0, shortest=4)
    run_ranks(run_stages, 1, [("import", ["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"])])
    argv = ["--base", f"{tmp_path}/base", "--rollouts", f"{tmp_path}/rollouts.parquet", "--loss", "sft"]
    argv += ["--precision", "bf16", "--epochs", "5", "--global-batch-size", "16", "--learning-rate", "1e-4"]
    recipe = ["--", *GPU_RECIPE, "--overlap-param-gather"]
    virtual, one = (2, [*TWO, *recipe, *CHUNKS]), (1, [*ONE, *recipe])

    def run(name: str, *parts: Part) -> None:
        for part in parts:
            train("train", argv, tmp_path / name, part, tmp_path)

    run("whole", Part(*virtual))
    run("resumed", Part(*virtual, "signal", 4, 4))
    shutil.copytree(tmp_path / "resumed", tmp_path / "others")
    run("resumed", Part(*virtual))
    run("others", Part(*one, "signal", 6, 6), Part(*virtual))
    whole, resumed, others = (metrics(tmp_path / name) for name in ("whole", "resumed", "others"))
    for name in ("stage1/loss", "grad-norm"):
        assert [row[name] for row in resumed] == [row[name] for row in whole], name
        BF16_LOSS.assert_close([row[name] for row in others], [row[name] for row in whole], name)
    ours, theirs = tensors(tmp_path / "resumed"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys() == tensors(tmp_path / "others").keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
