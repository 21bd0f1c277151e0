"""`megatron-erpd`: a whole run from a recipe, or any of its stages alone.

Nothing heavy is imported before the command is known.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_erpd import __version__
from megatron_erpd.errors import RecipeError
from megatron_erpd.files import check_output_file
from megatron_erpd.launch.program import LAUNCHED, run_command
from megatron_erpd.launcher import forget_launcher, launch, set_threads
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.requests import REQUESTS
from megatron_erpd.recipe.stages import Stage, launcher_flags
from megatron_erpd.settings import Layout
from megatron_erpd.settings.arguments import add_settings_arguments, settings_from_namespace


@dataclass(frozen=True)
class Command:
    """A subcommand: where its function is, and what the overview says of it."""

    module: str
    function: str
    summary: str
    example: str
    launches: Literal["", "layout", "processes"] = ""
    """What may ask for several processes: its layout, or a number of them."""

    def load(self) -> Callable[[list[str]], None]:
        return getattr(importlib.import_module(self.module), self.function)


_HERE = "megatron_erpd.commands.cli"


def _stage(
    command: str, module: str, function: str, summary: str, launches: Literal["", "layout", "processes"] = ""
) -> Command:
    """A command that makes an artifact."""
    example = REQUESTS[command].example.partition("\n")[0]
    return Command(f"megatron_erpd.commands.{module}", function, summary, f"{command} {example}", launches)


COMMANDS: dict[str, Command] = {
    "run": Command(_HERE, "run", "run a recipe, all stages that are not done", "run recipe.yaml --tensor-parallel 2"),
    "status": Command(_HERE, "status", "where a run stands", "status runs/quickstart"),
    "submit": Command(_HERE, "submit", "submit a run to SLURM, a job for each stage", "submit recipe.yaml --dry-run"),
    "cancel": Command(_HERE, "cancel", "end the SLURM jobs of a run", "cancel runs/quickstart"),
    "plan": Command(_HERE, "plan", "what a run will need: memory, time, disk", "plan recipe.yaml --tensor-parallel 2"),
    "report": Command("megatron_erpd.commands.report", "report", "write the report of a run", "report runs/quickstart"),
    "verify": Command(
        "megatron_erpd.commands.verify", "verify", "check that artifacts are whole", "verify runs/quickstart"
    ),
    "import": _stage(
        "import", "import_checkpoint", "import_checkpoint", "Hugging Face folder to Megatron checkpoint", "processes"
    ),
    "export": _stage(
        "export", "export_checkpoint", "export_checkpoints", "Megatron checkpoints to Hugging Face folders", "processes"
    ),
    "import-rollouts": _stage("import-rollouts", "rollouts", "import_rollouts", "rollouts of another program"),
    "sample": _stage("sample", "rollouts", "sample", "sample and score rollouts"),
    "score": _stage("score", "rollouts", "score", "score sampled rollouts again, with a verifier that changed"),
    "train-teacher": _stage(
        "train-teacher", "train", "train_teacher", "stage 1: teacher, unlearned policy, warm-up", "layout"
    ),
    "select": _stage("select", "held_out", "select", "choose among a teacher's checkpoints; strong or weak?"),
    "train-on-policy": _stage(
        "train-on-policy", "on_policy", "train_on_policy", "a baseline: GRPO on fresh rollouts", "layout"
    ),
    "precompute": _stage(
        "precompute", "precompute", "precompute", "log-probs and target distributions of fixed policies", "layout"
    ),
    "mismatch": Command(
        "megatron_erpd.commands.mismatch",
        "mismatch",
        "do sampler and training engine agree?",
        "mismatch --rollouts rollouts --log-probs log-probs",
    ),
    "distill": _stage("distill", "train", "distill", "stage 2: the student, under a trust region", "layout"),
    "evaluate": _stage("evaluate", "held_out", "evaluate", "accuracy and divergence on held-out prompts"),
}

_CONVERT = """usage: megatron-erpd convert import|export ...

Another name for `megatron-erpd import` (Hugging Face to Megatron) and `megatron-erpd export` (back).

