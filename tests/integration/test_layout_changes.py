"""A training resumes under every layout that Megatron can give its checkpoint to; others are refused before it loads.

Each start loads the checkpoint of a stopped training, and in place of its first step saves what it has loaded: the same
weights, master weights, moments, step and learning rate, bit for bit, whatever the layout. So what one layout has saved
and loaded stands for all that save the same.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_erpd.checkpoint.torch_dist.iterations import iteration_folder, latest_iteration
from megatron_erpd.errors import ErpdError, StageInterrupted
from tests.distributed.harness import run_ranks
from tests.integration.stages import run_stages
from tests.integration.test_bf16_layouts import GPU_RECIPE, in_bf16, tensors
from tests.integration.tiny import write_mixture, write_model, write_random_rollouts

SEQUENCE_PARALLEL = ["--tensor-parallel", "2", "--sequence-parallel"]
DP, PP, EP = (["--data-parallel", "2"], ["--pipeline-parallel", "2"], ["--expert-parallel", "2"])
CP = ["--context-parallel", "2"]
OPTIMIZERS = {"distributed": GPU_RECIPE, "plain": []}
"""`plain`: fp32 master weights on every data-parallel rank."""
SAVED = {"dense": DP, "mixture": [*SEQUENCE_PARALLEL, *EP]}
"""The layouts of the trainings that are stopped. The vocabulary is odd: with TP 2 it is padded."""
LOADED = {
    1: {"dense": {"one": []}},
    2: {"dense": {"tp2": SEQUENCE_PARALLEL, "pp2": PP, "cp2": CP}, "mixture": {"dp2-ep2": [*DP, *EP]}},
    4: {
        "dense": {
            "tp2-pp2": [*SEQUENCE_PARALLEL, *PP],
            "tp2-dp2": [*SEQUENCE_PARALLEL, *DP],
            "pp2-dp2": [*PP, *DP],
            "cp2-dp2": [*CP, *DP],
        },
        "mixture": {
            "tp2-dp2-ep2": [*SEQUENCE_PARALLEL, *DP, *EP],
            "tp2-pp2-ep2": [*SEQUENCE_PARALLEL, *PP, *EP],
            "pp2-dp2-ep2": [*PP, *DP, *EP],
            "cp2-dp2-ep2": [*CP, *DP, *EP],
            "tp2-dp2-ep4": [*SEQUENCE_PARALLEL, *DP, "--expert-parallel", "4"],
        },
    },
}


def training(made: Path, model: str, optimizer: str, layout: list[str]) -> list[str]:
    """A stage 1 that stops after its second step."""
    data = ["--base", f"{made}/{model}/base", "--rollouts", f"{made}/rollouts.parquet"]
    data += ["--output", f"{made}/{model}/{optimizer}"]
    settings = ["--loss", "sft", "--epochs", "4", "--global-batch-size", "16", "--micro-batch-size", "4"]
    settings += ["--learning-rate", "1e-3", "--min-learning-rate", "1e-4", "--weight-decay", "0.1"]
    return [*data, *settings, "--precision", "bf16", *layout, "--", "--exit-interval", "2", *OPTIMIZERS[optimizer]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes")
    write_random_rollouts(folder / "rollouts.parquet", reward=1.0)
    in_bf16(write_model(folder / "dense" / "hf"))
    in_bf16(write_mixture(folder / "mixture" / "hf"))
    imports = [("import", ["--hf", f"{folder}/{m}/hf", "--output", f"{folder}/{m}/base"]) for m in SAVED]
    run_ranks(run_stages, 1, imports)
    return folder


@pytest.fixture(scope="module")
def distributed(made: Path) -> Path:
    older = []
    for name in ("spoiled", "sound"):
        (made / name).mkdir()
        (made / name / "base").symlink_to(made / "dense" / "base")
        older.append(training(made, name, "distributed", DP))
    run_ranks(stop_trainings, 2, [training(made, name, "distributed", SAVED[name]) for name in SAVED], *older)
    return made


@pytest.fixture(scope="module")
def plain(made: Path) -> Path:
    run_ranks(stop_trainings, 2, [training(made, name, "plain", SAVED[name]) for name in SAVED])
    return made


def stop_trainings(rank: int, world_size: int, trainings: list[list[str]], *older: list[str]) -> None:
    """Runs trainings that are stopped; before them one as a version did that saved the optimizer as Megatron does, and
    one whose checkpoint is right and doesn't say so."""
    from megatron_erpd import platform

    if older:  # first: the correction stays
        spoiled, sound = older
        correct, platform.save_optimizer_without_padding = platform.save_optimizer_without_padding, lambda args: None
        stop(rank, world_size, spoiled)
        platform.save_optimizer_without_padding = correct
        mark, platform.WITHOUT_PADDING = platform.WITHOUT_PADDING, "unknown"
        stop(rank, world_size, sound)
        platform.WITHOUT_PADDING = mark
    for argv in trainings:
        stop(rank, world_size, argv)


