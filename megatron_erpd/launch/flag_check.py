"""Whether Megatron takes the flags of a run's stages, before any of them starts.

A program of its own (`python -m megatron_erpd.launch.flag_check`): Megatron's parser comes with all of Megatron,
which the process that only watches stages need not import. In, on standard input, and out, as JSON: see `check_flags`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_erpd.data.batch import Batch
from megatron_erpd.errors import CheckpointError, LayoutError, RecipeError, StageError, first_line
from megatron_erpd.launcher import without_launcher
from megatron_erpd.model.arguments import MEGATRON_DEFAULTS, megatron_argv, own_flags
from megatron_erpd.model.megatron_flags import flag_problems
from megatron_erpd.model.runtime import PRECOMPUTE_FLAGS, untrained_flags
from megatron_erpd.recipe.requests import REQUESTS, ModelRequest, TrainingRequest
from megatron_erpd.settings import Layout, OnPolicySettings, OptimizerSettings
from megatron_erpd.training.run import TrainingRun

_SOME_STEPS, _SOME_LENGTH, _SOME_PARAMETERS = 1000, 2, 10**9
"""What is known only when the stage has its data; no flag of a user's depends on it."""
_NUMBER = re.compile(r" \(it is [^)]*\)")
_SECONDS = 300.0


@dataclass(frozen=True)
class Flags:
    """The Megatron flags of one stage.

    Attributes:
        name: of the stage.
        command, request: what the stage is asked for (`ModelRequest`), with the user's own flags.
        hf: folder with the model's `config.json`, where there is one already.
        runs_here: Megatron is to judge them together, on what this machine can run.
    """

    name: str
    command: str
    request: dict[str, Any]
    hf: str | None
    runs_here: bool


def check_flags(asked: Sequence[Flags]) -> dict[str, list[str]]:
    """What is wrong with the flags of stages, by the stages' names; those without a problem are left out.

    Takes the time of importing Megatron, once.

    Raises:
        StageError: Megatron can't be imported.
    """
    if not asked:
        return {}
    # A checkout works without having been installed.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([asdict(flags) for flags in asked]),
        capture_output=True,
        text=True,
        env={**without_launcher(os.environ), "PYTHONPATH": os.pathsep.join(paths)},
        timeout=_SECONDS,
    )
    if done.returncode != 0:
        raise StageError(f"Megatron's parser can't be asked: {(done.stderr.strip().splitlines() or ['it ended'])[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    """The program."""
    out = sys.stdout
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        found = {flags.name: _problems(flags) for flags in (Flags(**item) for item in json.load(sys.stdin))}
    json.dump({name: problems for name, problems in found.items() if problems}, out)


def _problems(asked: Flags) -> list[str]:
    request = REQUESTS[asked.command].model_validate(asked.request)
    assert isinstance(request, ModelRequest)
    flags, layout = list(request.megatron), request.layout
    problems = flag_problems(flags)
    if problems or asked.hf is None:
        return problems
    try:
        fixed = own_flags(Path(asked.hf), layout, _run_flags(request, layout), flags, _SOME_LENGTH)
    except (CheckpointError, LayoutError):
        return []  # of the model or the layout, which are checked for themselves
    except RecipeError as error:
        return [_NUMBER.sub("", str(error))]
    return [why] if asked.runs_here and (why := _refusal(megatron_argv(fixed, flags, layout), layout)) else []


def _refusal(argv: Sequence[str], layout: Layout) -> str | None:
    """Why Megatron refuses a command line, as it would in every process of the layout; nothing is set up."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    os.environ.update({"RANK": "0", "WORLD_SIZE": str(layout.num_processes), "LOCAL_RANK": "0"})
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    sys.argv = [sys.argv[0], *argv]
    try:
        args = parse_args()
        validate_args(args, dict(MEGATRON_DEFAULTS))
        core_transformer_config_from_args(args)  # which refuses some that the parser takes
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"Megatron refuses these settings: {first_line(error)}"
    return None


def _run_flags(request: ModelRequest, layout: Layout) -> dict[str, object]:
    if not isinstance(request, TrainingRequest):
        return untrained_flags(PRECOMPUTE_FLAGS)
    settings = request.settings.with_rates(lambda: _SOME_PARAMETERS)
    return _Planned("", "", settings, layout, Path(), Path("out"), {}, [], _never).megatron_flags()


class _Planned(TrainingRun):
    """A training that has no data yet."""

    @property
    def num_iterations(self) -> int:
        return _SOME_STEPS

    @property
    def global_batch_size(self) -> int:
        assert isinstance(self.settings, OptimizerSettings | OnPolicySettings)
        return self.settings.global_batch_size

    @property
    def max_length(self) -> int:
        return _SOME_LENGTH

    def packs_of_step(self) -> int:
        _never()

    def batches(self, args: object) -> Iterator[Batch]:
        _never()


def _never(*args: object) -> NoReturn:
    raise AssertionError("a planned training doesn't run")


if __name__ == "__main__":
    main()
