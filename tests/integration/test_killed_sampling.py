"""`sample` and `evaluate` ended in their midst and started again: what was there is kept, and the result is that of an
undisturbed run."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.commands import held_out, rollouts
from megatron_erpd.manifest import MANIFEST, METRICS, read_manifest, verify_manifest
from tests import forked
from tests.forked import REPOSITORY
from tests.unit.sampling.tiny_model import write_model

# Waits where a test wants the command to be ended: before the verdict on a prompt of the second part file, or on the
# second policy.
VERIFIER = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def score(record, response):
    second = record["answer"] == "150" or (HERE / "ended/base.json").exists()
    while second and not (HERE / "go").exists():
        time.sleep(0.05)
    return len(response) % 2
"""


@pytest.fixture
def task(tmp_path: Path) -> list[str]:
    """300 prompts, which make three part files, and a verifier that waits for `go`."""
    records = [{"prompt": f"{n % 9}+1=", "answer": str(n)} for n in range(300)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "verifier.py").write_text(VERIFIER)
    write_model(tmp_path / "hf", seed=3)
    return ["--prompts", f"{tmp_path}/prompts.jsonl", "--verifier", f"python:{tmp_path}/verifier.py:score"]


def end_in_its_midst(number: signal.Signals, when: Callable[[], bool], *argv: str) -> None:
    command = [sys.executable, "-m", "megatron_erpd.commands.cli", *argv]
    with tempfile.TemporaryFile("w+") as log:
        process = forked.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
        deadline = time.monotonic() + 120
        while not when():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                log.seek(0)
                raise AssertionError(log.read())
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=30) != 0


def written(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def test_sampling_goes_on_with_the_parts_that_it_has(tmp_path: Path, task: list[str]) -> None:
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    argv = ["--model", f"{tmp_path}/hf", *task, "--num-rollouts", "2", "--max-new-tokens", "4", "--output"]
    first = ended / "rollouts-00000-of-00003.parquet"
    end_in_its_midst(signal.SIGKILL, first.is_file, "sample", *argv, str(ended))
    before = written(first)
    metrics = (ended / METRICS).read_text()
    # The second start tells of the second part before it waits.
    end_in_its_midst(signal.SIGTERM, lambda: (ended / METRICS).read_text() != metrics, "sample", *argv, str(ended))
    assert not (ended / MANIFEST).exists() and written(first) == before
    assert [path.name for path in ended.glob("*.parquet")] == [first.name]

    (tmp_path / "go").touch()
    rollouts.sample([*argv, str(ended)])
    assert written(first) == before
    assert read_manifest(ended).summary["parts_resumed"] == 1
    rollouts.sample([*argv, str(whole)])
    assert verify_manifest(ended).digest == verify_manifest(whole).digest
    assert len(read_manifest(whole).files) == 4
    for name in read_manifest(whole).files:
        assert (ended / name).read_bytes() == (whole / name).read_bytes()


def test_evaluation_goes_on_after_the_policies_that_it_has_measured(
    tmp_path: Path, task: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "other", seed=4)
    (tmp_path / "go").touch()
    sizes = ["--num-prompts", "8", "--num-rollouts", "1", "--max-new-tokens", "4"]
    rollouts.sample(["--model", f"{tmp_path}/hf", *task, *sizes, "--output", f"{tmp_path}/rollouts"])
    (tmp_path / "go").unlink()
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    models = ["--model", f"base={tmp_path}/hf", "--model", f"other={tmp_path}/other"]
    sizes = ["--num-prompts", "8", "--num-samples", "2", "--max-new-tokens", "4"]
    argv = [*models, *task, *sizes, "--rollouts", f"{tmp_path}/rollouts", "--output"]
    end_in_its_midst(signal.SIGKILL, (ended / "base.json").is_file, "evaluate", *argv, str(ended))
    before = written(ended / "base.json")
    assert not (ended / "other.json").exists() and not (ended / MANIFEST).exists()

    (tmp_path / "go").touch()
    capsys.readouterr()
    held_out.evaluate([*argv, str(ended)])
    said = capsys.readouterr().out
    assert written(ended / "base.json") == before and "base sampling" not in said and "other sampling" in said
    held_out.evaluate([*argv, str(whole)])
    assert "base sampling" in capsys.readouterr().out
    for name in ("base.json", "other.json"):
        results: list[dict[str, Any]] = [json.loads((folder / name).read_text()) for folder in (ended, whole)]
        assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
    assert set(read_manifest(ended).files) == {"base.json", "other.json"}
