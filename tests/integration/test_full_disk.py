"""A disk that fills up: which file and what to do is said, what is saved stays, and the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_erpd.checkpoint.torch_dist.iterations import TRACKER, saved_iterations
from megatron_erpd.checkpoint.torch_dist.recovery import damage
from tests.disk import Disk
from tests.integration.disks import assert_same_files, go_through, pages, run_into_the_end, run_well, tool
from tests.integration.stages import make_round
from tests.integration.test_resume import assert_same


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    return folder


def training(made: Path, output: Path) -> list[str]:
    data = ["--base", made / "base", "--rollouts", made / "rollouts.parquet"]
    data += ["--base-log-probs", made / "base-log-probs", "--loss", "sapo", "--kl-coefficient", "0.1"]
    settings = ["--epochs", "4", "--global-batch-size", "16", "--micro-batch-size", "16", "--checkpoints", "2"]
    return tool("train_teacher.py", *data, *settings, "--output", output)


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training, with checkpoints at steps 5 and 10."""
    folder = tmp_path_factory.mktemp("whole")
    run_well(training(made, folder / "whole"))
    return folder / "whole"


def test_a_training(made: Path, trained: Path, disk: Disk, tmp_path: Path) -> None:
    output, command = disk.folder / "teacher", training(made, disk.folder / "teacher")
    checkpoint = pages(trained / "megatron" / "iter_0000005")
    disk.resize(checkpoint // 2)
    run_into_the_end(command, output)
    assert saved_iterations(output / "megatron") in ([], [5]) and not (output / "megatron" / TRACKER).exists()
    disk.resize(checkpoint * 3 // 2)
    run_into_the_end(command, output)
    assert (output / "megatron" / TRACKER).read_text() == "5"
    assert damage(output / "megatron" / "iter_0000005") is None
    disk.resize(pages(trained) - 3)  # for all but the last files: those beside the checkpoint, the manifest
    run_into_the_end(command, output)
    disk.resize(4 * checkpoint)
    run_well(command)
    assert_same(output, trained, tmp_path)


def test_a_save_beside_a_training(made: Path, trained: Path, disk: Disk, tmp_path: Path) -> None:
    output = disk.folder / "teacher"
    command = [*training(made, output), "--async-save"]
    disk.resize(pages(trained / "megatron" / "iter_0000005") // 2)
    run_into_the_end(command, output)  # its writer does, or the training with what it logs meanwhile
    disk.resize(10_000)
    run_well(command)
    assert_same(output, trained, tmp_path)


TRACKER_WITHOUT_ROOM = """
import errno, os, sys
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing
from megatron_erpd import platform

def open_or_fail(path, mode="r", *given, opened=checkpointing.maybe_msc.open, **options):
    if "latest_checkpointed" in str(path) and mode == "w" and os.path.exists(path):
        opened(path, mode).close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return opened(path, mode, *given, **options)

checkpointing.maybe_msc.open = open_or_fail
from megatron_erpd.launch.program import run_command
from megatron_erpd.commands.train import train_teacher
run_command(train_teacher)
"""


def test_the_tracker_of_a_training(made: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "teacher"
    command = training(made, output)
    run_into_the_end([command[0], "-c", TRACKER_WITHOUT_ROOM, *command[2:]], output)
    assert (output / "megatron" / TRACKER).read_text() == ""
    run_well(command)
    assert_same(output, trained, tmp_path)


def test_an_export(trained: Path, disk: Disk, tmp_path: Path) -> None:
    run_well(tool("export_checkpoint.py", "--checkpoint", f"policy={trained}", "--output", tmp_path / "whole"))
    output, needed = disk.folder / "export", pages(tmp_path / "whole")
    command = tool("export_checkpoint.py", "--checkpoint", f"policy={trained}", "--output", output)
    go_through(command, output, disk, [1, needed // 2, needed - 2])
    assert_same_files(output, tmp_path / "whole")


def test_an_import(made: Path, disk: Disk) -> None:
    output, needed = disk.folder / "base", pages(made / "base")
    command = tool("import_checkpoint.py", "--hf", made / "hf", "--output", output)
    go_through(command, output, disk, [1, needed // 2, needed - 2])
    assert_same_files(output, made / "base")


def test_a_teacher_cache(made: Path, disk: Disk) -> None:
    data = ["--base", made / "base", "--rollouts", made / "rollouts.parquet", "--kind", "token"]
    output, needed = disk.folder / "cache", pages(made / "base-log-probs")
    command = tool("precompute.py", *data, "--output", output)
    go_through(command, output, disk, [1, needed - 1])
    assert_same_files(output, made / "base-log-probs", "cache.json")


def test_sampling(made: Path, disk: Disk, tmp_path: Path) -> None:
    """Parts that were written stay: three of them, of 128 prompts each."""
    from tests.unit.sampling.tiny_model import write_model

    model = write_model(tmp_path / "model", seed=0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": f"{i + 1}"}) + "\n" for i in range(300)))
    settings = ["--model", model, "--prompts", prompts, "--num-rollouts", "2", "--max-new-tokens", "8"]
    run_well(tool("sample.py", *settings, "--output", tmp_path / "whole"))
    output, needed = disk.folder / "rollouts", pages(tmp_path / "whole")
    command = tool("sample.py", *settings, "--output", output)
    part = pages(tmp_path / "whole") // 3
    go_through(command, output, disk, [part * 3 // 2, needed - 1])
    assert_same_files(output, tmp_path / "whole")
