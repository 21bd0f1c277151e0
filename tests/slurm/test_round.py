"""A round on a real model through the queue, every stage interrupted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_erpd.manifest import read_manifest
from tests.distributed.harness import REPOSITORY
from tests.integration.tiny import VOCAB_SIZE, write_model, write_random_rollouts
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run

STAGES = ("base", "rollouts", "base-log-probs-slices", "base-log-probs", "teacher", "export", "report")
STEPS = 30


def write_recipe(folder: Path) -> Path:
    """Import, log-probs in two slices, a teacher in a process on each of two nodes, export."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = write_model(folder / "hf")
    words = WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(model)
    recipe = {
        "name": "tiny",
        "model": str(model),
        "rollouts": {"file": str(write_random_rollouts(folder / "rollouts.parquet")), "format": "plain"},
        "teacher": {"loss": "mse", "epochs": STEPS * 8 / 40, "global_batch_size": 8, "learning_rate": 1e-3},
        "layout": {"micro_batch_size": 4},
        "slurm": {"signal_seconds": 60, "requeues": 2},
        "stages": {
            "teacher": {"layout": {"data_parallel": 2}, "slurm": {"nodes": 2}},
            "base_log_probs": {"slurm": {"slices": 2}},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def start(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = (sys.executable, "-m", "megatron_erpd.cli", *map(str, words))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, cwd=REPOSITORY, env=environment)


def end(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-5000:]
    return said


def at_work(run: Run, stage: str) -> bool:
    """Whether a stage is in its first start; the teacher, in the middle of its training."""
    folder, number = run.root / "logs" / "slurm", run.number(stage)
    logs = [*folder.glob(f"{stage}-{number}-0.log"), *folder.glob(f"{stage}-{number}_*-0.log")]
    metrics = run.root / "round-01/teacher/metrics.jsonl"
    trains = stage != "teacher" or (metrics.is_file() and metrics.stat().st_size > 1000)
    return trains and bool(logs) and all("start 0 of" in log.read_text() for log in logs)


def interrupt_each(run: Run) -> None:
    """Sends the signal to every job once, when its stage is at work."""
    left = set(STAGES)

    def none_left() -> bool:
        for stage in [stage for stage in left if at_work(run, stage)]:
            run.signal(stage)
            left.remove(stage)
        return not left

    run.until(none_left, 400, "all stages are interrupted")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_round_of_interrupted_jobs_ends_with_the_weights_of_an_undisturbed_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path), Run(tmp_path / "queue")
    said = end(start("submit", recipe, "--output", run.root))
    assert "teacher: job " in said and "base-log-probs-slices: job " in said
    undisturbed = start("run", recipe, "--output", tmp_path / "run")  # while the jobs wait
    try:
        interrupt_each(run)
        assert run.ends("report", 200) == "COMPLETED"
        logs = {log.name: log.read_text() for log in (run.root / "logs/slurm").glob("*-[012].log")}
        firsts = [text for name, text in logs.items() if name.endswith("-0.log")]
        assert len(firsts) == len(STAGES) + 1 and all("signal SIGUSR1: telling" in text for text in firsts)
        # A stage that was ready when the signal came is not queued again; no slice disturbs the other.
        assert all("queued again (1 of 2)" in text or "is complete" in text for text in firsts)
        assert not [name for name, text in logs.items() if " failed" in text or "(2 of 2)" in text]
    finally:
        run.cancel()
    end(undisturbed)

    assert end(start("submit", recipe, "--output", run.root)).count(": done\n") == len(STAGES) - 1
    exported = [tmp_path / where / "round-01" / "export" for where in ("queue", "run")]
    digests = [{name: f["sha256"] for name, f in read_manifest(folder).files.items()} for folder in exported]
    assert digests[0] == digests[1]
    assert any(name.endswith(".safetensors") for name in digests[0])
    losses = [
        {step["iteration"]: step["stage1/loss"] for step in map(json.loads, metrics.read_text().splitlines())}
        for metrics in (folder.parent / "teacher" / "metrics.jsonl" for folder in exported)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
