"""Disks that fill up under what is done with trained policies, and under commands of several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.torch_dist.iterations import latest_iteration
from megatron_erpd.evaluation.strength import read_selection
from megatron_erpd.manifest import verify_manifest
from tests.disk import Disk
from tests.integration.disks import assert_same_files, go_through, pages, run_into_the_end, run_well, tool
from tests.integration.stages import make_round
from tests.integration.test_on_policy import write_tokenizer
from tests.integration.test_resume import assert_same
from tests.unit.report.synthetic_run import make_run

TASK = "def score(record, response):\n    return len(response) % 2\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round with a task, a teacher of two checkpoints, and their export."""
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    write_tokenizer(folder / "hf")
    write_tokenizer(folder / "base" / "hf")
    (folder / "task.py").write_text(TASK)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(8)))
    run_well(training(folder, folder / "teacher"))
    run_well(tool("export_checkpoint.py", "--checkpoint", f"teacher={folder}/teacher@all", *to(folder / "candidates")))
    return folder


def to(output: Path) -> list[object]:
    return ["--output", output]


def command(name: str, *argv: object) -> list[str]:
    """As a person types it: in as many processes as its flags ask for."""
    return [sys.executable, "-m", "megatron_erpd.commands.cli", name, *map(str, argv)]


def training(made: Path, output: Path, *flags: object) -> list[str]:
    data = ["--base", made / "base", "--rollouts", made / "rollouts.parquet", "--loss", "sft", "--epochs", "4"]
    data += ["--learning-rate", "3e-3", "--global-batch-size", "16", "--micro-batch-size", "8", "--checkpoints", "2"]
    return command("train-teacher", *data, *flags, *to(output))


def task(made: Path) -> list[object]:
    return ["--prompts", made / "prompts.jsonl", "--verifier", f"python:{made}/task.py:score"]


def figures(folder: Path) -> dict[str, Any]:
    names = [name for name in verify_manifest(folder).files if name.endswith(".json")]
    return {name: json.loads((folder / name).read_text())["metrics"] for name in names}


@pytest.mark.long
def test_an_evaluation(made: Path, disk: Disk, tmp_path: Path) -> None:
    models = ["--model", f"base={made}/hf", "--exported", made / "candidates", "--rollouts", made / "rollouts.parquet"]
    flags = [*models, *task(made), "--num-samples", "2", "--max-new-tokens", "4"]
    run_well(command("evaluate", *flags, *to(tmp_path / "whole")))
    output, needed = disk.folder / "evaluation", pages(tmp_path / "whole")
    go_through(command("evaluate", *flags, *to(output)), output, disk, [1, needed - 1])
    assert figures(output) == figures(tmp_path / "whole") and len(figures(output)) == 3


@pytest.mark.long
def test_a_selection(made: Path, disk: Disk, tmp_path: Path) -> None:
    flags = ["--model", made / "hf", "--teacher", made / "teacher", "--candidates", made / "candidates"]
    flags += [*task(made), "--num-samples", "2", "--max-new-tokens", "4"]
    run_well(command("select", *flags, *to(tmp_path / "whole")))
    output, needed = disk.folder / "selection", pages(tmp_path / "whole")
    go_through(command("select", *flags, *to(output)), output, disk, [needed // 2, needed - 2])
    assert read_selection(output) == read_selection(tmp_path / "whole")
    assert latest_iteration(output / "megatron") == read_selection(output).iteration
    assert_same_files(output, tmp_path / "whole", "metrics.jsonl")


def test_a_report(disk: Disk) -> None:
    disk.resize(10_000)
    run_well(command("report", make_run(disk.folder / "run")))
    report = disk.folder / "run" / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    assert before.keys() == {"index.html", "summary.json", "accuracy_vs_kl.png"}
    used = pages(disk.folder) + sum(path.is_dir() for path in disk.folder.rglob("*"))
    for room in (0, -(-len(before["accuracy_vs_kl.png"]) // 4096) + 1):
        disk.resize(used + room)
        run_into_the_end(command("report", disk.folder / "run"), report)
        assert {path.name: path.read_bytes() for path in report.iterdir()} == before


@pytest.mark.long
def test_a_training_on_policy(made: Path, disk: Disk, tmp_path: Path) -> None:
    flags = ["--base", made / "base", *task(made), "--updates", "4", "--prompts-per-update", "2", "--checkpoints", "2"]
    flags += ["--num-rollouts", "4", "--max-new-tokens", "4", "--micro-batch-size", "8"]
    run_well(command("train-on-policy", *flags, *to(tmp_path / "whole")))
    output, whole = disk.folder / "policy", tmp_path / "whole"
    checkpoint = pages(whole / "megatron") // 2
    go_through(command("train-on-policy", *flags, *to(output)), output, disk, [checkpoint * 3 // 2])
    assert_same(output, whole, tmp_path)


@pytest.mark.long  # of one rank: tests/integration/test_full_disk.py
@pytest.mark.parametrize(("layout", "room"), [("tensor", 1.5), ("data", 0.5)])
def test_a_training_of_two_ranks(layout: str, room: float, made: Path, disk: Disk, tmp_path: Path) -> None:
    """The disk is full at the second checkpoint, or at the first."""
    flags = [f"--{layout}-parallel", "2"]
    run_well(training(made, tmp_path / "whole", *flags))
    output, whole = disk.folder / "teacher", tmp_path / "whole"
    go_through(training(made, output, *flags), output, disk, [int(pages(whole / "megatron") / 2 * room)])
    assert_same(output, whole, tmp_path)


@pytest.mark.long
def test_an_import_of_two_processes(made: Path, disk: Disk, tmp_path: Path) -> None:
    flags = ["--hf", made / "hf", "--processes", "2"]
    run_well(command("import", *flags, *to(tmp_path / "whole")))
    output, needed = disk.folder / "base", pages(tmp_path / "whole")
    go_through(command("import", *flags, *to(output)), output, disk, [needed // 2])
    assert_same_files(output, tmp_path / "whole")


def test_an_export_of_two_processes(made: Path, disk: Disk) -> None:
    flags = ["--checkpoint", f"teacher={made}/teacher@all", "--processes", "2"]
    output, needed = disk.folder / "export", pages(made / "candidates")
    go_through(command("export", *flags, *to(output)), output, disk, [needed - 2])
    assert_same_files(output, made / "candidates")


@pytest.mark.long
def test_a_teacher_cache_of_two_ranks(made: Path, disk: Disk, tmp_path: Path) -> None:
    flags = ["--base", made / "base", "--rollouts", made / "rollouts.parquet", "--policy", f"teacher={made}/teacher"]
    flags += ["--signal", "strong", "--k", "4", "--tensor-parallel", "2"]
    run_well(command("precompute", *flags, *to(tmp_path / "whole")))
    output, needed = disk.folder / "cache", pages(tmp_path / "whole")
    go_through(command("precompute", *flags, *to(output)), output, disk, [needed // 2])
    assert_same_files(output, tmp_path / "whole", "cache.json")
