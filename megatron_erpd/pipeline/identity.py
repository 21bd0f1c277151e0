"""Settings and inputs that identify the artifacts of `sample`, `import-rollouts`, `select` and `evaluate`.

The plan of a run and the commands themselves both ask here, so that they agree. (Training's commands have no settings
besides their models in `megatron_erpd.settings`.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.manifest import settings_identity
from megatron_erpd.settings import EvaluateSettings, ImportSettings, SampleSettings, SelectSettings

GENERATED_PROMPTS = "reasoning-gym:"
"""How prompts begin that are generated, not read from a file."""


@dataclass(frozen=True)
class Request:
    """What identifies an artifact, before it is made."""

    settings: dict[str, Any]
    inputs: dict[str, Path]


def sample_request(
    settings: SampleSettings, model: Path, prompts: str, verifier: str | None, num_prompts: int | None
) -> Request:
    """Rollouts of the policy in the folder `model`."""
    more, inputs = _task(prompts, verifier)
    return Request(settings_identity(settings, num_prompts=num_prompts, **more), {"model": model, **inputs})


def import_request(
    settings: ImportSettings, source: Path, fields: Mapping[str, str], tokenizer: Path | None
) -> Request:
    """Rollouts from a file of another program."""
    inputs = {"source": source} | ({"tokenizer": tokenizer} if tokenizer else {})
    return Request(settings_identity(settings, fields=dict(fields)), inputs)


def evaluate_request(
    settings: EvaluateSettings,
    models: Mapping[str, Path],
    exported: Path | None,
    prompts: str,
    rollouts: Path,
    verifier: str | None,
) -> Request:
    """Metrics of policies: those in `models`, and all of an export."""
    more, inputs = _task(prompts, verifier)
    inputs |= {f"model-{name}": path for name, path in models.items()}
    inputs |= {"rollouts": rollouts} | ({"exported": exported} if exported else {})
    return Request(settings_identity(settings, **more), inputs)


def select_request(
    settings: SelectSettings,
    model: Path,
    teacher: Path,
    candidates: Path,
    prompts: str,
    verifier: str,
    has_unlearned: bool,
) -> Request:
    """One checkpoint of the artifact `teacher`, chosen among those exported to `candidates`."""
    more, inputs = _task(prompts, verifier)
    inputs |= {"model": model, "teacher": teacher, "candidates": candidates}
    return Request(settings_identity(settings, has_unlearned=has_unlearned, **more), inputs)


def verifier_file(verifier: str) -> Path | None:
    """The Python file of a `python:FILE.py:FUNCTION` verifier; None for the others."""
    match = re.fullmatch(r"python:(.+\.py):\w+", verifier)
    return Path(match[1]) if match else None


def _task(prompts: str, verifier: str | None) -> tuple[dict[str, Any], dict[str, Path]]:
    """Prompts and verifier as settings, where they are names, and as inputs, where they are files."""
    settings: dict[str, Any] = {"verifier": verifier}
    inputs: dict[str, Path] = {}
    if prompts.startswith(GENERATED_PROMPTS):
        settings["prompts"] = prompts
    else:
        inputs["prompts"] = Path(prompts)
    file = verifier_file(verifier) if verifier else None
    if file is not None:
        inputs["verifier"] = file
    return settings, inputs
