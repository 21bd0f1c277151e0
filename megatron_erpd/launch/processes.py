"""Stage processes on this machine: their GPUs and cores, start, progress and termination."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from megatron_erpd.errors import has_no_room
from megatron_erpd.launch.attempts import note_end, note_start
from megatron_erpd.launcher import set_threads, without_launcher
from megatron_erpd.manifest import METRICS
from megatron_erpd.progress import is_progress
from megatron_erpd.recipe.stages import PACKAGE_ROOT, Stage

ERROR_PREFIX = "error: "
"""How the tools begin the message of an `ErpdError`; its further lines are indented."""

GRACE_SECONDS = 40.0
"""From SIGTERM to SIGKILL. Torchrun itself gives its workers 30 seconds."""

_TAIL_BYTES = 64 * 1024


class Slots:
    """What processes share: the GPUs, each for one process, or the cores where there is no GPU."""

    def __init__(self, gpus: Sequence[str] | None = None, cores: int | None = None) -> None:
        """Asks the machine for what is not given."""
        self.gpus = list(visible_gpus() if gpus is None else gpus)
        self.cores = cores or len(os.sched_getaffinity(0))
        self._free = list(self.gpus)
        self._running = 0

    def fits(self, num_processes: int, besides: int = 0) -> bool:
        """Whether so many processes can start now, besides others that are about to.

        A stage that runs alone may have more processes than there are cores, but not more than there are GPUs.
        """
        if self.gpus:
            return num_processes + besides <= len(self._free)
        busy = self._running + besides
        return busy == 0 or busy + num_processes <= self.cores

    def take(self, num_processes: int) -> list[str]:
        """Counts the processes as running; returns the GPUs that are theirs."""
        self._running += num_processes
        taken, self._free = self._free[:num_processes], self._free[num_processes:]
        return taken

    def give_back(self, num_processes: int, gpus: Sequence[str]) -> None:
        self._running -= num_processes
        self._free += gpus

    @property
    def threads(self) -> int:
        """Threads for each running process, so that all together have a core each."""
        return max(1, self.cores // max(1, self._running))


def visible_gpus() -> list[str]:
    """The GPUs that a stage's process would see, as `CUDA_VISIBLE_DEVICES` names them.

    The variable may name what this machine hasn't (a shell's leftover, `NoDevFiles` of SLURM). CUDA reads its names
    from the left up to the first such one, so the devices that it finds are the first of them.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if names is None else [n.strip() for n in names.split(",")][:count]


class StageProcess:
    """A running stage: its process group and its log."""

    def __init__(
        self, stage: Stage, log: Path, gpus: Sequence[str], threads: int, keep_open: Sequence[int] = ()
    ) -> None:
        """Starts the stage's command.

        Args:
            stage: what to run.
            log: gets the command, its output and its errors, after what earlier attempts left there.
            gpus: the GPUs that it may use; empty: as this process.
            threads: threads of each of its processes.
            keep_open: file descriptors that it inherits (the run's lock, which so is held as long as any stage lives).
        """
        self.stage, self.log, self.gpus = stage, log, list(gpus)
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {stage.shown()}\n".encode())
            self.log_start = file.tell()
            self.process = subprocess.Popen(
                stage.argv(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(gpus, threads),
                start_new_session=True,
                pass_fds=tuple(keep_open),
            )
        self._attempt = note_start(log, self.process.pid, self.log_start)

    def poll(self) -> int | None:
        return self.process.poll()

    def note_end(self, state: Literal["done", "failed", "stopped"], error: str = "") -> None:
        """Keeps how it ended for `megatron-erpd status`."""
        note_end(self.log, self._attempt, state, error)

    def progress(self) -> str:
        """A few words on where the stage is: its last training step, or the last progress in its log."""
        return progress_of(self.stage.output, tail_of(self.log, self.log_start), time.time() - self.elapsed)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started


def tail_of(log: Path, start: int = 0) -> str:
    """The last 64 KiB that an attempt wrote, from byte `start` of the log on; carriage returns count as line ends."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - _TAIL_BYTES))
            return file.read().decode(errors="replace").replace("\r", "\n")
    except OSError as error:
        return f"{log} can't be read: {error.strerror}"


def progress_of(output: Path, log: str, started: float = 0.0) -> str:
    """A few words on where a stage is: its last training step since it was `started`, or the last progress in its log;
    empty when there is neither."""
    step = last_step(output / METRICS, newer_than=started)
    return step or next((line for line in map(_unranked, reversed(log.splitlines())) if is_progress(line)), "")


def stop(processes: Sequence[StageProcess], grace: float = GRACE_SECONDS) -> None:
    """Ends stages with all their descendants: SIGTERM, so that training can save a checkpoint, then SIGKILL.

    A second Ctrl-C during the wait kills at once.
    """
    alive = [p for p in processes if p.poll() is None]
    # A launcher's workers have sessions of their own: signals for its process group don't reach them.
    descendants = {pid for p in alive for pid in _descendants(p.process.pid)}
    for process in alive:
        _signal_group(process.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    with suppress(KeyboardInterrupt):
        while time.monotonic() < deadline and any(p.poll() is None for p in alive):
            time.sleep(0.05)
    for process in alive:
        _signal_group(process.process.pid, signal.SIGKILL)
    for pid in descendants:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in alive:
        process.process.wait()


def error_message(lines: Sequence[str]) -> str:
    """The last error that a tool reported in these lines of a log, with its indented further lines; empty if none."""
    starts = [i for i, line in enumerate(lines) if _unranked(line).startswith(ERROR_PREFIX)]
    if not starts:
        return ""
    message = [_unranked(lines[starts[-1]]).removeprefix(ERROR_PREFIX)]
    for line in lines[starts[-1] + 1 :]:
        if not _unranked(line).startswith("  "):
            break
        message.append(_unranked(line))
    return "\n".join(message)


def no_room_for_logs(log: Path) -> str:
    """Why a log may say nothing of an error: no room to write to it. Empty where there is some."""
    return f"{log.parent}: is on a full disk; make room and run it again" * has_no_room(log.parent)


def _unranked(line: str) -> str:
    """A line without the `[default0]:` that torchrun may put in front of it."""
    return re.sub(r"^\[(rank|default)\d+\]:", "", line)


def _environment(gpus: Sequence[str], threads: int) -> dict[str, str]:
    environment = without_launcher(os.environ)
    set_threads(environment, threads)
    # Threads that wait by spinning take the cores from whatever else runs: tens of times slower on a busy machine.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["PYTHONUNBUFFERED"] = "1"
    # A checkout works without having been installed.
    paths = [str(PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment


def last_step(path: Path, newer_than: float = 0.0) -> str:
    """The last line of a `metrics.jsonl` in a few words; empty when this attempt has not written one yet."""
    try:
        if path.stat().st_mtime < newer_than:
            return ""
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):  # the last line may be half written
        with suppress(json.JSONDecodeError, AttributeError):
            step = json.loads(line)
            # What doesn't train says in its log how far it is.
            return _words(step) if any(name.startswith(("stage1/", "stage2/")) for name in step) else ""
    return ""


def _words(step: dict[str, object]) -> str:
    words = [f"iteration {step['iteration']}"] if "iteration" in step else []
    for key, value in step.items():
        name = key.rpartition("/")[2]
        if isinstance(value, float) and name in ("loss", "forward_kl", "reverse_kl", "js", "kl_k3", "entropy"):
            words.append(f"{name} {value:.3g}")
    return ", ".join(words)


def _descendants(pid: int) -> set[int]:
    """Processes started, directly or not, by `pid`, as /proc has them."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold spaces; the parent is the second field after it.
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)