def stop(rank: int, world_size: int, argv: list[str]) -> None:
    """Runs a training that is stopped on its way, and leaves Megatron as another layout needs it."""
    with pytest.raises(StageInterrupted):
        run_stages(rank, world_size, [("train", argv)])
    leave_megatron()


def leave_megatron() -> None:
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()


def load_and_save(rank: int, world_size: int, starts: list[tuple[list[str], Path]]) -> list[dict[str, Any]]:
    """Starts trainings, each of which saves what it has loaded in a folder; returns what that holds beside tensors."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron.training import training

    for argv, folder in starts:
        training.train = saving_in(folder)
        stop(rank, world_size, argv)
    return [without_tensors(folder) for _, folder in starts]


def saving_in(folder: Path) -> Any:
    """What is called in place of Megatron's training loop."""

    def save(step: Any, model: Any, optimizer: Any, scheduler: Any, *_: Any, **__: Any) -> None:
        from megatron.training.checkpointing import save_checkpoint
        from megatron.training.global_vars import get_args

        args = get_args()
        args.save = str(folder / "megatron")
        save_checkpoint(args.iteration, model, optimizer, scheduler, 0)
        sys.exit()

    return save


def without_tensors(artifact: Path) -> dict[str, Any]:
    """A checkpoint's step, learning rate and what else isn't a tensor of a parameter."""
    from megatron.core import dist_checkpointing

    checkpoint = artifact / "megatron"
    common = dist_checkpointing.load_common_state_dict(str(iteration_folder(checkpoint, latest_iteration(checkpoint))))
    samples = common["args"].consumed_train_samples
    found = {name: common[name] for name in ("iteration", "optimizer", "opt_param_scheduler")} | {"samples": samples}
    return {name: repr(value) for name, value in found.items()}


def saved_states(rank: int, world_size: int, artifacts: list[Path]) -> list[dict[str, Any]]:
    from megatron_erpd import platform

    platform.enable_cpu()
    return [without_tensors(artifact) for artifact in artifacts]


CASES = [
    pytest.param(processes, optimizer, marks=() if (processes, optimizer) == (2, "distributed") else pytest.mark.long)
    for optimizer in OPTIMIZERS
    for processes in LOADED
]


@pytest.mark.parametrize(("processes", "optimizer"), CASES)
def test_what_is_loaded_is_what_was_saved(
    processes: int, optimizer: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = request.getfixturevalue(optimizer)
    changes = [(model, name) for model, layouts in LOADED[processes].items() for name in layouts]
    starts = [
        (training(made, model, optimizer, LOADED[processes][model][name]), tmp_path / f"{model}-{name}")
        for model, name in changes
    ]
    ours = run_ranks(load_and_save, processes, starts, timeout=300)[0]
    theirs = run_ranks(saved_states, 1, [made / model / optimizer for model, _ in changes])[0]
    for (model, name), (_, folder), found, expected in zip(changes, starts, ours, theirs, strict=True):
        assert found == expected, (model, name)
        assert "'lr': 0.00" in found["optimizer"] and found["iteration"] == "2"
        loaded, saved = tensors(folder), tensors(made / model / optimizer)
        assert loaded.keys() == saved.keys()
        assert sum("exp_avg_sq" in key for key in loaded) > 8
        for key, value in loaded.items():
            assert torch.equal(value, saved[key]), (model, name, key)


REFUSED = {
    "precision": ("dense", ["--precision", "fp32"], [], "precision: bf16 -> fp32"),
    "optimizer": ("dense", [], ["--overlap-param-gather"], r"megatron: \[.*\] -> .*--overlap-param-gather"),
    "sharded experts": ("mixture", [], ["--expert-tensor-parallel-size", "2"], "--expert-tensor-parallel-size: .*is 1"),
    "experts": ("mixture", [], [], "saved with expert parallel size 2, .* go on with expert_parallel above 1"),
    "an older version": ("spoiled", [], [], "other parameters' optimizer state .*layer_norm.* begin anew"),
}
"""A training, what is given beside its settings (before and after the `--`), and what the refusal says."""
GOES_ON = {"a sound one of an older version": ("sound", [], [], "stopped at iteration 4 ")}
"""The same of what is no refusal."""


def test_what_is_refused(distributed: Path) -> None:
    starts = {
        name: [*training(distributed, model, "distributed", layout), *flags]
        for name, (model, layout, flags, _) in (REFUSED | GOES_ON).items()
    }
    for name, message in run_ranks(refusals, 1, starts)[0].items():
        assert re.search((REFUSED | GOES_ON)[name][-1], message, re.DOTALL), f"{name}: {message}"


def refusals(rank: int, world_size: int, starts: dict[str, list[str]]) -> dict[str, str]:
    """What trainings are refused with."""
    found = {}
    for name, argv in starts.items():
        with pytest.raises(ErpdError) as refused:
            run_stages(rank, world_size, [("train", argv)])
        found[name] = str(refused.value)
        leave_megatron()
    return found
