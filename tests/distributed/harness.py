"""Runs a function in several gloo ranks on one machine, as a test.

    def total(rank: int, world_size: int, offset: int) -> int:
        value = torch.tensor(rank + offset)
        torch.distributed.all_reduce(value)
        return int(value)

    def test_total() -> None:
        assert run_ranks(total, 2, 10) == [21, 21]

The ranks are forked from a process that has imported torch and Megatron once (`tests/forked.py`), meet in a
`FileStore` in a temporary folder (no ports, so tests can run side by side) and compute with one thread each. Starting
two ranks takes a few tenths of a second after the first time; put several cases into one function all the same
(`run_cases`).
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forked import CONTEXT, REPOSITORY

RankFunction = Callable[..., Any]
"""`fn(rank, world_size, *args)`, defined at the top level of a module so that a rank can import it."""

Case = tuple[str, RankFunction, tuple[Any, ...]]
"""A named call: the function and the arguments after `rank` and `world_size`."""


class RankError(AssertionError):
    """A rank failed; the message holds the traceback of the rank that failed first."""


def run_ranks(fn: RankFunction, world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` gloo ranks and return their results, by rank.

    `torch.distributed` is initialised (backend gloo) before the call and destroyed after it; RANK, LOCAL_RANK
    and WORLD_SIZE are set in the environment. Arguments and results travel by value. Random seeds are left at
    the same fixed value on all ranks.

    Raises:
        RankError: a rank raised (its traceback is in the message; where several did, the first one's), died,
            or did not end in `timeout` seconds (the stacks of the ranks that still ran are in the message).
    """
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[BaseProcess] = []
        connections: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = CONTEXT.Pipe(duplex=False)
                process: BaseProcess = CONTEXT.Process(
                    target=_rank_main, args=(sender, payload, dict(os.environ), rank, world_size, folder, timeout)
                )
                process.start()
                sender.close()
                processes.append(process)
                connections.append(receiver)
            results = _collect(processes, connections, folder, timeout)
            for process in processes:
                process.join(timeout=5.0)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for connection in connections:
                connection.close()


def run_cases(cases: Sequence[Case], world_size: int, timeout: float = 120.0) -> dict[str, list[Any]]:
    """Run several cases in one set of ranks, in order; returns the results of each, by name and then by rank.

    The first case that fails ends the run, because the ranks may be out of step after it; it is named in the error.
    """
    names = [name for name, _, _ in cases]
    assert len(set(names)) == len(names), f"case names must differ: {names}"
    by_rank = run_ranks(_run_cases, world_size, list(cases), timeout=timeout)
    return {name: [results[i] for results in by_rank] for i, name in enumerate(names)}


def _run_cases(rank: int, world_size: int, cases: list[Case]) -> list[Any]:
    results = []
    for name, fn, args in cases:
        try:
            _seed()
            results.append(fn(rank, world_size, *args))
        except Exception as error:
            error.add_note(f"in case {name!r}")
            raise
    return results


def _seed() -> None:
    import torch

    random.seed(1234)
    torch.manual_seed(1234)


def _rank_main(
    sender: Connection,
    payload: bytes,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
) -> None:
    """The life of one rank. Sends one `(succeeded, time, result or traceback)`."""
    # The server was started with the environment of that moment; a test may have changed it since.
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A rank that hangs writes its stack just before the time limit, for the message.
    stacks = (Path(folder) / f"stack-{rank}.txt").open("w")
    faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5 * timeout), file=stacks)
    try:
        message = (True, 0.0, pickle.dumps(_call(payload, rank, world_size, folder, timeout)))
    except BaseException:
        message = (False, time.monotonic(), traceback.format_exc().encode())
    sender.send(message)
    sender.close()
    faulthandler.cancel_dump_traceback_later()


def _call(payload: bytes, rank: int, world_size: int, folder: str, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    fn, args = pickle.loads(payload)
    _seed()
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    result = fn(rank, world_size, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _collect(
    processes: Sequence[BaseProcess], connections: Sequence[Connection], folder: str, timeout: float
) -> list[Any]:
    """Wait for the message of every rank; the first failure, or the end of the time, raises `RankError`."""
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    pending = {connection: rank for rank, connection in enumerate(connections)}
    deadline = time.monotonic() + timeout
    while pending and not failures:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(_describe_hang(sorted(pending.values()), folder, timeout))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                succeeded, moment, content = connection.recv()
            except EOFError:
                processes[rank].join(timeout=5.0)
                # A death without a message is blamed only where no rank reports an error.
                failures.append((float("inf"), rank, f"died with exit code {processes[rank].exitcode}"))
                continue
            if succeeded:
                results[rank] = pickle.loads(content)
            else:
                failures.append((moment, rank, content.decode()))
    if failures:
        _, rank, text = min(failures)
        raise RankError(f"rank {rank} of {len(processes)}:\n{text}")
    return [results[rank] for rank in range(len(processes))]


def _describe_hang(ranks: list[int], folder: str, timeout: float) -> str:
    stacks = "\n".join(f"--- rank {rank}\n{(Path(folder) / f'stack-{rank}.txt').read_text()}" for rank in ranks)
    return f"ranks {ranks} did not end in {timeout:g} s\n{stacks}"
