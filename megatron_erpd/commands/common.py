"""What the commands that run in one process share: how they begin, what they say, and the figures that they keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_erpd.files import check_output
from megatron_erpd.launcher import refuse_several
from megatron_erpd.manifest import begin_artifact, verify_inputs
from megatron_erpd.progress import say_progress
from megatron_erpd.recipe.command_line import read_request
from megatron_erpd.recipe.requests import Request
from megatron_erpd.sampling.inputs import input_digests

if TYPE_CHECKING:
    from megatron_erpd.progress import StepLines

_PROGRESS_SECONDS = 5.0


def start[R: Request](kind: type[R], argv: list[str]) -> R:
    """What is asked for, unless a launcher has started several of the command or its folder can't be written."""
    request = read_request(kind, argv)
    refuse_several(request.command)
    check_output(request.output)
    return request


def begin(request: Request) -> None:
    """Takes the folder of the artifact (`manifest.begin_artifact`), after a look at the inputs where that is asked."""
    if request.verify_inputs:
        verify(request)
    begin_artifact(request.output, request.command, request.identity, input_digests(request.command, request.inputs))


def verify(request: Request) -> None:
    """Compares the inputs with their manifests."""
    from megatron_erpd.checkpoint.torch_dist.iterations import read_of_latest

    # A selection may take any of the teacher's checkpoints.
    verify_inputs(request.inputs.values(), None if request.command == "select" else read_of_latest)


def say_not_read(prompts: str) -> None:
    """Names the files of a folder of prompts that hold none."""
    from megatron_erpd.sampling.inputs import prompts_path
    from megatron_erpd.sources.files import open_source

    path = prompts_path(prompts)
    for other in open_source(prompts).not_read if path is not None and path.is_dir() else ():
        print(f"not read: {other}", flush=True)


def tokenizer_of(folder: Path | None) -> Any:
    """The tokenizer in a Hugging Face folder."""
    if folder is None:
        return None
    from megatron_erpd.sources.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def figures_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What of a report goes into the manifest's summary: its scalars, and the means of what it describes."""
    figures: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, Mapping) and "mean" in value:
            figures[f"{key}_mean"] = value["mean"]
        elif isinstance(value, int | float):
            figures[key] = value
    return figures


def progress(word: str, lines: StepLines | None = None) -> Callable[[int, int], None]:
    """Says how far it is, at most once in some seconds and at the end, and keeps it in `lines`."""
    said = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal said
        if done >= total or time.monotonic() - said >= _PROGRESS_SECONDS:
            said = time.monotonic()
            say_progress(word, str(done), str(total))
            if lines:
                lines.add({"responses": done, "responses_wanted": total})

    return tell


def status() -> Callable[..., None]:
    """The same for a command with several kinds of work."""
    tellers: dict[str, Callable[[int, int], None]] = {}

    def tell(*words: Any) -> None:
        *what, done, total = words
        name = " ".join(str(word) for word in what)
        tellers.setdefault(name, progress(name))(done, total)

    return tell
