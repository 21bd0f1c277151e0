"""Whether a stage whose command has ended is done, and if not, why: one rule for `run` and the jobs of SLURM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.errors import StageError
from megatron_erpd.launch.failure import describe_code, own_lines, why_it_failed
from megatron_erpd.launch.processes import error_message, no_room_for_logs
from megatron_erpd.launch.watch import read_from
from megatron_erpd.manifest import finish_artifact
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.stages import Stage


@dataclass(frozen=True)
class Outcome:
    """Whether a stage is done, and what to say of it."""

    done: bool
    warning: str = ""
    """What to know of a stage that is done: its command failed all the same."""
    why: str = ""
    """Why it is not done: the error of the rank that failed, or what its artifact lacks."""
    own_error: bool = False
    """Whether `why` is an error that the stage itself has named."""


def judge(artifacts: Artifacts, stage: Stage, code: int, log: Path, start: int = 0) -> Outcome:
    """Judges a stage by its artifact: it is done when its manifest is whole and the one asked for, whatever the exit
    code. A command that knows nothing of manifests is done with exit code 0, and gets its manifest here.

    Args:
        code: exit code of its command.
        log: what its processes printed, from the byte `start` on.
    """
    problem = ""
    try:
        if not stage.is_tool and code == 0:
            finish_artifact(stage.output)
        if stage.is_tool or code == 0:
            artifacts.settle(stage)
        else:
            problem = f"its command ended with {describe_code(code)}"
    except StageError as error:
        problem = str(error)
    if not problem:
        late = f"its command ended with {describe_code(code)} after its artifact was complete, which counts; see {log}"
        return Outcome(True, warning=late if code else "")
    try:
        output = read_from(log, start)
    except OSError as error:
        return Outcome(False, why=f"{problem}\n{log} can't be read: {error.strerror}")
    own = error_message(own_lines(output))
    if code == 0:
        return Outcome(False, why="\n".join(filter(None, [problem, own])), own_error=bool(own))
    return Outcome(False, why=own or no_room_for_logs(log) or why_it_failed(output) or problem, own_error=bool(own))
