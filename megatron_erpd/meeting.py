"""How the processes of a stage meet, wait for one another however long one of them takes, and share work on files.

A collective is no place for long work: NCCL ends the job when a rank waits in one for ten minutes, which is what the
hash of a large checkpoint takes, or a slow file system. So messages of a stage that runs a model go through the store
by which its processes met. Where there is none (a conversion's group of gloo, or a group that the caller made), they go
through that group.
"""

from __future__ import annotations

import heapq
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_erpd.errors import ErpdError, StageError, first_line, full_disk, raise_problems
from megatron_erpd.launcher import Launch, check_meeting, launch, work_alone
from megatron_erpd.manifest import (
    Reads,
    content_files,
    differing_files,
    file_digest,
    files_of_inputs,
    finish_artifact,
)
from megatron_erpd.progress import say_progress

_POLL_SECONDS = (0.005, 0.5)
"""Between two looks into the store: at first, and at most."""
_SAY_SECONDS = 5.0
"""After which a process says what it waits for, and between two lines of a `ShareProgress`."""
_MEETING = timedelta(minutes=2)
_GLOO_TIMEOUT = timedelta(days=1)
"""Processes of a conversion wait for the one with most to read. One that dies ends the others at once."""
_store: dist.Store | None = None
_messages = 0


