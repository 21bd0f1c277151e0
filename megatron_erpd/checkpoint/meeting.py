"""Where the processes of a stage wait for one another however long one of them takes, and share work on files.

A collective is no place for that: NCCL ends the job when a rank waits in one for ten minutes, which is what the hash of
a large checkpoint takes, or a slow file system. So messages go through the store by which the processes met. Where
there is none (a process group that the caller made), they go through that group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_erpd.checkpoint.mapping.shards import gather_objects
from megatron_erpd.errors import ErpdError, StageError
from megatron_erpd.launcher import launch
from megatron_erpd.manifest import (
    Reads,
    content_files,
    differing_files,
    file_digest,
    files_of_inputs,
    finish_artifact,
    shares,
)

_POLL_SECONDS = (0.005, 0.5)
"""Between two looks into the store: at first, and at most."""
_store: dist.Store | None = None
_messages = 0


@contextmanager
def meeting(store: dist.Store | None) -> Iterator[None]:
    """Has this module's functions work for the processes that met by this store; None: for those of the group."""
    global _store, _messages
    before = _store, _messages
    _store, _messages = None if store is None else dist.PrefixStore("meeting", store), 0
    try:
        yield
    finally:
        _store, _messages = before


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _store is None and dist.is_initialized() else launch().rank


def num_processes() -> int:
    """How many meet here."""
    if _store is None:
        return dist.get_world_size() if dist.is_initialized() else 1
    return launch().world_size


def scatter[T](values: Sequence[T] | None) -> T:
    """The value for this process, of a list that the first process has. Values are JSON's."""
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
    """The values of all processes, at the first one; empty at the others. Values are JSON's."""
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


def checksums_of(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of an artifact's files, but for the `known` ones, at the first process; empty at the others. Each process
    reads a share of about equal size, so that none waits longer than the largest share, or file, takes.

    Raises:
        StageError: a file can't be read; at all of them.
    """
    listed: list[list[str]] = []

    def deal() -> None:
        sizes = content_files(folder)
        listed.extend(shares({n: size for n, size in sizes.items() if n not in (known or {})}, num_processes()))

    first(deal)
    found: dict[str, str] = {}
    problem = ""
    try:
        for name in scatter(listed if rank() == 0 else None):
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


def verify_together(inputs: Iterable[Path], reads: Reads | None = None) -> None:
    """`manifest.verify_inputs` by all processes, each of which reads a share.

    Raises:
        StageError: names the files that differ and says what to do; at all processes.
    """
    dealt: list[list[tuple[str, int, str]]] = []

    def deal() -> None:
        files = files_of_inputs(inputs, reads)
        parts = shares({file: record["size"] for file, record in files.items()}, num_processes())
        dealt.extend([(file, files[file]["size"], files[file]["sha256"]) for file in part] for part in parts)

    first(deal)
    together = gather(differing_files(scatter(dealt if rank() == 0 else None)))
    first(lambda: _raise([problem for part in together for problem in part]))


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
