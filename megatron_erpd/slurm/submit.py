"""Submits a run to SLURM: stages that are done, queued or running are skipped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError
from megatron_erpd.files import write_json, write_text
from megatron_erpd.launch.preflight import check_recipe, recipe_warnings
from megatron_erpd.locks import RUN_LOCK, Held, NodeLock, file_lock
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import RECIPE, Recipe
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.recipe.verdicts import judge_all
from megatron_erpd.slurm.jobs import Job, jobs_of, slurm_folder
from megatron_erpd.slurm.queue import queued, slurm
from megatron_erpd.slurm.script import render
from megatron_erpd.units import counted

Say = Callable[[str], None]


def scripts(recipe: Recipe) -> dict[str, str]:
    """The sbatch files of all jobs of a run by the names of the jobs, done or not; nothing is written."""
    return {job.name: render(job, recipe.name, recipe.folder) for job in jobs_of(plan(recipe))}


def check(recipe: Recipe, say: Say = print) -> None:
    """Raises `RecipeError` where `submit` would refuse the recipe; `say` gets its warnings."""
    _check(recipe, plan(recipe), say)


def _check(recipe: Recipe, stages: Sequence[Stage], say: Say) -> None:
    from megatron_erpd.plan.saves import save_warnings

    check_recipe(recipe, stages, None)
    for line in (*recipe_warnings(recipe, stages, None), *save_warnings(stages)):
        say(f"warning: {line}")


def submit(recipe: Recipe, *, checksums: bool = True, say: Say = print) -> dict[str, str]:
    """Submits what is neither done nor in the queue; returns the new jobs' numbers by their names.

    Args:
        checksums: verify the content of finished artifacts, not only presence and size of their files.
        say: gets a line for each job.

    Raises:
        RecipeError: the recipe can't run as it is.
        StageError: another process is submitting or running this, jobs with other settings are in the queue, or SLURM
            refuses a job (those before it are in the queue then, and are left alone by the next try).
    """
    stages, root = [stage.changed(verify_inputs=checksums) for stage in plan(recipe)], recipe.folder
    _check(recipe, stages, say)
    return submit_stages(recipe.name, root, stages, recipe.of_run(), checksums=checksums, say=say)


def submit_stages(
    name: str, root: Path, stages: Sequence[Stage], recipe: str, *, checksums: bool = True, say: Say = print
) -> dict[str, str]:
    """As `submit`, with the stages given. `recipe` is kept in the run's folder."""
    jobs = jobs_of(stages)
    with submitting(root):
        verdicts = judge_all(stages, Artifacts(root, checksums))
        left = {name for name, verdict in verdicts.items() if not verdict.is_done}
        jobs = [job for job in jobs if job.stage.name in left]
        for stage_name, verdict in verdicts.items():
            if verdict.word in ("done", "undecided", "again"):
                say(f"{stage_name}: {verdict.describe()}")
        submitted = read_submitted(root)
        if not submitted:  # of a copied run, locks are those of the original's jobs
            shutil.rmtree(slurm_folder(root) / "locks", ignore_errors=True)
        known = queued()
        live = {job.name: submitted[job.name]["id"] for job in jobs if submitted.get(job.name, {}).get("id") in known}
        _refuse_others(root, jobs, live)
        new = [job for job in jobs if job.name not in live]
        (root / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
        write_text(root / RECIPE, recipe)
        for job in new:
            write_text(_script(root, job.name), render(job, name, root))
            write_json(record_file(root, job.name), job.record())
        numbers = dict(live)
        for job in jobs:
            if job.name in live:
                say(f"{job.name}: job {live[job.name]} is in the queue, left alone")
                continue
            needs = [numbers[need] for need in job.needs if need in numbers]
            numbers[job.name] = _sbatch(root, job.name, needs)
            submitted[job.name] = {
                "id": numbers[job.name],
                "submitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            write_json(_submitted_file(root), {"run": _place(root), "jobs": submitted})
            after = f" after {', '.join(needs)}" if needs else ""
            say(f"{job.name}: job {numbers[job.name]}{after}")
        say(
            f"{counted(len(new), 'job')} submitted, {len(live)} in the queue already, {len(stages) - len(left)} of "
            f"{counted(len(stages), 'stage')} done"
        )
    return {job.name: numbers[job.name] for job in new}


def read_submitted(root: Path) -> dict[str, dict[str, Any]]:
    """What was submitted last for each job, by its name: `id` and the time; empty where nothing was.

    Jobs that a copied folder has from the original are the original's.
    """
    path = _submitted_file(root)
    try:
        record = json.loads(path.read_text())
        return {} if _is_copied(record, root) else record["jobs"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StageError(f"{path}: can't be read ({error}); delete it when no job of this run is queued") from None


def _place(root: Path) -> dict[str, Any]:
    """What tells a run's folder from a copy of it: the one stays when it is renamed, the other when it is restored."""
    return {"folder": str(root.resolve()), "inode": root.stat().st_ino}


def _is_copied(record: dict[str, Any], root: Path) -> bool:
    return "run" in record and not (record["run"].items() & _place(root).items())


def live_jobs(root: Path) -> dict[str, str]:
    """The jobs of a run that have not ended: their numbers by their names."""
    submitted = read_submitted(root)
    known = queued() if submitted else {}
    return {name: entry["id"] for name, entry in submitted.items() if entry["id"] in known}


def refuse_queued_jobs(root: Path) -> None:
    """Jobs that wait in SLURM's queue hold no lock, and those on other nodes may hold one that is not seen here."""
    if not slurm_folder(root).is_dir():
        return
    for name, number in live_jobs(root).items():
        raise StageError(
            f"{root}: job {number} of {name!r} is in the queue of SLURM; wait for it, or `megatron-erpd cancel {root}`"
        )


def cancel(root: Path, say: Say = print) -> None:
    """Ends the jobs that were submitted for this run and have not ended, and no others."""
    live = live_jobs(root)
    if not live:
        say(f"{root}: no job of this run is queued or running{_of_another(root)}")
        return
    slurm("scancel", *live.values())
    for name, number in live.items():
        say(f"{name}: job {number} cancelled")
    say(
        f"{counted(len(live), 'job')} cancelled; saved checkpoints stay, and `megatron-erpd submit {root}` resumes "
        "from them"
    )


def _of_another(root: Path) -> str:
    """Whose jobs the folder names, when it is a copy."""
    path = _submitted_file(root)
    record = json.loads(path.read_text()) if path.is_file() else {}
    return f"; {path} is a copy, its jobs are those of {record['run']['folder']}" if _is_copied(record, root) else ""


def record_file(root: Path, job: str) -> Path:
    """What a job is told of its stage (`JobRecord`)."""
    return slurm_folder(root) / f"{job}.json"


@contextmanager
def submitting(root: Path) -> Iterator[None]:
    """One submission at a time, and none beside a `megatron-erpd run`.

    One that a killed submission left behind on this host is taken over; on another host nobody here can tell.

    Raises:
        StageError: another submission, or a run, has the folder.
    """
    path = slurm_folder(root) / ".submitting"

    def is_gone(holder: dict[str, Any], waited: float) -> bool:
        if holder["host"] == socket.gethostname() and not Path(f"/proc/{holder['process']}").is_dir():
            return True
        raise StageError(
            f"{path.parent}: process {holder['process']} on {holder['host']} is submitting this now; wait for it, or "
            f"delete {path} when it is gone"
        )

    lock = NodeLock(path, {}, is_gone)
    lock.acquire()
    try:
        with shared_with_jobs(root):
            yield
    finally:
        lock.release()


@contextmanager
def shared_with_jobs(root: Path) -> Iterator[None]:
    """Holds the run's lock as jobs do: beside each other, and not beside `megatron-erpd run`, which holds it alone."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(root / RUN_LOCK, shared=True))
        except Held as holder:
            raise StageError(f"{root}: {holder} runs this with `megatron-erpd run`; wait for it or stop it") from None
        yield


def _refuse_others(root: Path, jobs: Sequence[Job], live: dict[str, str]) -> None:
    """A job in the queue does what it was submitted for: with other settings, it is in the way."""
    changed = []
    for job in jobs:
        if job.name in live:
            before = _entries(record_file(root, job.name).read_text(), root)
            now = _entries(json.dumps(job.record()), root)
            if lines := [key for key in now if before.get(key) != now[key]]:
                changed.append(f"\n  {job.name}, job {live[job.name]}: {', '.join(lines)}")
    if changed:
        raise StageError(
            f"{root}: jobs in the queue were submitted with other settings than these; `megatron-erpd cancel {root}`, "
            f"then submit again:{''.join(changed)}"
        )


def _entries(text: str, root: Path) -> dict[str, Any]:
    """What a record says, without the run's folder, which was maybe submitted from another directory."""
    record = json.loads(text.replace(str(root.absolute()), "RUN").replace(os.path.relpath(root), "RUN"))
    return {**record, **record.pop("request", {})}


def _sbatch(root: Path, job: str, needs: Sequence[str]) -> str:
    """Submits a job's script; returns its number."""
    # A job whose needs have failed could never start: SLURM then cancels it, and with it those that wait for it.
    after = [f"--dependency=afterok:{':'.join(needs)}", "--kill-on-invalid-dep=yes"] if needs else []
    try:
        return slurm("sbatch", "--parsable", *after, str(_script(root, job))).strip().partition(";")[0]
    except StageError as error:
        raise StageError(
            f"{job}: {error}\nthe jobs listed before it are in the queue: correct the recipe's slurm section and "
            f"submit again, or `megatron-erpd cancel {root}`"
        ) from None


def _script(root: Path, job: str) -> Path:
    return slurm_folder(root) / f"{job}.sbatch"


def _submitted_file(root: Path) -> Path:
    return slurm_folder(root) / "jobs.json"
