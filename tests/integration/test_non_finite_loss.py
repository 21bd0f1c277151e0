"""A training whose loss or gradient is no number stops before the bad step, and keeps what it had saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint.torch_dist.iterations import latest_iteration, saved_iterations
from megatron_erpd.data.rollouts import read_rollouts
from tests.distributed.harness import RankError, run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.tiny import write_model, write_random_rollouts

SIZES = ["--global-batch-size", "8", "--micro-batch-size", "4", "--epochs", "2", "--save-interval", "1"]
TOKEN = 5


def failing(folder: Path, ranks: int, *flags: str, run: Callable[..., None] = run_stages) -> str:
    """Trains on random rollouts from `folder/hf`, `run` in each rank; the message that it ends with."""
    write_random_rollouts(folder / "rollouts.parquet")
    run_ranks(run_stages, 1, [("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"])])
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet", "--output", f"{folder}/teacher"]
    with pytest.raises(RankError, match=r"StageError: .*at step \d+ the ") as caught:
        run_ranks(run, ranks, [("train", [*data, "--loss", "sft", *SIZES, *flags])])
    assert not (folder / "teacher" / "manifest.json").exists()
    message = str(caught.value)
    return message[message.rindex("at step ") :]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rollouts_of_a_bad_loss_are_named(tmp_path: Path, ranks: int) -> None:
    """One token's embedding is NaN: what follows it in a rollout has no log-prob."""
    write_model(tmp_path / "hf", tied=False)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKEN] = torch.nan
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    message = failing(tmp_path, ranks, "--tensor-parallel", str(ranks))
    assert message.startswith("at step 1 the policy's logits of token ") and "from rollout " in message
    assert "no checkpoint was saved yet" in message
    rollouts = read_rollouts(tmp_path / "rollouts.parquet")
    holds = {
        sample_id: TOKEN in [*rollouts.prompt_tokens(i), *rollouts.response_tokens(i)]
        for i, sample_id in enumerate(rollouts.sample_ids)
    }
    named = [sample_id for sample_id in holds if sample_id in message]
    assert named and all(holds[sample_id] for sample_id in named) and not all(holds.values())


def test_a_bad_gradient_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    message = failing(tmp_path, 1, "--learning-rate", "1e25", "--clip-gradient", "0")
    assert (
        message.startswith("at step 2 the gradient is NaN or infinite")
        and "the checkpoint of step 1 is kept" in message
    )
    assert latest_iteration(tmp_path / "teacher" / "megatron") == 1


def test_a_checkpoint_that_is_not_whole_is_not_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    flags = ["--learning-rate", "1e25", "--clip-gradient", "0", "--async-save"]
    message = failing(tmp_path, 1, *flags, run=with_saves_under_way)
    assert message.startswith("at step 2 the gradient is NaN or infinite")
    assert "no checkpoint was saved yet" in message and saved_iterations(tmp_path / "teacher" / "megatron") == [1]


def with_saves_under_way(rank: int, world_size: int, stages: Stages) -> None:
    """Runs stages, whose saves beside a training are never whole."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._write_item = lambda *args, **kwargs: time.sleep(600)
    run_stages(rank, world_size, stages)