def meeting_store(launched: Launch) -> dist.Store:
    """The store through which the processes of a launcher find each other (`env://`). Collective, at most two minutes:
    where torchrun has started them, its store is there already.

    Raises:
        LayoutError: from `check_meeting`.
        StageError: not all have come; names what they were to meet by.
    """
    check_meeting(launched)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timer = threading.Timer(
        _SAY_SECONDS,
        lambda: print(
            f"rank {launched.rank} waits for the {launched.world_size} processes of WORLD_SIZE at MASTER_ADDR {place}",
            file=sys.stderr,
            flush=True,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        store, *_ = next(dist.rendezvous("env://", launched.rank, launched.world_size, timeout=_MEETING))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise StageError(
            f"RANK {launched.rank} of WORLD_SIZE {launched.world_size} could not meet the others at MASTER_ADDR and "
            f"MASTER_PORT {place} within {_MEETING.seconds} s; start all of them with torchrun, or, to work in one "
            f"process, `unset RANK WORLD_SIZE` ({first_line(error)})"
        ) from error
    finally:
        timer.cancel()
        timer.join()
    return dist.PrefixStore("default_pg", store)


@contextmanager
def conversion_processes() -> Iterator[None]:
    """A gloo group of the processes that a launcher started; nothing where this is the only one."""
    launched = launch()
    started = launched.world_size > 1 and not dist.is_initialized()
    if started:
        store = meeting_store(launched)
        dist.init_process_group(
            "gloo", store=store, rank=launched.rank, world_size=launched.world_size, timeout=_GLOO_TIMEOUT
        )
    elif not dist.is_initialized():
        work_alone()
    yield
    if started:  # after an error nothing is waited for: the other processes end by themselves
        dist.destroy_process_group()


@contextmanager
def meeting(store: dist.Store | None) -> Iterator[None]:
    """Makes this module's functions send their messages through this store; None: through the process group."""
    global _store, _messages
    before = _store, _messages
    _store, _messages = None if store is None else dist.PrefixStore("meeting", store), 0
    try:
        yield
    finally:
        _store, _messages = before


def rank() -> int:
    """This process's number."""
    if _store is None:
        return dist.get_rank() if dist.is_initialized() else 0
    return launch().rank


def num_processes() -> int:
    """How many processes share the work."""
    if _store is None:
        return dist.get_world_size() if dist.is_initialized() else 1
    return launch().world_size


def share[T](work: Sequence[T]) -> list[T]:
    """This process's part of the work: item number `rank()`, and each `num_processes()`-th after it."""
    return list(work[rank() :: num_processes()])


def scatter[T](values: Sequence[T] | None) -> T:
    """The value for this process, of a list that the first process has. Values must be JSON."""
    if num_processes() == 1:
        assert values is not None
        return values[0]
    if _store is None:
        listed = [values]
        dist.broadcast_object_list(listed, src=0)
        assert listed[0] is not None
        return listed[0][rank()]
    number = _next_message()
    if values is not None:
        for other, value in enumerate(values):
            _store.set(f"{number}/to/{other}", json.dumps(value))
    return _receive(f"{number}/to/{rank()}")


def gather[T](value: T) -> list[T]:
    """The values of all processes, at the first one; empty at the others. Values must be JSON."""
    if num_processes() == 1:
        return [value]
    if _store is None:
        values = gather_objects(value)
        return values if rank() == 0 else []
    number = _next_message()
    _store.set(f"{number}/from/{rank()}", json.dumps(value))
    return [_receive(f"{number}/from/{other}") for other in range(num_processes())] if rank() == 0 else []


def first(work: Callable[[], None]) -> None:
    """Has the first process work, and the others wait until it is done.

    Raises:
        ErpdError, OSError: what the work raised; a `StageError` that says the same at the others.
    """
    problem: ErpdError | OSError | None = None
    if rank() == 0:
        try:
            work()
        except (ErpdError, OSError) as error:
            problem = error
    said = None if problem is None else str(problem)
    said = scatter([said] * num_processes() if rank() == 0 else None)
    if problem is not None:
        raise problem
    if said is not None:
        raise StageError(said)


def scatter_from[T](values: Callable[[], Sequence[T]]) -> T:
    """The value for this process, of a list that the first process makes; raises as `first`."""
    made: list[T] = []
    first(lambda: made.extend(values()))
    return scatter(made if rank() == 0 else None)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, by rank, on every rank. One all-gather; alone without process groups."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(where: object, problems: Sequence[str]) -> None:
    """Raises the same error on every rank if any rank has a problem, so that none waits for one that left.

    Collective over all ranks.

    Raises:
        CheckpointError: `where` and the problems of all ranks, each once.
    """
    raise_problems(where, [line for rank in gather_objects(list(problems)) for line in rank])


def do_together(where: object, work: Callable[[], None]) -> None:
    """Does this process's work; if any process fails, all raise.

    Collective over all processes.

    Raises:
        CheckpointError: the errors of all processes, each once (one process alone raises its own).
    """
    problems: list[str] = []
    try:
        work()
    except (ErpdError, OSError) as error:
        if num_processes() == 1 and isinstance(error, ErpdError):
            raise
        full = isinstance(error, OSError) and full_disk(error) is not None
        problems = [f"{error}; make room and run it again" if full else str(error)]
    raise_together(where, problems)


def shares_by_size(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Divides files into `count` shares of about equal size: the largest first, each to the smallest share so far."""
    found: list[list[str]] = [[] for _ in range(count)]
    heap = [(0, 0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        total, files, number = heapq.heappop(heap)
        found[number].append(name)
        heapq.heappush(heap, (total + sizes[name], files + 1, number))
    return found


def checksums_of(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of an artifact's files, but for the `known` ones, at the first process; empty at the others. Each process
    reads a share of about equal size, so that none waits longer than the largest share, or file, takes.

    Raises:
        StageError: a file can't be read; at all of them.
    """

    def shares() -> list[list[str]]:
        sizes = content_files(folder)
        return shares_by_size({n: size for n, size in sizes.items() if n not in (known or {})}, num_processes())

    found: dict[str, str] = {}
    problem = ""
    mine = scatter_from(shares)
    try:
        for name in mine:
            found[name] = file_digest(folder / name)
    except OSError as error:
        problem = f"{error.filename}: can't be read ({error.strerror}); run the stage again"
    together: list[Any] = gather([found, problem])
    first(lambda: _raise([problem for _, problem in together]))
    joined = {name: digest for part, _ in together for name, digest in part.items()}
    return {**(known or {}), **joined} if rank() == 0 else {}


def finish_together(
    folder: Path,
    summary: dict[str, Any] | None = None,
    checksums: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """`manifest.finish_artifact` by all processes, which hash the files together.

    Args:
        summary, checksums, warnings: as there; those of the first process count.

    Raises:
        StageError: no stage has begun the artifact, or a file can't be read; at all processes.
    """
    known = checksums_of(folder, checksums)

    def finish() -> None:
        finish_artifact(folder, summary, known, warnings)

    first(finish)


def verify_inputs_together(inputs: Iterable[Path], reads: Reads | None = None) -> None:
    """`manifest.verify_inputs` by all processes, each of which reads a share.

    Raises:
        StageError: names the files that differ and says what to do; at all processes.
    """

    def shares() -> list[list[tuple[str, int, str]]]:
        files = files_of_inputs(inputs, reads)
        names = shares_by_size({file: record["size"] for file, record in files.items()}, num_processes())
        return [[(file, files[file]["size"], files[file]["sha256"]) for file in share] for share in names]

    together = gather(differing_files(scatter_from(shares)))
    first(lambda: _raise([problem for problems in together for problem in problems]))


class ShareProgress:
    """Says how far work on files is: a line every few seconds from the first process, about its own share.

    Args:
        verb: what was done, as `imported`.
        total: bytes of this process's share.
    """

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total, self._done = verb, total, 0
        self._begin = self._last = time.monotonic()
        self._is_shown = rank() == 0

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._is_shown and now - self._last >= _SAY_SECONDS:
            self._last = now
            rate = self._done / (now - self._begin)
            left = (self._total - self._done) / rate
            share = "" if num_processes() == 1 else f"the share of one of {num_processes()} processes, "
            say_progress(
                self._verb,
                f"{self._done / 1e9:.1f}",
                f"{self._total / 1e9:.1f} GB",
                f"{share}{rate / 1e9:.2f} GB/s, {left:.0f} s left",
                file=sys.stderr,
            )


def peak_memory() -> int:
    """The largest resident memory that any of the processes has had, in bytes; collective."""
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(gather_objects(here))


def _raise(problems: Sequence[str]) -> None:
    if found := [problem for problem in problems if problem]:
        raise StageError("\n  ".join(found))


def _next_message() -> int:
    global _messages
    _messages += 1
    return _messages


def _receive(key: str) -> Any:
    assert _store is not None
    pause, longest = _POLL_SECONDS
    while not _store.check([key]):  # a `wait` would keep signals from being seen, and give up
        time.sleep(pause)
        pause = min(1.5 * pause, longest)
    value = json.loads(_store.get(key))
    _store.delete_key(key)
    return value
