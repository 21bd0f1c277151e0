"""Runs whose stages are small scripts, submitted for real."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_erpd.launch.display import Display
from megatron_erpd.recipe.requests import Precompute
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings import Layout, PrecomputeSettings, SlurmSettings
from megatron_erpd.slurm.queue import queued, slurm, state_of
from megatron_erpd.slurm.status import show_jobs
from megatron_erpd.slurm.submit import cancel, read_submitted, submit_stages

SCRIPT = Path(__file__).with_name("fake_stage.py")


@dataclass(frozen=True)
class FakeStage(Stage):
    """A stage that runs `fake_stage.py`; `behavior` is no part of its identity."""

    behavior: dict[str, Any] = field(default_factory=dict)

    def program(self) -> list[str]:
        return [str(SCRIPT)]

    def flags(self) -> list[str]:
        inputs = {name: str(path) for name, path in self.inputs.items()}
        settings = self.request.recorded.identity
        return [json.dumps({"output": str(self.output), "settings": settings, "inputs": inputs, **self.behavior})]


class Run:
    """A run's folder and what was submitted for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[str] = []

    def stage(self, name: str, needs: tuple[str, ...] = (), processes: int = 1, **behavior: Any) -> FakeStage:
        """A stage, with `slurm` and `settings` besides what `fake_stage.py` knows; no training, for which the program
        around it would import torch first."""
        slurm_settings = {"signal_seconds": 20, "requeues": 3, **behavior.pop("slurm", {})}
        settings = PrecomputeSettings(**behavior.pop("settings", {}))
        base, rollouts = [*(self.root / other for other in needs), SCRIPT, SCRIPT][:2]
        return FakeStage(
            name=name,
            request=Precompute(
                base=base,
                rollouts=rollouts,
                settings=settings,
                output=self.root / name,
                layout=Layout(data_parallel=processes),
            ),
            slurm=SlurmSettings(**slurm_settings),
            behavior=behavior,
        )

    def submit(self, *stages: Stage) -> dict[str, str]:
        return submit_stages("test", self.root, stages, "name: test\n", say=self.said.append)

    def cancel(self) -> None:
        cancel(self.root, say=self.said.append)

    def number(self, name: str) -> str:
        return str(read_submitted(self.root)[name]["id"])

    def state(self, name: str) -> str:
        return state_of(self.number(name))

    def ends(self, name: str, seconds: float = 120) -> str:
        """Waits for the end of a job and returns its state."""
        # Each look starts squeue, which takes longer than the tenth of a second of other waits.
        self.until(lambda: self.number(name) not in queued(), seconds, f"{name} ends", every=0.5)
        return self.state(name)

    def starts(self, name: str, restart: int = 0) -> None:
        """Waits until a job's stage runs, in that start."""
        self.until(lambda: "started" in self.log(name, restart), 180, f"{name} starts")

    def until(self, condition: Callable[[], bool], seconds: float, what: str, every: float = 0.1) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds} s until {what}\n{slurm('squeue')}\n{self.logs()}")
            time.sleep(every)

    def shown(self, *stages: Stage) -> dict[str, str]:
        """State and note of each stage, as `megatron-erpd status` shows them."""
        display = Display("test", [stage.name for stage in stages])
        show_jobs(display, stages, self.root)
        return {name: f"{row.state}: {row.note}" for name, row in display.rows.items()}

    def log(self, name: str, restart: int = 0, number: str = "") -> str:
        """What a job's start has said; `number` is 17_2 for one of an array."""
        path = self.root / "logs" / "slurm" / f"{name}-{number or self.number(name)}-{restart}.log"
        return path.read_text() if path.is_file() else ""

    def logs(self) -> str:
        """The ends of all logs, to be shown."""
        logs = sorted((self.root / "logs/slurm").glob("*"))
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in logs)

    def signal(self, name: str) -> None:
        """What SLURM sends before a job's time limit."""
        slurm("scancel", "--batch", "--signal=USR1", self.number(name))

    def result(self, name: str) -> str:
        return (self.root / name / "result").read_text()


def processes_of(text: str) -> list[int]:
    """Processes with this text in their command line."""
    listed = subprocess.run(["pgrep", "-f", text], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]
