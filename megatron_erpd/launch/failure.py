"""Finds the error that ended a stage in the output of its processes, not the errors of ranks that only lost a peer."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from megatron_erpd.launch.processes import error_message

_RANK = re.compile(r"^\[(?:rank|default)(\d+)\]: ?")
"""What torch and torchrun put before the lines of a rank."""
_TRACEBACK = "Traceback (most recent call last):"
_PLACE = re.compile(r'^\s+File "([^"]+)", line (\d+)(?:,? in (.+))?')
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(: .*|:)?$")
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_NO_END = ("Exception ignored in", "--- Logging error ---")
"""Before a traceback that ended nothing."""
_LAUNCHER = re.compile(r"^torch\.distributed\.elastic\.\S*(ChildFailedError|SignalException|RendezvousClosedError)")
_LAUNCHER_LOG = re.compile(r"^[EWI]\d{4} .*torch/distributed/(elastic|run|launcher)")
_FOLLOWS = re.compile(
    r"(connection (closed|reset|refused|was aborted)|broken pipe|remote (process exited|error|worker)|"
    r"nccl (communicator|watchdog)|timed out|timeout|peer)",
    re.IGNORECASE,
)
"""In errors of ranks that lost a peer."""
_USAGE = re.compile(r"^[\w./-]+( [\w-]+)*: error: (.+)")
"""How argparse ends, Megatron's too, after a line that begins with `usage:`."""
_SLURM = re.compile(r"^(srun|slurmstepd(-[\w.-]+)?): ")
"""What SLURM says of a step: that a task ended, and how. `srun: error: ...` has the form of argparse's errors."""
_CRASH = re.compile(r"^(Fatal Python error: .+|terminate called .+|free\(\): .+|.*: Assertion .* failed\.)")
_TABLE_ROW = re.compile(r"^\s+rank\s+: (\d+).*\n\s+exitcode\s+: -(\d+)", re.MULTILINE)
_JOB = "[job] "
"""What the program around a stage puts before its own lines in the stage's log."""
_MOST_LINES = 8
_TAIL_LINES = 20


@dataclass(frozen=True)
class _Raised:
    """An exception that a process printed: whose (None where no rank is named), at which line of the output."""

    rank: int | None
    at: int
    text: str
    place: str

    def describe(self) -> str:
        return f"{'' if self.rank is None else f'rank {self.rank}: '}{self.text}{self.place and f'\n  at {self.place}'}"

    @property
    def follows(self) -> bool:
        return _FOLLOWS.search(self.text) is not None


def why_it_failed(output: str) -> str:
    """The message of the tool's own error; or else the exception of the rank that failed first and where it was raised,
    the signal that ended one, or the last lines that are not the launcher's. Empty where nothing was printed.

    Args:
        output: of all processes, in the order in which they wrote it.
    """
    own = own_lines(output)
    return (
        error_message(own)
        or _usage(own)
        or _raised("\n".join(own))
        # With SLURM's lines, which may be all that is known.
        or "\n".join(_without_launcher(output.splitlines())[-_TAIL_LINES:])
    )


def own_lines(output: str) -> list[str]:
    """The lines without those of srun and slurmstepd, which may stand between any two of a message."""
    return [line for line in output.splitlines() if not _SLURM.match(line)]


def describe_code(code: int) -> str:
    """`exit code 1`, `exit code 134 (SIGABRT)`, as a shell (128 and more) or Python (below 0) tells of signals."""
    with suppress(ValueError):
        if code < 0 or code > 128:
            return f"exit code {code} ({signal.Signals(-code if code < 0 else code - 128).name})"
    return f"exit code {code}"


def _usage(lines: Sequence[str]) -> str:
    bare = [_RANK.sub("", line) for line in lines]
    start = next((number for number, line in enumerate(bare) if line.startswith("usage:")), len(bare))
    found = [match[2] for line in bare[start:] if (match := _USAGE.match(line))]
    return found[-1] if found else ""


