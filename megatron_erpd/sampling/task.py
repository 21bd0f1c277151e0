"""What identifies a task, prompts and their verifier, among the settings and inputs of an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_erpd.content import module_file
from megatron_erpd.sampling.prompts import REASONING_GYM
from megatron_erpd.source_names import local_path


def verifier_file(verifier: str) -> Path | None:
    """The Python file of a `python:FILE.py:FUNCTION` verifier; None for the others."""
    match = re.fullmatch(r"python:(.+\.py):\w+", verifier)
    return Path(match[1]) if match else None


def verifier_program(verifier: str) -> Path | None:
    """The file whose code a `python:` verifier is, of a module where it can be found without importing it; None for
    the others."""
    file = verifier_file(verifier)
    match = re.fullmatch(r"python:([\w.]+):\w+", verifier)
    return module_file(match[1]) if file is None and match else file


def prompts_path(prompts: str) -> Path | None:
    """The file or folder with the prompts, whether it exists or not; None for generated ones and those of a hub."""
    return None if prompts.startswith(REASONING_GYM) else local_path(prompts)


def task_identity(prompts: str, verifier: str | None) -> tuple[dict[str, Any], dict[str, Path]]:
    """Prompts and verifier as settings, where they are names, and as inputs, where they are read (the prompts' path is
    their source as it is written, which may be a data set of a hub)."""
    settings: dict[str, Any] = {"verifier": verifier}
    inputs: dict[str, Path] = {}
    if prompts.startswith(REASONING_GYM):
        settings["prompts"] = prompts
    else:
        inputs["prompts"] = Path(prompts)
    file = verifier_program(verifier) if verifier else None
    if file is not None:
        inputs["verifier"] = file
    return settings, inputs
