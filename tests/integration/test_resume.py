"""A stage that was stopped goes on to the same weights, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_erpd import platform
from megatron_erpd.checkpoint.torch_dist.iterations import saved_iterations
from megatron_erpd.checkpoint.torch_dist.recovery import damage
from megatron_erpd.launcher import without_launcher
from megatron_erpd.manifest import verify_manifest
from tests import forked
from tests.distributed.harness import run_ranks
from tests.forked import REPOSITORY
from tests.integration.stages import Stages, make_round, run_stages

FORMS = {
    "replay": ("train_teacher.py", ["--loss", "sapo", "--kl-coefficient", "0.1", "--micro-batch-size", "16"]),
    "budget": (
        "distill.py",
        [
            *["--form", "policy_gradient", "--signal-weight", "0", "--advantage-weight", "1", "--kl-budget", "0.001"],
            *["--micro-batch-tokens", "300"],
        ],
    ),
}
# About 50 steps of some 20 ms: long enough to be caught in the middle.
STEPS = ["--epochs", "40", "--global-batch-size", "32", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    return folder


def whole(form: str, made: Path, output: Path) -> Path:
    """An undisturbed training."""
    done = run_to_the_end(command(form, made, output))
    assert done.returncode == 0, done.stderr[-2000:]
    return output


@pytest.fixture(scope="module")
def replay(made: Path) -> Path:
    return whole("replay", made, made / "replay")


@pytest.mark.parametrize(("form", "stop"), [("replay", signal.SIGTERM), ("budget", signal.SIGKILL)])
def test_stopped_run_ends_with_the_same_weights(
    form: str, stop: signal.Signals, made: Path, replay: Path, tmp_path: Path
) -> None:
    reference = replay if form == "replay" else whole(form, made, tmp_path / "whole")
    output = tmp_path / "stopped"
    interrupted = run_until_step(12, command(form, made, output), output, stop)
    assert interrupted.returncode != 0
    assert not (output / "manifest.json").exists()
    if stop == signal.SIGTERM:
        assert "run the same command again to continue" in interrupted.stderr
    resumed = run_to_the_end(command(form, made, output))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same(output, reference, tmp_path)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(made: Path, replay: Path, tmp_path: Path) -> None:
    output = tmp_path / "damaged"
    run_until_step(27, command("replay", made, output), output, signal.SIGKILL)
    last = saved_iterations(output / "megatron")[-1]
    shard = next((output / "megatron" / f"iter_{last:07d}").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 1)
    (output / "megatron" / "latest_checkpointed_iteration.txt").write_text("")
    resumed = run_to_the_end(command("replay", made, output))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f"the checkpoint of step {last} is damaged" in resumed.stdout and "resuming from step" in resumed.stdout
    assert_same(output, replay, tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing
from megatron_erpd import platform
from megatron_erpd.launch.program import run_command
from megatron_erpd.commands.train import train_teacher

where, saves = sys.argv.pop(1), []

def end():
    os.killpg(0, signal.SIGKILL)  # the helper processes of the checkpoint writer too

def finish(self, metadata, results, finish=filesystem_async.FileSystemWriterAsync.finish):
    saves.append(self)
    if where == "model" and len(saves) == 2:  # its values are written, cut off here; what tells where they are is not
        (file,) = Path(self.path).glob("*.distcp")
        os.truncate(file, file.stat().st_size // 2)
        end()
    finish(self, metadata, results)

def open_tracker(path, mode="r", *given, opened=checkpointing.maybe_msc.open, **options):
    file = opened(path, mode, *given, **options)
    if where == "tracker" and "latest_checkpointed" in str(path) and mode == "w" and len(saves) == 2:
        end()  # opened for writing, and so empty
    return file

filesystem_async.FileSystemWriterAsync.finish = finish
checkpointing.maybe_msc.open = open_tracker
run_command(train_teacher)
"""


