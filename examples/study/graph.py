"""Jobs, each a command of `megatron-erpd` with the folder that it writes, and running them in a few processes.

A job's folder is named by what the job does: its command, its flags and the folders that it reads. So arms of the study
that share a base, a teacher or a cache share the folder, a finished folder (its `manifest.json` is there) is never made
again, and a job whose flags change gets another folder. Commands run inside worker processes that stay: starting Python
and Megatron takes longer than most jobs here.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
JOBS_PER_WORKER = 60
"""A worker is replaced after so many jobs: memory that libraries keep per stage adds up."""

Flags = Mapping[str, object]
"""Flag to value, underscores for dashes; True is the bare flag, a list repeats it, None leaves it out."""


@dataclass(frozen=True)
class Job:
    """One command."""

    label: str
    """What a person reads."""
    command: str
    argv: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path

    @property
    def done(self) -> bool:
        return (self.output / MANIFEST).is_file()

    @property
    def log(self) -> Path:
        return self.output.with_name(self.output.name + ".log")


class Graph:
    """The jobs of a study by their folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[Path, Job] = {}

    def add(
        self,
        folder: str,
        command: str,
        flags: Flags,
        inputs: Mapping[str, Path | Sequence[str]] | None = None,
        label: str = "",
        run_flags: Flags | None = None,
    ) -> Path:
        """Adds a job unless it is there already; returns its output folder.

        Args:
            folder: group of folders below the root, such as a task and a seed.
            command: of `megatron-erpd`, or `prepare`.
            flags: what decides the result.
            inputs: flag to a folder or file; or to `NAME=FOLDER` or `NAME=FOLDER@ITERATION` texts, for a flag that
                repeats.
            run_flags: how it runs; no part of the folder's name.
        """
        argv, paths = _argv(dict(sorted(flags.items()))), []
        for name, value in (inputs or {}).items():
            for text in [str(value)] if isinstance(value, Path) else value:
                argv += [f"--{name}", text]
                paths.append(Path(re.sub(r"@\d+$", "", text.partition("=")[2] or text)))
        relative = [word.replace(str(self.root), "") for word in argv]
        digest = hashlib.sha256("\0".join([command, *relative]).encode()).hexdigest()[:10]
        output = self.root / folder / f"{label or command}-{digest}"
        output_flag = ["--output", str(output)]
        job = Job(
            f"{folder} {label or command}",
            command,
            (*argv, *_argv(run_flags or {}), *output_flag),
            tuple(paths),
            output,
        )
        self.jobs.setdefault(output, job)
        return output

    def waits_for(self, job: Job) -> Iterator[Job]:
        """The jobs in whose folders the inputs of `job` lie."""
        for path in job.inputs:
            for place in (path, *path.parents):
                if place in self.jobs:
                    yield self.jobs[place]
                    break


def _argv(flags: Flags) -> list[str]:
    argv: list[str] = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            argv += [flag] if item is True else [flag, str(item)]
    return argv


def run_graph(graph: Graph, workers: int, say: Callable[[str], None] = print) -> None:
    """Runs all jobs that are not done, in the order in which they were added as far as their inputs are there.

    Raises:
        SystemExit: a job failed; its log is named. What is done stays done: the same command goes on.
    """
    waiting = {job.output: job for job in graph.jobs.values() if not job.done}
    blockers = {
        output: {other.output for other in graph.waits_for(job) if not other.done} for output, job in waiting.items()
    }
    total, started = len(waiting), time.monotonic()
    pool = [_Worker() for _ in range(min(workers, total))]
    failed = ""
    try:
        while (waiting and not failed) or any(w.job for w in pool):
            for worker in pool:
                ready = [job for output, job in waiting.items() if not blockers[output]]
                if worker.job is None and ready and not failed:
                    job = ready[0]
                    del waiting[job.output]
                    worker.start(job)
            for worker in pool:
                result = worker.poll()
                if result is None:
                    continue
                job, seconds, error = result
                if error:
                    failed = f"{job.label} failed; log in {job.log}:\n{error}"
                    continue
                for others in blockers.values():
                    others.discard(job.output)
                done = total - len(waiting) - sum(w.job is not None for w in pool)
                say(f"{time.monotonic() - started:7.0f} s  {done} of {total}  {job.label}  {seconds:.1f} s")
            time.sleep(0.02)
    finally:
        for worker in pool:
            worker.end()
    if failed:
        sys.exit(failed)


class _Worker:
    """A process that runs one job at a time."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._process: Any = None
        self._pipe: Any = None
        self._count = 0

    def start(self, job: Job) -> None:
        if self._process is None or self._count >= JOBS_PER_WORKER:
            self.end()
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            # Megatron's checkpoint writer starts a process of its own, which a daemon may not.
            self._process = context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
            self._count = 0
        self._count += 1
        self.job, self._started = job, time.monotonic()
        self._pipe.send(job)

    def poll(self) -> tuple[Job, float, str] | None:
        """The job that ended, its seconds and its error ('' if none)."""
        if self.job is None:
            return None
        if not self._pipe.poll():
            if self._process.is_alive():
                return None
            error = f"the process ended with exit code {self._process.exitcode}"
            self._process = None
        else:
            try:
                error = self._pipe.recv()
            except EOFError:
                error = "the process ended without a word"
                self._process = None
        job, self.job = self.job, None
        return job, time.monotonic() - self._started, error

    def end(self) -> None:
        if self._process is not None:
            if self.job is not None:
                self._process.terminate()
            self._pipe.close()
            self._process.join()
        self._process = None


def _serve(pipe: Any) -> None:
    """The life of a worker: jobs from the pipe, one after another, until it is closed."""
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Stages in a process group that is there already leave Megatron's groups to each other.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    while True:
        try:
            pipe.send(_run(pipe.recv()))
        except (EOFError, OSError):  # the study ended or was stopped
            break
    os._exit(0)


def _run(job: Job) -> str:
    """Runs one job with its output in its log; returns its error, '' if there was none."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    if job.output.exists() and not job.done:  # left by a study that was stopped; jobs are short
        shutil.rmtree(job.output)
    with job.log.open("w") as log:
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            print(f"$ {job.command} {' '.join(job.argv)}", flush=True)
            _command(job.command)(list(job.argv))
            return "" if job.done else "the command ended without finishing its artifact"
        except BaseException as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def _command(name: str) -> Callable[[list[str]], None]:
    from megatron_erpd.commands import (
        export_checkpoint,
        held_out,
        import_checkpoint,
        on_policy,
        precompute,
        rollouts,
        train,
    )

    known: dict[str, Callable[[list[str]], None]] = {
        "prepare": _prepare,
        "import": import_checkpoint.import_checkpoint,
        "export": export_checkpoint.export_checkpoints,
        "sample": rollouts.sample,
        "evaluate": held_out.evaluate,
        "train-teacher": train.train_teacher,
        "train-on-policy": on_policy.train_on_policy,
        "precompute": precompute.precompute,
        "distill": train.distill,
    }
    return known[name]


def _prepare(argv: list[str]) -> None:
    """The quickstart's `prepare.py`, as an artifact."""
    from megatron_erpd.manifest import begin_artifact, finish_artifact

    quickstart = str(Path(__file__).parents[1] / "quickstart")
    if quickstart not in sys.path:
        sys.path.insert(0, quickstart)
    import prepare

    arguments = prepare.parse_arguments(argv)
    if arguments.output.is_dir():
        shutil.rmtree(arguments.output)
    begin_artifact(arguments.output, "prepare", {"argv": argv}, {})
    prepare.prepare(arguments)
    finish_artifact(arguments.output)
