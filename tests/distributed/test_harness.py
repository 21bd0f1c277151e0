"""The harness itself: results, failures, time limits; and the processes that are forked in place of interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_erpd import platform
from tests import forked
from tests.distributed.harness import RankError, run_cases, run_ranks


def total(rank: int, world_size: int, offset: int) -> torch.Tensor:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return value


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def hang_on_rank_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def die_on_rank_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(60)


def test_results_by_rank() -> None:
    first, second = run_ranks(total, 2, 10)
    assert first.tolist() == second.tolist() == [21]


def test_cases_share_ranks() -> None:
    results = run_cases([("a", total, (0,)), ("b", total, (1,))], 2)
    assert [value.item() for value in results["b"]] == [3, 3]
    with pytest.raises(RankError, match=r"(?s)the cause.*in case 'broken'"):
        run_cases([("fine", total, (0,)), ("broken", fail_on_rank_one, ())], 2)


def test_first_failure_is_shown() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*the cause"):
        run_ranks(fail_on_rank_one, 2)


def test_time_limit_shows_the_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)did not end in 5 s.*hang_on_rank_zero"):
        run_ranks(hang_on_rank_zero, 2, timeout=5)
    assert time.monotonic() - start < 30


def test_death_is_reported() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 2:\ndied with exit code 7"):
        run_ranks(die_on_rank_zero, 2)


COMMAND = """
import atexit, os, signal, sys, threading, time

atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread", flush=True))).start()
print(*sys.argv, __name__, os.getcwd(), os.environ["GIVEN"], os.getsid(0) == os.getpid())
print("megatron.training.training" in sys.modules)
print("error", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(75)", 75), ("raise KeyError", 1), ("os.kill(os.getpid(), signal.SIGTERM)", -15)],
)
def test_a_forked_command_is_like_one_of_an_interpreter(end: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMAND.format(end=end), "word", "--flag"]
    options = {"env": {"GIVEN": "this"}, "cwd": tmp_path, "timeout": 60, "start_new_session": True}
    ours, theirs = forked.run(command, **options), subprocess.run(command, capture_output=True, text=True, **options)
    assert ours.returncode == theirs.returncode == code
    assert ours.stderr.splitlines()[:1] == theirs.stderr.splitlines()[:1] == ["error"]
    assert ours.stdout == theirs.stdout.replace("False", f"{platform.is_cpu()}")
    if code >= 0:  # a signal leaves no output: it was not flushed
        assert "thread" in ours.stdout
