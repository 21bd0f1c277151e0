"""Stages run in ranks of a test, and the artifacts of a tiny round."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.harness import run_ranks
from tests.integration.tiny import write_model, write_random_rollouts

Stages = list[tuple[str, list[str]]]
"""Commands and their arguments, in order."""


def run_stages(rank: int, world_size: int, stages: Stages) -> None:
    """Runs stages one after another in this rank; for `run_ranks`."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron_erpd.commands.export_checkpoint import export_checkpoints
    from megatron_erpd.commands.held_out import select
    from megatron_erpd.commands.import_checkpoint import import_checkpoint
    from megatron_erpd.commands.on_policy import train_on_policy
    from megatron_erpd.commands.precompute import precompute
    from megatron_erpd.commands.train import distill, train_teacher

    commands = {
        "import": import_checkpoint,
        "export": export_checkpoints,
        "precompute": precompute,
        "train": train_teacher,
        "on-policy": train_on_policy,
        "distill": distill,
        "select": select,
    }
    for name, argv in stages:
        commands[name](argv)


def make_round(folder: Path, num_prompts: int = 10) -> None:
    """A model, rollouts, the base policy's checkpoint and its log-probs: `hf`, `rollouts.parquet`, `base`,
    `base-log-probs`."""
    write_model(folder / "hf")
    write_random_rollouts(folder / "rollouts.parquet", num_prompts)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    stages = [
        ("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"]),
        ("precompute", [*data, "--kind", "token", "--output", f"{folder}/base-log-probs"]),
    ]
    run_ranks(run_stages, 1, stages)
