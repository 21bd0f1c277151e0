"""Stages whose command is a small script, so that the runner can be watched without any model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_erpd.launch.display import Display
from megatron_erpd.launch.local import Runner
from megatron_erpd.launch.processes import Slots
from megatron_erpd.recipe.stages import Stage
from tests.unit.fake_request import FakeRequest

SCRIPT = Path(__file__).with_name("fake_stage.py")


@dataclass(frozen=True)
class FakeStage(Stage):
    """A stage that runs `fake_stage.py`; `behavior` is no part of its identity."""

    behavior: dict[str, Any] = field(default_factory=dict)

    def argv(self) -> list[str]:
        job = {
            "stage": self.command,
            "output": str(self.output),
            "settings": self.identity,
            "inputs": {name: str(path) for name, path in self.inputs.items()},
            **self.behavior,
        }
        return [sys.executable, str(SCRIPT), json.dumps(job)]


@dataclass
class Outcome:
    """What a run said, and how often each stage was started (over all runs in this folder)."""

    root: Path
    text: str
    states: dict[str, str]

    def starts(self, name: str) -> int:
        log = self.root / "logs" / f"{name}.log"
        return log.read_text().count("\nstarted") if log.is_file() else 0


@pytest.fixture
def make_stage(tmp_path: Path) -> Callable[..., FakeStage]:
    def make(
        name: str, inputs: list[str] | None = None, settings: dict[str, Any] | None = None, **behavior: Any
    ) -> FakeStage:
        return FakeStage(
            name=name,
            request=FakeRequest(
                command="train-teacher",
                reads={other: tmp_path / "run" / other for other in inputs or []},
                output=tmp_path / "run" / name,
                settings=settings or {},
            ),
            behavior=behavior,
        )

    return make


@pytest.fixture
def run_stages(tmp_path: Path) -> Callable[..., Outcome]:
    def run(stages: list[Stage], cores: int = 4, gpus: Sequence[str] = (), **options: Any) -> Outcome:
        root, output = tmp_path / "run", io.StringIO()
        root.mkdir(exist_ok=True)
        console = Console(file=output, width=500)
        display = Display("test", [stage.name for stage in stages], console)
        runner = Runner(root, stages, Slots(gpus=gpus, cores=cores), display, **{"grace": 5.0, **options})
        try:
            runner.run(stages)
        except BaseException as error:
            error.add_note(output.getvalue())
            raise
        return Outcome(root, output.getvalue(), {name: row.state for name, row in display.rows.items()})

    return run
