"""Writers that are killed, meet a full disk or one another: what was valid stays, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd import locks
from megatron_erpd.data.rollouts import Rollouts, read_rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.files import publish
from megatron_erpd.teacher_cache import CacheReader, CacheWriter, exclusive, finalize, parts, prepare_cache
from megatron_erpd.teacher_cache.verify import verify_cache
from tests.unit.teacher_cache.caches import (
    HIDDEN_META,
    TOKEN_META,
    assert_same,
    contents,
    fill,
    make,
    write_random_rollouts,
    write_row,
)
from tests.unit.teacher_cache.killed_writer import STAGES

REPOSITORY = Path(__file__).parents[3]
PART = "part-00000-00000.arrow"
TARGET = f"topk/{PART}"
WITH_LEFTOVERS = ("half-a-part", "part-without-its-name", "after-a-part", "description-without-its-name")

# Killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rollouts and an unfinished cache for each stage at which its writer was killed."""
    root = tmp_path_factory.mktemp("killed")
    write_random_rollouts(root / "rollouts.parquet")
    command = [
        sys.executable,
        "-m",
        "tests.unit.teacher_cache.killed_writer",
        str(root / "rollouts.parquet"),
        str(root),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(STAGES, -signal.SIGKILL)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_killed(stage: str, killed: Path) -> None:
    rollouts, folder = read_rollouts(killed / "rollouts.parquet"), killed / stage
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("part-*")}
    leftovers, indices = list(folder.rglob(".*.tmp")), list(folder.rglob("index.arrow"))
    all_parts = not stage.endswith("part") and stage != "part-without-its-name"
    assert len(indices) == {"between-the-indices": 3, "before-the-indices": 0}.get(stage, 5 if all_parts else 0)
    assert bool(leftovers) == (stage in WITH_LEFTOVERS)
    assert before and not (folder / "cache.json").exists()
    with pytest.raises(CacheError, match="is unfinished"):
        CacheReader(folder)
    assert "is unfinished" in verify_cache(folder)[0]

    with exclusive(folder):
        done = prepare_cache(folder, HIDDEN_META)
        assert not list(folder.rglob(".*.tmp"))
        assert any(len(names) < len(rollouts) for names in done.values()) != all_parts
        resume(folder, rollouts)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before, "written again"


# A full disk


def no_space(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        return no_space() if left[0] < 0 else function(*arguments)

    return call


@pytest.mark.parametrize("where", ["first bytes", "bytes", "sync", "folder's sync", "name"])
def test_a_disk_that_fills_up_while_rows_are_written(
    where: str, tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        calls = {"first bytes": 0, "bytes": 150, "sync": 4, "folder's sync": 5, "name": 2}[where]
        target = parts._Hashing if "bytes" in where else os
        name = "write" if "bytes" in where else "link" if where == "name" else "fsync"
        full.setattr(target, name, failing_after(calls, getattr(target, name)))
        with pytest.raises(
            CacheError, match=r"part-\d+-\d+\.arrow: can't be written .*No space left.*; free space there and"
        ):
            fill(tmp_path, rollouts, HIDDEN_META, part_bytes=60)
    before = {path: path.read_bytes() for path in tmp_path.rglob("part-*")}
    assert bool(before) == (where != "first bytes") and not list(tmp_path.rglob(".*.tmp"))
    resume(tmp_path, rollouts)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("calls", "file"), [(4, "topk/index.arrow"), (10, "cache.json")])
def test_a_disk_that_fills_up_while_the_cache_is_closed(
    calls: int, file: str, tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, rollouts, HIDDEN_META)
    before = {path: path.read_bytes() for path in tmp_path.rglob("part-*")}
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing_after(calls, os.fsync))
        with pytest.raises(CacheError, match=f"{file}: can't be written .*No space left.*; free space there and run"):
            finalize(tmp_path, HIDDEN_META, rollouts.sample_ids)
    assert not list(tmp_path.rglob(".*.tmp")) and not (tmp_path / "cache.json").exists()
    resume(tmp_path, rollouts)
    assert {path: path.read_bytes() for path in before} == before


