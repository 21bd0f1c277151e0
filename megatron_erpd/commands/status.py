"""`megatron-erpd status`: where a run stands, on this machine and in SLURM's queue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_erpd.errors import StageError
from megatron_erpd.launch.attempts import last_attempt
from megatron_erpd.launch.display import Display, Row, State, findings_lines
from megatron_erpd.launch.local import log_file
from megatron_erpd.launch.processes import progress_of, tail_of
from megatron_erpd.manifest import read_manifest
from megatron_erpd.recipe import replaced
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.stages import Stage, dependencies
from megatron_erpd.recipe.verdicts import Verdict, judge_all
from megatron_erpd.slurm.jobs import slurm_folder


def status_table(recipe: Recipe) -> Display:
    """Where a run stands and what `run` would do, without running anything; files are compared by size alone."""
    stages = plan(recipe)
    verdicts = judge_all(stages, Artifacts(recipe.folder, checksums=False))
    display = Display(f"{recipe.name} in {recipe.folder}", [stage.name for stage in stages])
    for stage in stages:
        pending = [name for name in dependencies(stage, stages) if not verdicts[name].is_done]
        display.rows[stage.name] = _row(stage, verdicts[stage.name], pending, log_file(recipe.folder, stage))
    if slurm_folder(recipe.folder).is_dir():
        from megatron_erpd.slurm.status import show_jobs

        try:
            show_jobs(display, stages, recipe.folder)
        except StageError as error:
            display.say(f"the run's jobs are not shown: {error}")
    if all(display.rows[stage.name].state == "done" for stage in stages if stage.command == "evaluate"):
        display.notes = findings_lines(recipe.folder / "report" / "summary.json")
    display.notes = [*display.notes, *filter(None, [replaced.note(recipe.folder)])]
    return display


_STATES: dict[str, State] = {"done": "done", "undecided": "undecided", "again": "again", "resumed": "stopped"}
_ERROR_LINES = 3


def _row(stage: Stage, verdict: Verdict, pending: Sequence[str], log: Path) -> Row:
    """What is shown of a stage: that it is at work, or else the verdict on it, with how the last attempt ended."""
    last = last_attempt(log)
    if last and last.state == "running":
        progress = progress_of(stage.output, tail_of(log, last.log_start), last.started)
        note = f"{progress}, log in {log}" if progress else f"log in {log}"
        return Row("running", time.time() - last.started, note)
    if verdict.folder is not None:
        note = "" if verdict.folder == stage.output else "; ".join(verdict.because)
        return Row("done", read_manifest(verdict.folder).summary.get("seconds"), note)
    if verdict.word in ("again", "undecided"):
        return Row(_STATES[verdict.word], note=verdict.why)
    if last and last.state == "failed":
        lines = last.error.splitlines()
        more = ["..."] * (len(lines) > _ERROR_LINES)
        return Row("failed", last.seconds, "\n".join([*lines[:_ERROR_LINES], *more, f"log in {log}"]))
    waits = f"waits for {', '.join(pending)}" if pending else ""
    if verdict.word == "new" and last and last.state == "stopped":
        return Row("stopped", note=waits or f"starts over, log in {log}")
    return Row(_STATES.get(verdict.word, "waiting"), note=waits or "; ".join(verdict.because))