example: megatron-erpd convert import --hf Qwen3-4B --output runs/mine/base
"""


def main(argv: list[str] | None = None) -> None:
    """The program. `--version` and `--help` aside, the first argument is a command with arguments of its own."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["convert"]:
        argv = argv[1:]
        if argv[:1] not in (["import"], ["export"]):
            print(_CONVERT, file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
            sys.exit(0 if argv[:1] in (["-h"], ["--help"]) else 2)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        sys.exit(0)
    if argv[0] == "--version":
        print(__version__)
        sys.exit(0)
    if argv[0] not in COMMANDS:
        print(f"error: {argv[0]} is no command; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run_command(lambda rest: _dispatch(argv[0], rest), argv[1:])


def overview() -> str:
    """What `megatron-erpd --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [
        "usage: megatron-erpd COMMAND ...",
        "",
        "Extreme Region Policy Distillation on Megatron-Core.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<{width}}  {command.summary}", f"  {'':<{width}}    megatron-erpd {command.example}"]
    return "\n".join(
        [
            *lines,
            "",
            "`megatron-erpd COMMAND --help` tells all of a command's flags. `--debug` shows the traceback of an error.",
            "Megatron's own flags follow after `--`.",
        ]
    )


def run(argv: list[str]) -> None:
    """Runs every stage of a recipe that is not done, and prints what came out."""
    parser = _recipe_parser(
        "run",
        f"{run.__doc__} Started again, it goes on where it was; what has changed in the recipe is made anew, with all "
        "that depends on it.",
        "run recipe.yaml --tensor-parallel 2 --set student.epochs=4 --dry-run",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would become of each stage, and why, the commands of all, and what is wrong; run nothing",
    )
    parser.add_argument("--jobs", type=int, help="most stages side by side (default: as there are GPUs or cores)")
    parser.add_argument(
        "--discard",
        action="store_true",
        help="in the end remove what complete artifacts have replaced, and say what that was; without it rollouts, "
        "rewards and trained policies that others have replaced stay in RUN/replaced",
    )
    parser.add_argument(
        "--quick-check", action="store_true", help="check finished artifacts by the sizes of their files alone"
    )
    given = parser.parse_args(argv)
    started_in = os.getcwd()
    recipe = _recipe(given)
    if given.dry_run:
        from megatron_erpd.launch.preflight import check_recipe, recipe_warnings
        from megatron_erpd.launch.processes import Slots
        from megatron_erpd.recipe import planner
        from megatron_erpd.recipe.replaced import list_replaced

        stages = planner.plan(recipe)
        if recipe.directory and recipe.directory != started_in:
            print(f"# in {recipe.directory}:\n")
        _print_verdicts(recipe, stages, checksums=not given.quick_check)
        if given.discard:
            for one in list_replaced(recipe.folder, stages):
                print(f"# would be removed when all is complete: {one.describe()}")
        for stage in stages:
            print(f"# {stage.name}\n{stage.shown()}\n")
        slots = Slots()
        check_recipe(recipe, stages, slots)
        for line in recipe_warnings(recipe, stages, slots):
            print(f"warning: {line}")
        return
    from megatron_erpd.launch.local import run_recipe
    from megatron_erpd.slurm.submit import refuse_queued_jobs

    refuse_queued_jobs(recipe.folder)
    try:
        run_recipe(recipe, jobs=given.jobs, checksums=not given.quick_check, discard=given.discard)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)


def submit(argv: list[str]) -> None:
    """Submits a recipe to SLURM: a job for each stage that is not done, each after those that it needs."""
    parser = _recipe_parser(
        "submit",
        f"{submit.__doc__} Submitted again, it leaves alone what is queued or running and submits what has failed. The "
        "recipe's section `slurm` (and `stages.NAME.slurm`) says what the jobs ask for; docs/slurm.md lists its keys. "
        "The scripts are RUN/slurm/STAGE.sbatch, the logs RUN/logs/slurm/STAGE-JOB-RESTART.log; `megatron-erpd status "
        "RUN` shows the jobs, `megatron-erpd cancel RUN` ends them.",
        "submit recipe.yaml --set slurm.partition=h100 --set slurm.gpus_per_node=8 --dry-run",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would become of each stage, and why, the jobs' scripts, and what is wrong; submit nothing",
    )
    parser.add_argument(
        "--quick-check", action="store_true", help="check finished artifacts by the sizes of their files alone"
    )
    given = parser.parse_args(argv)
    recipe = _recipe(given)
    from megatron_erpd.slurm import submit as slurm_submit

    if given.dry_run:
        _print_verdicts(recipe, slurm_submit.plan(recipe), checksums=not given.quick_check)
        for name, script in slurm_submit.scripts(recipe).items():
            print(f"# ---- {recipe.folder / 'slurm' / name}.sbatch\n{script}")
        slurm_submit.check(recipe)
        return
    slurm_submit.submit(recipe, checksums=not given.quick_check)
    print(f"`megatron-erpd status {recipe.folder}` shows how far it is")


def cancel(argv: list[str]) -> None:
    """Ends the SLURM jobs that `megatron-erpd submit` submitted for a run, and no others. What is saved stays."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd cancel", description=cancel.__doc__, epilog="example: megatron-erpd cancel runs/quickstart"
    )
    parser.add_argument("run", type=Path, help="the run's folder (or its recipe)")
    given = parser.parse_args(argv)
    from megatron_erpd.slurm.submit import cancel as cancel_jobs

    cancel_jobs(_entered(load_recipe(given.run)).folder)


def plan(argv: list[str]) -> None:
    """Shows what a recipe will need before anything runs: stages, memory of each process, time, teacher cache, disk."""
    parser = _recipe_parser(
        "plan",
        f"{plan.__doc__} Takes what `run` takes; nothing is run or changed.",
        "plan recipe.yaml --tensor-parallel 8 --gpu h100 --gpus 64 --json plan.json",
    )
    parser.add_argument(
        "--teraflops-per-device",
        type=float,
        metavar="TERAFLOPS",
        help="what a device reaches, for times and the cache's rates (default: what a finished training of the run "
        "measured, else 400, an H100 in bf16 at 40%% of its peak)",
    )
    parser.add_argument("--gpu", metavar="KIND|GIB", help="say what fits: h100, h200, a100-80, b200 or the GiB of one")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="how many there are (default: as many as the largest stage takes)"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="of the longest rollout (default: counted in the rollouts, else what the recipe allows)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(argv)
    json_file = given.json and given.json.absolute()
    if json_file:
        check_output_file(given.json)
    recipe = _recipe(given)
    from megatron_erpd.plan.gpu_fit import parse_gpus
    from megatron_erpd.plan.resources import estimate
    from megatron_erpd.plan.tables import describe, show
    from megatron_erpd.recipe.planner import plan as stages_of

    if given.gpus is not None and given.gpu is None:
        raise RecipeError("--gpus: says how many, --gpu of which kind; give --gpu h100, say")
    gpus = None
    if given.gpu is not None:
        count = max(stage.num_gpus for stage in stages_of(recipe)) if given.gpus is None else given.gpus
        gpus = parse_gpus(given.gpu, count)
    resources = estimate(recipe, given.teraflops_per_device, gpus, given.sequence_length)
    show(resources)
    print(describe(resources))
    if json_file:
        try:
            json_file.write_text(json.dumps(resources.to_json(), indent=1) + "\n")
        except OSError as error:
            raise RecipeError(f"--json {given.json}: can't be written ({error.strerror}); give another file") from None
        print(f"wrote {given.json}")


def status(argv: list[str]) -> None:
    """Shows where a run stands; of one that was submitted to SLURM, its jobs too. Nothing is run or changed."""
    parser = _recipe_parser(
        "status",
        f"{status.__doc__} Takes what `run` takes, and tells what it would do.",
        "status runs/quickstart --set cache.delta=0.2",
    )
    given = parser.parse_args(argv)
    from megatron_erpd.commands.status import status_table

    status_table(_recipe(given)).show()


def _recipe_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The flags of the commands that take a recipe."""
    parser = argparse.ArgumentParser(
        prog=f"megatron-erpd {name}",
        description=description,
        epilog=f"example: megatron-erpd {example}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", type=Path, help="the recipe, or the folder of a run: that run, however it is called now"
    )
    parser.add_argument(
        "--output", help="the run's folder (default: the one that was given, the recipe's `output`, or runs/NAME)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a value over the recipe's; repeatable"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings_arguments(parser, Layout, "layout, over the recipe's (a layout given for one stage still counts)")
    return parser


def _recipe(given: argparse.Namespace) -> Recipe:
    """The recipe that the flags of `_recipe_parser` name and change."""
    layout = settings_from_namespace(given, Layout)
    fields = {name: getattr(layout, name) for name in layout.model_fields_set}
    return _entered(load_recipe(given.recipe, given.set, fields, given.output))


def _print_verdicts(recipe: Recipe, stages: Sequence[Stage], *, checksums: bool) -> None:
    """What `run` and `submit` would do with each stage, as comments above the commands."""
    from megatron_erpd.recipe.artifacts import Artifacts
    from megatron_erpd.recipe.verdicts import judge_all

    for name, verdict in judge_all(stages, Artifacts(recipe.folder, checksums)).items():
        print(f"# {name}: {verdict.describe()}")
    print()


def _entered(recipe: Recipe) -> Recipe:
    """Makes the directory where a recipe's relative paths begin the current one, of this process and its stages."""
    if recipe.directory:
        os.chdir(recipe.directory)
    return recipe


def _dispatch(name: str, argv: list[str]) -> str | None:
    """Runs a command here, or in as many processes as its flags ask for: `LAUNCHED` then."""
    command = COMMANDS[name]
    asks_for_help = "-h" in argv or "--help" in argv
    if command.launches and not asks_for_help and launch().world_size == 1:
        processes = _num_processes(argv, command.launches)
        if processes > 1:
            forget_launcher(os.environ)
            set_threads(os.environ, max(1, (os.cpu_count() or 1) // processes))
            _launch(launcher_flags(processes, ["-m", "megatron_erpd.commands.cli", name, *argv]))
            return LAUNCHED
    command.load()(argv)
    return None


def _launch(flags: list[str]) -> None:
    """torchrun. A failed rank has said what is wrong on stderr; torchrun's own table and traceback add nothing."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.main(flags)
    except ChildFailedError as error:
        sys.exit(max(failure.exitcode for failure in error.failures.values()))


def _num_processes(argv: list[str], asked_by: str) -> int:
    """Processes that a command's arguments ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own = argv[: argv.index("--")] if "--" in argv else argv
    if asked_by == "processes":
        parser.add_argument("--processes", type=int, default=1)
        return int(parser.parse_known_args(own)[0].processes)
    add_settings_arguments(parser, Layout, "layout")
    return settings_from_namespace(parser.parse_known_args(own)[0], Layout).num_processes


if __name__ == "__main__":
    main()
