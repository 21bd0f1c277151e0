"""A stage that was stopped goes on to the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_erpd.checkpoint.iterations import saved_iterations
from megatron_erpd.manifest import verify_manifest
from tests.distributed.harness import REPOSITORY, run_ranks
from tests.integration.stages import make_round, run_stages

FORMS = {
    "replay": ("train_teacher.py", ["--loss", "sapo", "--kl-coefficient", "0.1"]),
    "budget": (
        "distill.py",
        ["--form", "policy_gradient", "--signal-weight", "0", "--advantage-weight", "1", "--kl-budget", "0.001"],
    ),
}
# About 50 steps of some 20 ms: long enough to be caught in the middle.
STEPS = ["--epochs", "40", "--global-batch-size", "32", "--micro-batch-size", "16", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    return folder


@pytest.mark.parametrize(("form", "stop"), [("replay", signal.SIGTERM), ("budget", signal.SIGKILL)])
def test_stopped_run_ends_with_the_same_weights(form: str, stop: signal.Signals, made: Path, tmp_path: Path) -> None:
    script, flags = FORMS[form]
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    command = [sys.executable, str(REPOSITORY / "tools" / script), *data]
    command += ["--base-log-probs", f"{made}/base-log-probs", *flags, *STEPS, "--checkpoints", "5"]

    whole = run_to_the_end([*command, "--output", f"{tmp_path}/whole"])
    assert whole.returncode == 0, whole.stderr[-2000:]
    interrupted = run_until_step(12, [*command, "--output", f"{tmp_path}/stopped"], tmp_path / "stopped", stop)
    assert interrupted.returncode != 0
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    if stop == signal.SIGTERM:
        assert "run the same command again to continue" in interrupted.stderr
    resumed = run_to_the_end([*command, "--output", f"{tmp_path}/stopped"])
    assert resumed.returncode == 0, resumed.stderr[-2000:]

    verify_manifest(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert weights(tmp_path / "stopped", tmp_path) == weights(tmp_path / "whole", tmp_path)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(made: Path, tmp_path: Path) -> None:
    script, flags = FORMS["replay"]
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    command = [sys.executable, str(REPOSITORY / "tools" / script), *data]
    command += ["--base-log-probs", f"{made}/base-log-probs", *flags, *STEPS, "--checkpoints", "5"]
    assert run_to_the_end([*command, "--output", f"{tmp_path}/whole"]).returncode == 0
    output = tmp_path / "damaged"
    run_until_step(27, [*command, "--output", str(output)], output, signal.SIGKILL)
    last = saved_iterations(output / "megatron")[-1]
    shard = next((output / "megatron" / f"iter_{last:07d}").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 1)
    (output / "megatron" / "latest_checkpointed_iteration.txt").write_text("")
    resumed = run_to_the_end([*command, "--output", str(output)])
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f"the checkpoint of step {last} is damaged" in resumed.stdout and "going on from step" in resumed.stdout
    verify_manifest(output)
    assert losses(output) == losses(tmp_path / "whole")
    assert weights(output, tmp_path) == weights(tmp_path / "whole", tmp_path)


def run_to_the_end(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment())


def run_until_step(
    step: int, command: list[str], output: Path, stop: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Starts a stage and sends it a signal when its metrics reach a step."""
    # Into files: a stage that nobody reads would stop where a pipe is full.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(command, stdout=out, stderr=error, env=environment(), start_new_session=True)
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
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def losses(artifact: Path) -> list[float]:
    """The loss of every step, each step once."""
    rows = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    return [row.get("stage1/loss", row.get("stage2/loss")) for row in rows]


def weights(artifact: Path, folder: Path) -> bytes:
    output = folder / f"export-{artifact.name}"
    stages = [("export", ["--checkpoint", f"policy={artifact}", "--output", str(output)])]
    run_ranks(run_stages, 1, stages)
    return (output / "policy" / "model.safetensors").read_bytes()
