"""A stage of a run: a command that a person could type, and what identifies the artifact that it writes.

A stage depends on the stages in whose folders its inputs lie; nothing else orders them. How a stage is spread over
processes (its layout) is part of its command, never of its identity.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_erpd.recipe.recipe import MegatronFlags
from megatron_erpd.settings import Layout, SlurmSettings
from megatron_erpd.settings.arguments import VERIFY_INPUTS, settings_to_argv
from megatron_erpd.settings.learning_rates import chosen_rates

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
    command: str
    """The command of `megatron-erpd`, and the stage that the manifest names; `prepare` is the recipe's own command."""
    arguments: tuple[str, ...]
    inputs: dict[str, Path]
    output: Path
    settings: dict[str, Any]
    """All settings that decide the result, as the manifest keeps them; a learning rate that isn't given is None
    (`settings_of`)."""
    layout: Layout = field(default_factory=Layout)
    megatron: tuple[str, ...] = ()
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    gpus_per_process: int = 1
    """More than 1 where a sampler spreads the policy over several by itself."""
    verify_inputs: bool = True
    """Whether the command compares what it reads with its manifests first."""

    @property
    def num_processes(self) -> int:
        return self.layout.num_processes

    @property
    def num_gpus(self) -> int:
        """GPUs of all processes, where there are any."""
        return self.num_processes * self.gpus_per_process

    @property
    def is_tool(self) -> bool:
        """Whether the command writes its own manifest; for the others the runner does."""
        return self.command not in ("prepare", "report")

    def argv(self) -> list[str]:
        """The command line to execute, with this interpreter."""
        if self.command == "prepare":
            words = shlex.split(self.arguments[0])
            return [sys.executable if words[0] in ("python", "python3") else words[0], *words[1:]]
        launcher = ["-m", "torch.distributed.run"] if self.num_processes > 1 else []
        return [sys.executable, *launcher, *self._program(), *self.flags()]

    def shown(self) -> str:
        """The command line as a person would type it."""
        if self.command == "prepare":
            return self.arguments[0]
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
        """The command's flags: its own, the layout's, and Megatron's after `--`."""
        layout = settings_to_argv(self.layout) if self.command in RUNS_MODEL else []
        verify = [VERIFY_INPUTS] if self.verify_inputs and self.is_tool else []
        return [*self.arguments, *verify, *layout, *(["--", *self.megatron] if self.megatron else [])]


def settings_of(stage: Stage) -> dict[str, Any]:
    """The settings as the manifest will keep them: a training takes a learning rate that is not given by the size of
    its base, which must be there (it may be made by the run itself).

    Raises:
        CheckpointError: the size can't be told.
    """
    if stage.command not in TRAINS or "learning_rate" not in stage.settings:
        return stage.settings
    from megatron_erpd.checkpoint.mapping.parameter_count import parameters_of

    given = stage.settings["learning_rate"], stage.settings["warmup_fraction"]
    return {**stage.settings, **chosen_rates(*given, lambda: parameters_of(stage.inputs["base"] / "hf"))}


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
        flag = "--" + name.strip("-").replace("_", "-")
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += [flag, *(str(v) for v in values)]
    return tuple(argv)
