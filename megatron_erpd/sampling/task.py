"""What identifies a task, prompts and their verifier, among the settings and inputs of an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_erpd.content import module_file
from megatron_erpd.sampling.prompts import REASONING_GYM


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


def task_identity(prompts: str, verifier: str | None) -> tuple[dict[str, Any], dict[str, Path]]:
    """Prompts and verifier as settings, where they are names, and as inputs, where they are files."""
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
