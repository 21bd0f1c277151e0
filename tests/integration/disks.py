"""Commands that meet the end of a disk (`tests.disk`), and go on when there is room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_erpd.manifest import MANIFEST, verify_manifest
from tests import forked
from tests.disk import PAGE, Disk
from tests.forked import REPOSITORY
from tests.integration.test_resume import environment


def pages(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def tool(script: str, *argv: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "tools" / script), *map(str, argv)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return forked.run(command, timeout=120, env=environment())


def run_well(command: list[str]) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr[-2000:]


def run_into_the_end(command: list[str], output: Path) -> str:
    """Runs a command that finds no room; returns its message."""
    done = run(command)
    assert done.returncode == 2, f"{done.returncode}: {done.stderr[-3000:]}"
    message = done.stderr[done.stderr.rindex("error: ") :]
    assert str(output) in message and ("make room" in message or "free space" in message), message
    assert "No space left on device" in message or "are free" in message, message
    assert "Traceback" not in message, message
    assert not (output / MANIFEST).exists()
    return message


def assert_same_files(ours: Path, theirs: Path, *without: str) -> None:
    a, b = (verify_manifest(folder).files for folder in (ours, theirs))
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name] and name not in without] == []


def go_through(command: list[str], output: Path, disk: Disk, sizes: list[int]) -> list[str]:
    """Runs a command with less room than it needs, again and again, and then with enough; returns its messages."""
    messages = []
    for size in sizes:
        disk.resize(size)
        messages.append(run_into_the_end(command, output))
    disk.resize(10_000)
    run_well(command)
    return messages