def _raised(output: str) -> str:
    """The exception, crash or signal that the others follow from."""
    lines = output.splitlines()
    found = [raised for raised in _exceptions(lines) if not _LAUNCHER.match(raised.text)]
    causes = [raised for raised in found if not raised.follows]
    of_ranks = [raised for raised in causes if raised.rank is not None]
    if of_ranks:
        return min(of_ranks, key=lambda raised: raised.at).describe()
    if what := "\n".join(filter(None, [_signalled(output), _crash(lines)])):
        return what
    if causes:  # of several processes the first, of one the last, which ended it
        launched = "torch.distributed.elastic" in output or "torch/distributed/elastic" in output
        return causes[0 if launched else -1].describe()
    return min(found, key=lambda raised: raised.at).describe() if found else ""


def _exceptions(lines: Sequence[str]) -> Iterator[_Raised]:
    """All exceptions with their tracebacks, of each rank for itself, as ranks write at the same time; of a chain the
    last."""
    streams: dict[int | None, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        match = _RANK.match(line)
        streams.setdefault(int(match[1]) if match else None, []).append((number, _RANK.sub("", line)))
    for rank, stream in streams.items():
        yield from _of_one(rank, stream)


def _of_one(rank: int | None, stream: list[tuple[int, str]]) -> Iterator[_Raised]:
    latest: _Raised | None = None
    chained, position = False, 0
    while position < len(stream):
        number, line = stream[position]
        position += 1
        if line.startswith(_CHAINED):
            chained = True
        if line.strip() != _TRACEBACK:
            continue
        before = stream[position - 2][1] if position > 1 else ""
        place = ""
        while position < len(stream) and not _RAISED.match(stream[position][1]):
            match = _PLACE.match(stream[position][1])
            place = _place(match) if match else place
            if stream[position][1].strip() == _TRACEBACK:
                break
            position += 1
        if position == len(stream) or stream[position][1].strip() == _TRACEBACK or before.startswith(_NO_END):
            continue
        text = [stream[position][1].rstrip()]
        while (position := position + 1) < len(stream) and len(text) < _MOST_LINES:
            more = stream[position][1].rstrip()
            if not more.startswith((" ", "\t")):
                break
            text.append("  " + more.strip())
        if latest is not None and not chained:
            yield latest
        latest, chained = _Raised(rank, number, "\n".join(text), place), False
    if latest is not None:
        yield latest


def _place(match: re.Match[str]) -> str:
    return f"{match[1]}, line {match[2]}" + (f", in {match[3]}" if match[3] else "")


def _crash(lines: Sequence[str]) -> str:
    """The last crash outside of Python, with what it says of itself and where Python was."""
    bare = [_RANK.sub("", line) for line in lines]
    starts = [number for number, line in enumerate(bare) if _CRASH.match(line)]
    if not starts:
        return ""
    said = [bare[starts[-1]]]
    for line in bare[starts[-1] + 1 :]:
        match = _PLACE.match(line)
        if line.strip().startswith("what():"):
            said.append("  " + line.strip())
        if match:
            return "\n".join([*said, f"  at {_place(match)}"])
    return "\n".join(said)


def _signalled(output: str) -> str:
    """The rank that a signal ended, from the launcher's table. SIGTERM is how the launcher ends the others."""
    for rank, number in _TABLE_ROW.findall(output):
        if int(number) != signal.SIGTERM:
            name = signal.Signals(int(number)).name
            memory = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
            return f"rank {rank} was ended by {name}{memory}"
    return ""


def _without_launcher(lines: Sequence[str]) -> list[str]:
    """The lines without torchrun's own, which come last, and those of the job."""
    for number, line in enumerate(lines):
        if _LAUNCHER.match(line):
            start = max(i for i in range(number) if lines[i].strip() == _TRACEBACK) if number else 0
            lines = lines[:start]
            break
    return [line for line in lines if line.strip() and not _LAUNCHER_LOG.match(line) and not line.startswith(_JOB)]
