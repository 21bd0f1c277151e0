"""A stage of a run: a command that a person could type, and what identifies the artifact that it writes.

A stage depends on the stages in whose folders its inputs lie; nothing else orders them. How a stage is spread over
processes (its layout) is part of its command, never of its identity.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from megatron_erpd.recipe.command_line import argv_of
from megatron_erpd.recipe.recipe import MegatronFlags
from megatron_erpd.recipe.requests import ModelRequest, Prepare, Report, Request
from megatron_erpd.settings import Layout, SlurmSettings

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package, and in a checkout `tools/` beside it."""

TOOLS = {
    "import": "import_checkpoint.py",
    "export": "export_checkpoint.py",
    "sample": "sample.py",
    "score": "score.py",
    "import-rollouts": "import_rollouts.py",
    "train-teacher": "train_teacher.py",
    "train-on-policy": "train_on_policy.py",
    "precompute": "precompute.py",
    "distill": "distill.py",
    "select": "select_teacher.py",
    "evaluate": "evaluate.py",
    "report": "report.py",
}
"""Command to its script in `tools/`."""

RUNS_MODEL = ("train-teacher", "train-on-policy", "precompute", "distill")
"""Commands that run data through a model in Megatron; they take a layout and Megatron's own flags."""


TRAINS = ("train-teacher", "train-on-policy", "distill")
"""Those of them that train."""


@dataclass(frozen=True)
class Stage:
    """One command of a run and the artifact that it writes."""

    name: str
    """`teacher`, `controls/NAME`; in later rounds `round-02/teacher`. Log and state are kept under it."""
    request: Request
    slurm: SlurmSettings = field(default_factory=SlurmSettings)

    @property
    def command(self) -> str:
        return self.request.command

    @property
    def output(self) -> Path:
        return self.request.artifact

    @cached_property
    def inputs(self) -> dict[str, Path]:
        return self.request.inputs

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The request's; a learning rate that isn't given is None (`Request.recorded`)."""
        return self.request.identity

    @property
    def layout(self) -> Layout:
        return self.request.layout if isinstance(self.request, ModelRequest) else Layout()

    @property
    def megatron(self) -> tuple[str, ...]:
        """Megatron's flags of the user's own."""
        return self.request.megatron if isinstance(self.request, ModelRequest) else ()

    @property
    def num_processes(self) -> int:
        return self.layout.num_processes

    @property
    def gpus_per_process(self) -> int:
        return self.request.gpus_per_process

    @property
    def num_gpus(self) -> int:
        """GPUs of all processes, where there are any."""
        return self.num_processes * self.gpus_per_process

    @property
    def is_tool(self) -> bool:
        """Whether the command writes its own manifest; for the others the runner does."""
        return not isinstance(self.request, Prepare | Report)

    def changed(self, **values: Any) -> Self:
        """The stage with other values of its request, as its layout."""
        return replace(self, request=self.request.model_copy(update=values))

    def argv(self) -> list[str]:
        """The command line to execute, with this interpreter."""
        if isinstance(self.request, Prepare):
            words = shlex.split(self.request.shown)
            return [sys.executable if words[0] in ("python", "python3") else words[0], *words[1:]]
        launcher = ["-m", "torch.distributed.run"] if self.num_processes > 1 else []
        return [sys.executable, *launcher, *self._program(), *self.flags()]

    def shown(self) -> str:
        """The command line as a person would type it."""
        if isinstance(self.request, Prepare):
            return self.request.shown
        return shlex.join(["torchrun" if self.num_processes > 1 else "python", *self._program(), *self.flags()])

    def _program(self) -> list[str]:
        """What to run, with the launcher's own flags before it."""
        program = self.program()
        return launcher_flags(self.num_processes, program) if self.num_processes > 1 else program

    def program(self) -> list[str]:
        """The script of the command, or `-m` and the module where there is no checkout."""
        script, here = PACKAGE_ROOT / "tools" / TOOLS[self.command], Path.cwd()
        if script.is_file():
            return [str(script.relative_to(here) if script.is_relative_to(here) else script)]
        return ["-m", "megatron_erpd.commands.cli", self.command]  # installed without a checkout

    def flags(self) -> list[str]:
        """The command's arguments; Megatron's flags come last, after `--`."""
        if isinstance(self.request, Report):
            return [str(self.request.root)]
        return argv_of(self.request) if self.is_tool else []


def dependencies(stage: Stage, stages: list[Stage]) -> list[str]:
    """Names of the stages in whose artifacts the inputs of `stage` lie."""
    paths = stage.inputs.values()
    return [s.name for s in stages if s is not stage and any(path.is_relative_to(s.output) for path in paths)]


def launcher_flags(num_processes: int, program: list[str]) -> list[str]:
    """Flags of torchrun before a program (a script, or `-m` and a module) that it is to start so many times.

    `--standalone` takes a free port for every launch, so that stages can run side by side. `--` keeps torchrun from
    reading the program's flags as abbreviations of its own (`--signal` of `--signals-to-handle`).
    """
    module = ["-m"] if program[0] == "-m" else []
    return ["--standalone", "--nproc-per-node", str(num_processes), *module, "--", *program[len(module) :]]


def flags_of(megatron: MegatronFlags) -> tuple[str, ...]:
    """Megatron flags as they stand on a command line."""
    argv: list[str] = []
    for name, value in megatron.items():
        flag = flag_name(name)
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += [flag, *(str(v) for v in values)]
    return tuple(argv)


def flag_name(key: str) -> str:
    """The flag of a key under `megatron:`."""
    return "--" + key.strip("-").replace("_", "-")
