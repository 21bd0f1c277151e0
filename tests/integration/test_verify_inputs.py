"""Processes that torchrun starts check what they read, share the hashing, and meet by its store."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_erpd.manifest import MANIFEST, input_digest, verify_manifest
from tests import forked
from tests.forked import REPOSITORY
from tests.integration.stages import make_round

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def erpd(*argv: object) -> list[str]:
    return [sys.executable, "-m", "megatron_erpd.commands.cli", *map(str, argv)]


@pytest.mark.slow
def test_two_processes_verify_and_hash_together(tmp_path: Path) -> None:
    make_round(tmp_path)
    data = ["--base", tmp_path / "base", "--rollouts", tmp_path / "rollouts.parquet"]
    data += [
        "--base-log-probs",
        tmp_path / "base-log-probs",
        "--loss",
        "sapo",
        "--learning-rate",
        "1e-3",
        "--epochs",
        "0.4",
    ]
    train = ["train-teacher", *data, "--global-batch-size", "8", "--micro-batch-size", "2", "--data-parallel", "2"]
    command = erpd(*train, "--output", tmp_path / "teacher", "--verify-inputs")
    done = forked.run(command, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = verify_manifest(tmp_path / "teacher")
    assert "verify" not in str(manifest.settings) and manifest.inputs["base"] == input_digest(tmp_path / "base")
    export = ["export", "--checkpoint", f"teacher={tmp_path / 'teacher'}", "--processes", "2", "--verify-inputs"]
    done = forked.run(erpd(*export, "--output", tmp_path / "export"), env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    verify_manifest(tmp_path / "export")

    damaged = min((tmp_path / "base" / "megatron" / "iter_0000000").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    command = erpd(*train, "--output", tmp_path / "again", "--verify-inputs")
    done = forked.run(command, env=ENVIRONMENT, timeout=600)
    assert done.returncode != 0
    assert f"error: {damaged}: differs from what {MANIFEST} recorded; run the stage again" in done.stderr
    assert not (tmp_path / "again" / "metrics.jsonl").exists()
