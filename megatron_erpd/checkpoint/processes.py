"""The processes of a conversion: each does its share of the files, and all stop when one can't go on."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_erpd.checkpoint.mapping.shards import gather_objects, raise_together
from megatron_erpd.errors import ErpdError, StageError, first_line, full_disk
from megatron_erpd.launcher import Launch, check_meeting, launch, work_alone
from megatron_erpd.progress import say_progress

_SECONDS = 5.0
_MEETING = timedelta(minutes=2)
_PATIENCE = timedelta(days=1)
"""Processes wait for the one with most to read. One that dies ends the others at once."""


@contextmanager
def conversion_processes() -> Iterator[None]:
    """A gloo group of the processes that a launcher started; nothing where this is the only one."""
    launched = launch()
    started = launched.world_size > 1 and not dist.is_initialized()
    if started:
        store = meeting_store(launched)
        dist.init_process_group(
            "gloo", store=store, rank=launched.rank, world_size=launched.world_size, timeout=_PATIENCE
        )
    elif not dist.is_initialized():
        work_alone()
    yield
    if started:  # after an error nothing is waited for: the other processes end by themselves
        dist.destroy_process_group()


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
        _SECONDS,
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


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share[T](work: Sequence[T]) -> list[T]:
    """This process's part of the work: each takes every so-manieth item."""
    return list(work[process_rank() :: num_processes()])


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


def peak_memory() -> int:
    """The largest resident memory that any of the processes has had, in bytes; collective."""
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(gather_objects(here))


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that has the command line start several processes (`cli`)."""
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="share the work among so many processes of this machine (default: 1; under torchrun, those it started)",
    )


class Progress:
    """Says how far a conversion is: a line every few seconds from the first process, about its own share."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total, self._done = verb, total, 0
        self._begin = self._last = time.monotonic()
        self._is_shown = process_rank() == 0

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._is_shown and now - self._last >= _SECONDS:
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
