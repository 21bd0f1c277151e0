"""Do trainings end as they should? Many short ones, two at a time, and how their processes ended.

    .venv/bin/python benchmarks/exits.py --trainings 300

Each is a process of its own that runs `megatron-erpd train-teacher` on a model of two layers and leaves through the end
of the interpreter: a third after its last step, a third after an early stop, a third is interrupted by SIGTERM and
started again. While a step is made, the thread that collates batches is at work on the next. The processes are forked
from one that has imported Megatron (`tests/forked.py`), so that hundreds take minutes. Ends with exit code 1 if any
process ended with another code than its own, or left no whole artifact.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_erpd.errors import StageError  # noqa: E402
from megatron_erpd.manifest import verify_manifest  # noqa: E402
from tests import forked  # noqa: E402
from tests.integration.tiny import write_model, write_random_rollouts  # noqa: E402

_INTERRUPTED = 75
_KINDS = ("last step", "early stop", "SIGTERM", "started again")
_STEPS_BEFORE_SIGTERM = 3
_POLL_SECONDS = 0.02
_SAID_EVERY = 25

Training = Generator[forked.Popen, int, None]
"""Gives the process that it waits for, and is sent its exit code."""


def main() -> None:
    """Runs the trainings and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--at-once", type=int, default=2, help="how many side by side (default: 2)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="exits-"))
    _prepare(folder)
    started = time.monotonic()
    ended: list[tuple[str, int, bool]] = []
    _run_all([_training(folder, number, ended) for number in range(given.trainings)], given.at_once, ended)
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
    shutil.rmtree(folder)
    sys.exit(not all(_is_right(*end) for end in ended))


def _run_all(trainings: list[Training], at_once: int, ended: list[tuple[str, int, bool]]) -> None:
    waiting, running, done = trainings[::-1], dict[forked.Popen, Training](), 0
    while waiting or running:
        while waiting and len(running) < at_once:
            training = waiting.pop()
            running[next(training)] = training
        process = next((process for process in running if process.poll() is not None), None)
        if process is None:
            time.sleep(_POLL_SECONDS)
            continue
        training = running.pop(process)
        try:
            running[training.send(process.wait())] = training
        except StopIteration:
            done += 1
            if done % _SAID_EVERY == 0:
                right = sum(_is_right(*end) for end in ended)
                print(f"{done} of {len(trainings)} trainings, {right} of {len(ended)} processes right", flush=True)


def _is_right(kind: str, code: int, whole: bool) -> bool:
    return whole and code == (_INTERRUPTED if kind == "SIGTERM" else 0)


def _prepare(folder: Path) -> None:
    """The base policy, its rollouts and log-probs."""
    write_model(folder / "hf")
    write_random_rollouts(folder / "rollouts.parquet", num_prompts=32)
    data = ["--base", folder / "base", "--rollouts", folder / "rollouts.parquet"]
    for argv in (
        ["import", "--hf", folder / "hf", "--output", folder / "base"],
        ["precompute", *data, "--kind", "token", "--output", folder / "log-probs"],
    ):
        log = folder / f"{argv[0]}.log"
        if _start(log, *argv).wait() != 0:
            sys.exit(log.read_text())


def _training(folder: Path, number: int, ended: list[tuple[str, int, bool]]) -> Training:
    """A training; how it ended, its exit code, and whether its artifact is whole go to `ended`, of an interrupted one
    for both processes."""
    kind, output, log = _KINDS[number % 3], folder / f"teacher-{number}", folder / f"teacher-{number}.log"
    argv = ["train-teacher", "--base", folder / "base", "--rollouts", folder / "rollouts.parquet"]
    argv += ["--base-log-probs", folder / "log-probs", "--loss", "sapo", "--learning-rate", "1e-3"]
    argv += ["--global-batch-size", "32", "--micro-batch-size", "16", "--checkpoints", "1", "--output", output]
    argv += ["--epochs", "6" if kind == "SIGTERM" else "1"]
    argv += ["--max-kl", "1e-9"] if kind == "early stop" else []
    process = _start(log, *argv)
    if kind == "SIGTERM":
        while _steps(output) < _STEPS_BEFORE_SIGTERM and process.poll() is None:
            time.sleep(_POLL_SECONDS)
        process.send_signal(signal.SIGTERM)
        code = yield process
        if code != _INTERRUPTED:
            print(f"{output.name} ended with {code}:\n{log.read_text()[-4000:]}", flush=True)
        ended.append((kind, code, True))
        kind, process = "started again", _start(log, *argv)
    code = yield process
    ended.append((kind, code, _is_whole(output, log, code)))
    shutil.rmtree(output / "megatron", ignore_errors=True)


def _steps(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _is_whole(output: Path, log: Path, code: int) -> bool:
    try:
        verify_manifest(output)
        whole = True
    except StageError as error:
        whole = False
        print(error, flush=True)
    if code != 0 or not whole:
        print(f"{output.name} ended with {code}:\n{log.read_text()[-4000:]}", flush=True)
    return whole


def _start(log: Path, *argv: object) -> forked.Popen:
    """Starts `megatron-erpd` with these arguments."""
    command = [sys.executable, "-m", "megatron_erpd.commands.cli", *map(str, argv)]
    with log.open("ab") as file:
        return forked.Popen(command, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
