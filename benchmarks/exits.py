"""Do trainings end as they should? Many short ones, two at a time, and how their processes ended.

    .venv/bin/python benchmarks/exits.py --trainings 300

Each is a process of its own, `megatron-erpd train-teacher` on a model of two layers: a third to its last step, a third
to an early stop, a third is interrupted by SIGTERM and started again. While a step is made, the thread that collates
batches is at work on the next. Ends with exit code 1 if any process ended with another code than its own, or left no
whole artifact.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_erpd.errors import StageError  # noqa: E402
from megatron_erpd.manifest import verify_manifest  # noqa: E402
from tests.integration.tiny import write_model, write_random_rollouts  # noqa: E402

_INTERRUPTED = 75
_KINDS = ("last step", "early stop", "SIGTERM", "started again")
_STEPS_BEFORE_SIGTERM = 3
_SAID_EVERY = 25


def main() -> None:
    """Runs the trainings and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--at-once", type=int, default=2, help="how many side by side (default: 2)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="exits-") as name:
        folder = Path(name)
        _prepare(folder)
        started = time.monotonic()
        with ThreadPoolExecutor(given.at_once) as threads:
            ended: list[tuple[str, int, bool]] = []
            for number, ends in enumerate(threads.map(lambda i: _training(folder, i), range(given.trainings)), start=1):
                ended += ends
                if number % _SAID_EVERY == 0:
                    right = sum(whole and code in (0, _INTERRUPTED) for _, code, whole in ended)
                    print(
                        f"{number} of {given.trainings} trainings, {right} of {len(ended)} processes right", flush=True
                    )
        minutes = (time.monotonic() - started) / 60
    print(f"{given.trainings} trainings in {len(ended)} processes, {given.at_once} at a time, {minutes:.1f} minutes\n")
    print("| ended by | processes | exit code | with another | artifact whole |")
    print("|---|---|---|---|---|")
    for kind in _KINDS:
        of_kind = [end for end in ended if end[0] == kind]
        expected = _INTERRUPTED if kind == "SIGTERM" else 0
        others = Counter(code for _, code, _ in of_kind if code != expected)
        whole = "" if kind == "SIGTERM" else f"{sum(whole for *_, whole in of_kind)}"
        listed = ", ".join(f"{count} x {code}" for code, count in sorted(others.items())) or "0"
        print(f"| {kind} | {len(of_kind)} | {expected} | {listed} | {whole} |")
    sys.exit(any(not whole or code not in (0, _INTERRUPTED) for _, code, whole in ended))


def _prepare(folder: Path) -> None:
    """The base policy, its rollouts and log-probs."""
    write_model(folder / "hf")
    write_random_rollouts(folder / "rollouts.parquet", num_prompts=32)
    _run(folder / "import.log", "import", "--hf", folder / "hf", "--output", folder / "base").wait()
    data = ["--base", folder / "base", "--rollouts", folder / "rollouts.parquet"]
    output = folder / "log-probs"
    code = _run(folder / "precompute.log", "precompute", *data, "--kind", "token", "--output", output).wait()
    if code != 0:
        sys.exit((folder / "precompute.log").read_text())


def _training(folder: Path, number: int) -> list[tuple[str, int, bool]]:
    """How a training ended, its exit code, and whether its artifact is whole; of an interrupted one, both times."""
    kind, output, log = _KINDS[number % 3], folder / f"teacher-{number}", folder / f"teacher-{number}.log"
    argv = ["train-teacher", "--base", folder / "base", "--rollouts", folder / "rollouts.parquet"]
    argv += ["--base-log-probs", folder / "log-probs", "--loss", "sapo", "--learning-rate", "1e-3"]
    argv += ["--global-batch-size", "32", "--micro-batch-size", "16", "--checkpoints", "1", "--output", output]
    argv += ["--epochs", "6" if kind == "SIGTERM" else "1"]
    argv += ["--max-kl", "1e-9"] if kind == "early stop" else []
    process = _run(log, *argv)
    if kind != "SIGTERM":
        code = process.wait()
        return [(kind, code, _is_whole(output, log, code, 0))]
    while process.poll() is None and _steps(output) < _STEPS_BEFORE_SIGTERM:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != _INTERRUPTED:
        print(f"{output.name} ended with {code}:\n{log.read_text()[-4000:]}", flush=True)
    again = _run(log, *argv).wait()
    return [(kind, code, True), ("started again", again, _is_whole(output, log, again, 0))]


def _steps(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _is_whole(output: Path, log: Path, code: int, expected: int) -> bool:
    try:
        verify_manifest(output)
        whole = True
    except StageError as error:
        whole = False
        print(error, flush=True)
    if code != expected or not whole:
        print(f"{output.name} ended with {code}:\n{log.read_text()[-4000:]}", flush=True)
    return whole


def _run(log: Path, *argv: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as file:
        command = [sys.executable, "-m", "megatron_erpd.cli", *map(str, argv)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)


if __name__ == "__main__":
    main()
