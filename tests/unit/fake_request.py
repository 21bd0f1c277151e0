"""A request of any command, with inputs and settings as a test wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_erpd.recipe.requests import Prepare, Request
from megatron_erpd.recipe.stages import Stage


class FakeRequest(Request):
    """Stands for what a command is asked for; `settings` are its identity."""

    command: str
    reads: dict[str, Path] = {}
    settings: dict[str, Any] = {}
    gpus: int = 1

    @property
    def gpus_per_process(self) -> int:
        return self.gpus

    @property
    def inputs(self) -> dict[str, Path]:
        return self.reads

    @property
    def identity(self) -> dict[str, Any]:
        return self.settings


def fake_stage(
    name: str,
    command: str,
    output: Path,
    reads: dict[str, Path] | None = None,
    settings: dict[str, Any] | None = None,
) -> Stage:
    """A stage that is only looked at."""
    return Stage(name, FakeRequest(command=command, output=output, reads=reads or {}, settings=settings or {}))


def prepare_stage(name: str, line: str, output: Path) -> Stage:
    """A stage with a command line of the user's."""
    return Stage(name, Prepare(line=line, output=output))
