"""The processes that measure: one for each tensor-parallel rank, started afresh for each tensor-parallel size.

Nothing is measured in the process that was called: it prints and writes, and never imports a peer.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Case
from benchmarks.records import Record

PRELOAD = ["torch", "benchmarks.compare"]
PRELOAD_MEGATRON = ["benchmarks.quiet_megatron"]
"""What the server that ranks are forked from imports; what it can't import, a rank does (or reports that it can't)."""


@dataclass(frozen=True)
class Job:
    """What the ranks of one tensor-parallel size do.

    Attributes:
        cases: all of the same tensor-parallel size.
        template: device, threads and repeats of the records.
        memory: bytes that each rank may use.
    """

    cases: list[Case]
    template: Record
    memory: int

    @property
    def ranks(self) -> int:
        return self.cases[0].tp


@dataclass(frozen=True)
class Unavailable:
    """An implementation that can't run here at all."""

    name: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """A case is done: its records, and the implementations that were too large for it."""

    case: Case
    records: list[Record]
    skipped: list[str]


Message = Unavailable | Measured


class RankError(RuntimeError):
    """A rank failed; the message holds its traceback."""


def run_ranks(job: Job) -> Iterator[Message]:
    """Starts the ranks and gives what rank 0 reports, as it comes.

    Raises:
        RankError: a rank raised or died.
    """
    context = _processes(job)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        processes: list[BaseProcess] = []
        receivers: list[Connection] = []
        try:
            for rank in range(job.ranks):
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_main, args=(sender, rank, job, folder))
                process.start()
                sender.close()
                processes.append(process)
                receivers.append(receiver)
            yield from _messages(processes, receivers)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _processes(job: Job) -> SpawnContext | ForkServerContext:
    """CUDA doesn't survive a fork. Elsewhere a server imports once for the ranks of all sizes."""
    if job.template.device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    wants_megatron = any(case.target == "topk" and case.kind == "forward_kl" for case in job.cases)
    context.set_forkserver_preload([*PRELOAD, *(PRELOAD_MEGATRON if wants_megatron else [])])
    return context


def _messages(processes: list[BaseProcess], receivers: list[Connection]) -> Iterator[Message]:
    """Until every rank has closed its end."""
    open_ends = {receiver: rank for rank, receiver in enumerate(receivers)}
    while open_ends:
        for receiver in wait(list(open_ends)):
            assert isinstance(receiver, Connection)
            rank = open_ends[receiver]
            try:
                message = receiver.recv()
            except EOFError:
                del open_ends[receiver]
                processes[rank].join()
                if processes[rank].exitcode:
                    raise RankError(
                        f"rank {rank} of {len(processes)} died with exit code {processes[rank].exitcode}; "
                        "-9 means most often that the machine ran out of memory"
                    ) from None
                continue
            if isinstance(message, str):
                raise RankError(f"rank {rank} of {len(processes)}:\n{message}")
            yield message


def _main(sender: Connection, rank: int, job: Job, folder: str) -> None:
    """The life of one rank. A string that it sends is the traceback of a failure."""
    try:
        _work(sender, rank, job, folder)
    except BaseException:
        sender.send(traceback.format_exc())
    finally:
        sender.close()


def _work(sender: Connection, rank: int, job: Job, folder: str) -> None:
    os.environ["KINETO_LOG_LEVEL"] = "9"  # the memory meter's profiler would write to the terminal
    from benchmarks.compare import Bench
    from benchmarks.inputs import Context

    warnings.simplefilter("ignore", FutureWarning)  # of peers, at every call
    torch.set_num_threads(job.template.threads)
    device = torch.device(job.template.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    group: dist.ProcessGroup | None = None
    if job.ranks > 1:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), job.ranks),
            rank=rank,
            world_size=job.ranks,
            timeout=datetime.timedelta(minutes=30),
            **options,
        )
        group = dist.group.WORLD
    bench = Bench.prepare(Context(device, rank, group), job.cases, job.template, job.memory)
    if rank == 0:
        for name, reason in bench.reasons.items():
            sender.send(Unavailable(name, reason))
    for case in job.cases:
        try:
            records, skipped = bench.measure(case)
        except torch.OutOfMemoryError as error:
            if group is not None:  # the ranks are out of step
                raise
            records, skipped = [], [f"out of memory after all: {str(error).splitlines()[0]}"]
        if rank == 0:
            sender.send(Measured(case, records, skipped))
    if group is not None:
        dist.barrier(group=group)
        dist.destroy_process_group()