def test_another_error_of_the_file_system(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CacheError, match="can't be written .*Input/output error.*; repair the file system and run"):
        fill(tmp_path, rollouts, HIDDEN_META)


def resume(folder: Path, rollouts: Rollouts) -> None:
    """Writes what is missing and closes the cache, which must then be what one run makes."""
    done = prepare_cache(folder, HIDDEN_META)
    with CacheWriter(folder, HIDDEN_META) as writer:
        for table, names in done.items():
            for i, name in enumerate(rollouts.sample_ids):
                if name not in names:
                    write_row(writer, rollouts, i, [table])
    finalize(folder, HIDDEN_META, rollouts.sample_ids)
    whole = make(folder.with_name(f"{folder.name}-whole"), rollouts, HIDDEN_META)
    assert_same(contents(CacheReader(folder), rollouts.sample_ids), contents(whole, rollouts.sample_ids))
    for name, figures in whole.statistics.items():
        assert CacheReader(folder).statistics[name] == pytest.approx(figures)
    assert verify_cache(folder, rollouts) == []


def test_a_part_is_on_disk_before_it_has_its_name(
    tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its name too before the writer goes on: a power cut takes nothing that was counted on."""
    events: list[str] = []

    def noted(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append(name(*arguments))
            return function(*arguments)

        return call

    def synced(file: int) -> str:
        is_folder = stat.S_ISDIR(os.fstat(file).st_mode)
        return "folder" if is_folder else f"{'all' if os.fstat(file).st_size > 2000 else 'some'} of the file"

    monkeypatch.setattr(os, "fsync", noted(os.fsync, synced))
    monkeypatch.setattr(os, "link", noted(os.link, lambda *_: "name"))
    with CacheWriter(tmp_path, TOKEN_META) as writer:
        for i in range(len(rollouts)):
            write_row(writer, rollouts, i, ["log_probs.base"])
    assert events == ["all of the file", "name", "folder"]


# Two writers

HOLDS = """
import sys
from megatron_erpd.teacher_cache.writer import exclusive

with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_programs_on_one_folder(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        message = f"process {other.pid} on .* is writing this cache; wait for it or stop it"
        for _ in range(2):  # being refused takes nothing from the one who writes
            with pytest.raises(CacheError, match=message), exclusive(tmp_path):
                pytest.fail("both hold the folder")
    finally:
        other.kill()
        other.communicate()
    with exclusive(tmp_path):  # the system has let go of what a killed process held
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends between another's opening and locking the file: that one must not hold a file nobody sees."""
    whole, calls = locks._flock, []

    def late(file: Any, kind: int) -> bool:
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return whole(file, kind)

    monkeypatch.setattr(locks, "_flock", late)
    with exclusive(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()
        monkeypatch.undo()
        with pytest.raises(CacheError, match="is writing this cache"), exclusive(tmp_path):
            pytest.fail("both hold the folder")


def test_two_writers_of_one_rank(tmp_path: Path, rollouts: Rollouts) -> None:
    """The first one's rows stay; the other is told."""
    first, second = CacheWriter(tmp_path, TOKEN_META), CacheWriter(tmp_path, TOKEN_META)
    for writer, i in ((first, 0), (second, 1)):
        write_row(writer, rollouts, i, ["log_probs.base"])
        writer._thread.submit(lambda: None).result()  # both have chosen the name of their part
    first.close()
    with pytest.raises(CacheError, match=f"{PART}: was written by somebody else meanwhile; let one process write"):
        second.close()
    assert prepare_cache(tmp_path, TOKEN_META)["log_probs.base"] == {rollouts.sample_ids[0]}
    assert [path.name for path in (tmp_path / "log_probs.base").iterdir()] == [PART]


def test_a_file_system_without_hard_links(tmp_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    make(tmp_path, rollouts, HIDDEN_META)
    assert verify_cache(tmp_path, rollouts) == []
    with pytest.raises(FileExistsError):
        publish(tmp_path / "cache.json", tmp_path / TARGET, replace=False)
