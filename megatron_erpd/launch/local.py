"""Running the stages of a recipe on this machine.

A stage runs when its inputs are there and its artifact is not: what is complete, with the same settings and inputs,
is kept; an interrupted stage is started again and resumes; an artifact with other settings or
inputs is put aside, the user is told what differs, and a new one is made. Stages that don't wait for each other run
side by side as far as GPUs (or, without any, cores) allow.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from megatron_erpd.errors import StageError
from megatron_erpd.files import write_text
from megatron_erpd.launch.display import Display, findings_lines, summary_table
from megatron_erpd.launch.failure import describe_code
from megatron_erpd.launch.interim_report import InterimReport
from megatron_erpd.launch.outcome import judge
from megatron_erpd.launch.preflight import check_recipe, recipe_warnings
from megatron_erpd.launch.processes import GRACE_SECONDS, Slots, StageProcess, stop
from megatron_erpd.locks import RUN_LOCK, Held, file_lock
from megatron_erpd.manifest import WARNINGS, read_manifest
from megatron_erpd.recipe import replaced
from megatron_erpd.recipe.artifacts import Artifacts, Assessment
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import RECIPE, Recipe
from megatron_erpd.recipe.stages import Stage, dependencies

_POLL_SECONDS = 0.1
_SHOW_SECONDS = 1.0


def run_recipe(
    recipe: Recipe,
    *,
    jobs: int | None = None,
    checksums: bool = True,
    discard: bool = False,
    console: Console | None = None,
) -> None:
    """Runs all stages of a recipe that are not done, then prints what came out.

    Args:
        recipe: what to run.
        jobs: most stages side by side; default: as many as the machine has room for.
        checksums: verify the content of finished artifacts, not only presence and size of their files.
        discard: in the end, when all is complete, remove what complete artifacts have replaced.
        console: where to show the run; default: standard output.

    Raises:
        RecipeError: the recipe can't run as it is, with everything that was found.
        StageError: another run has the folder, or a stage failed (with its own message).
    """
    console = console or Console()
    slots = Slots()
    stages = [stage.changed(verify_inputs=checksums) for stage in plan(recipe)]
    check_recipe(recipe, stages, slots, prepared=False)
    for line in recipe_warnings(recipe, stages, slots):
        console.print(Text(f"warning: {line}"), soft_wrap=True)
    root = recipe.folder
    with locked(root) as lock:
        write_text(root / RECIPE, recipe.of_run())
        with Display(f"{recipe.name} in {root}", [s.name for s in stages], console) as display:
            refresh = InterimReport(root)
            runner = Runner(
                root, stages, slots, display, jobs, checksums, keep_open=(lock.fileno(),), after_stage=refresh
            )
            prepare = [s for s in stages if s.command == "prepare"]
            if prepare:
                runner.run(prepare)
                check_recipe(recipe, stages, slots, prepared=True)  # what the command wrote can be checked only now
            runner.run(stages)
        for line in _discarded(root, stages) if discard else filter(None, [replaced.note(root)]):
            console.print(Text(line), soft_wrap=True)
    summary = root / "report" / "summary.json"
    if summary.is_file():
        console.print(summary_table(summary))
        for line in findings_lines(summary):
            console.print(Text(line), soft_wrap=True)
    console.print(f"report: {root / 'report' / 'index.html'}", highlight=False)


def _discarded(root: Path, stages: Sequence[Stage]) -> list[str]:
    """Removes what the stages have replaced, and says what that was."""
    found = replaced.discard(root, stages)
    if not found:
        return [f"{root}: nothing that was replaced is kept"]
    return [f"removed, as it was replaced: {replaced.describe(found)}", *(f"  {one.describe()}" for one in found)]


class Runner:
    """Runs stages in the order of their dependencies, several at a time."""

    def __init__(
        self,
        root: Path,
        stages: Sequence[Stage],
        slots: Slots,
        display: Display,
        jobs: int | None = None,
        checksums: bool = True,
        keep_open: Sequence[int] = (),
        grace: float = GRACE_SECONDS,
        after_stage: Callable[[Stage], str | None] | None = None,
    ) -> None:
        """`after_stage` is called when a stage has left its artifact; what it returns is shown."""
        self._after_stage = after_stage
        self.root, self.slots, self.display = root, slots, display
        self.jobs, self.keep_open, self.grace = jobs, keep_open, grace
        self.artifacts = Artifacts(root, checksums)
        self.waits_for = {stage.name: set(dependencies(stage, list(stages))) for stage in stages}
        self.assessed: dict[str, Assessment] = {}
        self._shown: dict[str, float] = {}
        self.done: set[str] = set()
        self.running: dict[str, StageProcess] = {}

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs those of `stages` that are not done; what they depend on is among them or done.

        Raises:
            StageError: a stage failed; those beside it were stopped and can go on later.
        """
        waiting = [stage for stage in stages if stage.name not in self.done]
        try:
            while waiting or self.running:
                waiting = self._without_kept(waiting)
                chosen = self._choose(waiting)
                waiting = [stage for stage in waiting if stage not in chosen]
                for stage, gpus in [(stage, self.slots.take(stage.num_gpus)) for stage in chosen]:
                    self._start(stage, gpus)
                self._watch()
                if self.running:
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            self._stop()
            raise

    def _unblocked(self, stages: Sequence[Stage]) -> list[Stage]:
        return [stage for stage in stages if self.waits_for[stage.name] <= self.done]

    def _without_kept(self, waiting: list[Stage]) -> list[Stage]:
        """Looks at what the stages that can run have left earlier; those that are complete are done."""
        while new := [stage for stage in self._unblocked(waiting) if stage.name not in self.assessed]:
            for stage in new:
                self.display.update(stage.name, "checking")
                # Anything that is not the artifact asked for is put aside.
                self.assessed[stage.name], lines = self.artifacts.ready(stage)
                for line in lines:
                    self.display.say(f"[{stage.name}] {line}")
                if self.assessed[stage.name].found == "complete":
                    self.done.add(stage.name)
                    self.display.update(stage.name, "kept", note=str(stage.output))
                else:
                    self.display.update(stage.name, "waiting")
            waiting = [stage for stage in waiting if stage.name not in self.done]
        return waiting

    def _choose(self, waiting: Sequence[Stage]) -> list[Stage]:
        """Stages that can start now, side by side, in the order of the plan."""
        chosen: list[Stage] = []
        for stage in self._unblocked(waiting):
            jobs = len(self.running) + len(chosen)
            gpus = sum(s.num_gpus for s in chosen)
            if (self.jobs is None or jobs < self.jobs) and self.slots.fits(stage.num_gpus, gpus):
                chosen.append(stage)
        return chosen

    def _start(self, stage: Stage, gpus: Sequence[str]) -> None:
        if not stage.is_tool:
            self.artifacts.begin(stage)
        log = log_file(self.root, stage)
        self.running[stage.name] = StageProcess(stage, log, gpus, self.slots.threads, self.keep_open)
        resumes = stage.is_tool and self.assessed[stage.name].found == "interrupted"
        again = "resumes from what is there, " if resumes else ""
        self.display.update(stage.name, "running", note=f"{again}log in {log}")

    def _watch(self) -> None:
        """Takes in what has ended, and shows how far the others are."""
        for name, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                if time.monotonic() - self._shown.get(name, process.started) > _SHOW_SECONDS:
                    self._shown[name] = time.monotonic()
                    self.display.update(name, "running", process.elapsed, process.progress())
                continue
            del self.running[name]
            self.slots.give_back(process.stage.num_gpus, process.gpus)
            outcome = judge(self.artifacts, process.stage, code, process.log, process.log_start)
            if not outcome.done:
                why = f"{outcome.why}\n({describe_code(code)}, log in {process.log})"
                process.note_end("failed", why)
                self.display.update(name, "failed", process.elapsed)
                raise StageError(f"{name} failed: {why}")
            if outcome.warning:
                self.display.say(f"[{name}] {outcome.warning}")
            process.note_end("done")
            self.done.add(name)
            self.display.update(name, "done", process.elapsed)
            for warning in read_manifest(process.stage.output).summary.get(WARNINGS, []):
                self.display.say(f"[{name}] warning: {warning}")
            if self._after_stage and (note := self._after_stage(process.stage)):
                self.display.say(f"[{name}] {note}")

    def _stop(self) -> None:
        """Ends what runs; it is taken up again by the next run."""
        if self.running:
            names = ", ".join(self.running)
            self.display.say(f"stopping {names} (what is saved can go on; Ctrl-C again kills)")
            stop(list(self.running.values()), self.grace)
        for name, process in self.running.items():
            process.note_end("stopped")
            self.display.update(name, "stopped", process.elapsed)
        self.running.clear()


@contextmanager
def locked(root: Path) -> Iterator[IO[str]]:
    """Keeps a second run out of a run's folder, and turns SIGTERM into what Ctrl-C does.

    Stages hold the lock too: those that outlive a killed run keep the next one out.

    Raises:
        StageError: another run has the folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(file_lock(root / RUN_LOCK))
        except Held as holder:
            raise StageError(
                f"{root}: {holder} is running this already (or stages that it started still are); wait for it, stop "
                "it, or give another --output"
            ) from None
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        yield file


def log_file(root: Path, stage: Stage) -> Path:
    """What a stage prints when it runs on this machine."""
    return root / "logs" / (stage.name.replace("/", "-") + ".log")
