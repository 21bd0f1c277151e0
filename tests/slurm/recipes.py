"""Recipes on real models, submitted and run by the commands that a person would type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_erpd.manifest import METRICS, read_manifest
from tests.distributed.harness import REPOSITORY
from tests.integration.tiny import VOCAB_SIZE, write_model, write_random_rollouts


def write_recipe(folder: Path, steps: int = 1, **slurm: Any) -> Path:
    """Import, log-probs in two slices, a teacher in a process on each of two nodes, export.

    Log-probs depend in their last bits on what else is in a batch, which is not the same in a slice. Here every rollout
    is a batch of its own: none is half as long as the longest.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = write_model(folder / "hf")
    words = WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(model)
    rollouts = write_random_rollouts(folder / "rollouts.parquet", shortest=12)
    recipe = {
        "name": "tiny",
        "model": str(model),
        "rollouts": {"file": str(rollouts), "format": "plain"},
        "teacher": {"loss": "mse", "epochs": steps * 8 / 40, "global_batch_size": 8, "learning_rate": 1e-3},
        "layout": {"micro_batch_size": 4},
        "slurm": {"signal_seconds": 60, **slurm},
        "stages": {
            "teacher": {"layout": {"data_parallel": 2}, "slurm": {"nodes": 2}},
            "base_log_probs": {"layout": {"micro_batch_size": 1}, "slurm": {"slices": 2}},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def start(*words: object) -> subprocess.Popen[str]:
    """Starts `megatron-erpd` with these arguments. A thread for each process, as jobs without `cpus_per_task` have."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "megatron_erpd.commands.cli", *map(str, words))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, cwd=REPOSITORY, env=environment)


def end(process: subprocess.Popen[str], seconds: float = 400) -> str:
    """Waits for a command that must succeed; returns what it said."""
    said = process.communicate(timeout=seconds)[0]
    assert process.returncode == 0, said[-5000:]
    return said


def assert_same_results(ours: Path, theirs: Path) -> None:
    """Two runs' folders: every exported file, and every step of every training, none missing and none twice."""
    exported = [digests(root) for root in (ours, theirs)]
    assert exported[0] == exported[1]
    assert any(name.endswith(".safetensors") for name in exported[0])
    trained = [trainings(root) for root in (ours, theirs)]
    assert trained[0] == trained[1] and trained[0]


def digests(root: Path) -> dict[str, str]:
    return {
        f"{folder.parent.name}/{name}": file["sha256"]
        for folder in sorted(root.glob("round-*/export"))
        for name, file in read_manifest(folder).files.items()
    }


def trainings(root: Path) -> dict[str, list[tuple[float, float]]]:
    """Loss and norm of the gradient at every step, by the training's folder."""
    found = {}
    for path in sorted(root.glob(f"round-*/**/{METRICS}")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1)), path
        for loss in {"stage1/loss", "stage2/loss"} & rows[0].keys():
            found[str(path.parent.relative_to(root))] = [(row[loss], row["grad-norm"]) for row in rows]
    return found