@pytest.mark.parametrize("where", ["model", "tracker"])
def test_a_training_killed_while_it_saves_goes_on(where: str, made: Path, replay: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    python, _, *flags = command("replay", made, output)
    killed = forked.run([python, "-c", KILLED, where, *flags], timeout=180, env=environment(), start_new_session=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    tracker = (output / "megatron" / "latest_checkpointed_iteration.txt").read_text()
    assert tracker == {"model": "10", "tracker": ""}[where]
    assert (output / "megatron" / "iter_0000020" / ".metadata").is_file() == (where == "tracker")
    resumed = run_to_the_end(command("replay", made, output))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same(output, replay, tmp_path)


BESIDE = """
import functools, os, signal, sys, time
from pathlib import Path
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron_erpd import platform
from megatron_erpd.launch.program import run_command
from megatron_erpd.commands.train import train_teacher

end, training, written = sys.argv.pop(1), os.getpid(), []

@functools.wraps(filesystem_async._write_item)
def write(transform, stream, *given, write_item=filesystem_async._write_item, **options):
    assert os.getpid() != training  # which goes on meanwhile
    written.append(stream.name)
    if "iter_0000020" in stream.name and written.count(stream.name) == 20:
        Path(sys.argv[-1] + "-writer").write_text(str(os.getpid()))
        if end == "training":
            os.kill(training, signal.SIGKILL)
        elif end == "writer":
            os.kill(os.getpid(), signal.SIGKILL)
        elif end == "stage":  # as SLURM signals a step
            os.killpg(0, signal.SIGTERM)
        time.sleep(1)
    return write_item(transform, stream, *given, **options)

filesystem_async._write_item = write
run_command(train_teacher)
"""
"""A training whose writer is stopped in the midst of the save of step 20, which the training has left behind."""

ENDS = {
    "nothing": (0, ""),
    "training": (-signal.SIGKILL, ""),
    "stage": (75, "run the same command again to continue"),
    "writer": (1, "the process that writes checkpoints ended with exit code -9"),
}
"""What is ended in the midst of a save: the training's exit code, and what it says."""


@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=pytest.mark.long) if end in ("nothing", "stage") else end for end in ENDS]
)
def test_saves_beside_the_training(end: str, made: Path, replay: Path, tmp_path: Path) -> None:
    output = tmp_path / "beside"
    python, _, *flags = [*command("replay", made, output)[:-2], "--async-save", "--output", str(output)]
    stopped = forked.run([python, "-c", BESIDE, end, *flags], timeout=180, env=environment(), start_new_session=True)
    code, says = ENDS[end]
    assert stopped.returncode == code and says in stopped.stderr, stopped.stderr[-3000:]
    writer = int((tmp_path / "beside-writer").read_text())
    deadline = time.monotonic() + 10
    while runs(writer) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(writer)
    if end != "nothing":
        whole = damage(output / "megatron" / "iter_0000020") is None
        assert whole == (end == "stage")
        resumed = run_to_the_end([*command("replay", made, output)[:-2], "--async-save", "--output", str(output)])
        assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same(output, replay, tmp_path)
    for iteration in saved_iterations(replay / "megatron"):
        ours, theirs = (tensors_of(run / "megatron" / f"iter_{iteration:07d}") for run in (output, replay))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def runs(process: int) -> bool:
    """Whether there is such a process; one that ended, and that nobody has asked how, is none."""
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an iteration, the optimizer's among them."""
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.skipif(not platform.is_cpu(), reason="Megatron is not changed on a GPU")
def test_a_save_starts_no_process(made: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--global-batch-size", "16", "--micro-batch-size", "16", "--output", f"{tmp_path}/short"]
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--loss", "sft"]
    assert run_ranks(_children_after, 1, [("train", [*data, *flags])]) == [[]]
    assert saved_iterations(tmp_path / "short" / "megatron")


def _children_after(rank: int, world_size: int, stages: Stages) -> list[str]:
    run_stages(rank, world_size, stages)
    return [child.name for child in multiprocessing.active_children()]


def command(form: str, made: Path, output: Path) -> list[str]:
    script, flags = FORMS[form]
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    data += ["--base-log-probs", f"{made}/base-log-probs", *flags, *STEPS, "--checkpoints", "5"]
    return [sys.executable, str(REPOSITORY / "tools" / script), *data, "--output", str(output)]


def assert_same(ours: Path, theirs: Path, folder: Path) -> None:
    verify_manifest(ours)
    assert losses(ours) == losses(theirs)
    assert weights(ours, folder) == weights(theirs, folder)


def run_to_the_end(command: list[str]) -> subprocess.CompletedProcess[str]:
    return forked.run(command, timeout=180, env=environment())


def run_until_step(
    step: int, command: list[str], output: Path, stop: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Starts a stage and sends it a signal when its metrics reach a step."""
    # Into files: a stage that nobody reads would stop where a pipe is full.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = forked.Popen(command, stdout=out, stderr=error, env=environment(), start_new_session=True)
        deadline = time.monotonic() + 120
        metrics = output / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_text().count("\n") >= step:
                break
            time.sleep(0.005)
        assert process.poll() is None, "ended before it could be stopped"
        if stop == signal.SIGKILL:  # as a node that goes down: the helper processes of the checkpoint writer too
            os.killpg(process.pid, stop)
        else:
            process.send_signal(stop)
        process.wait(timeout=120)
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), error.read())


def environment() -> dict[str, str]:
    # A training in the tests' own process leaves its rank there.
    return {**without_launcher(os.environ), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def losses(artifact: Path) -> list[float]:
    """The loss of every step, each step once."""
    rows = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    (loss,) = (name for name in ("stage1/loss", "stage2/loss") if name in rows[0])
    return [row[loss] for row in rows]


def weights(artifact: Path, folder: Path) -> bytes:
    output = folder / f"export-{artifact.name}"
    stages = [("export", ["--checkpoint", f"policy={artifact}", "--output", str(output)])]
    run_ranks(run_stages, 1, stages)
    return (output / "policy" / "model.safetensors").read_bytes()
