"""Settings and inputs that identify the artifacts of `sample`, `score`, `import-rollouts`, `select` and `evaluate`.

The plan of a run and the commands themselves both ask here, so that they agree. (Training's commands have no settings
besides their models in `megatron_erpd.settings`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.manifest import settings_identity
from megatron_erpd.sampling.inputs import prompts_identity, scorer_version, task_identity
from megatron_erpd.settings import EvaluateSettings, ImportSettings, SampleSettings, SelectSettings


@dataclass(frozen=True)
class Request:
    """What identifies an artifact, before it is made."""

    settings: dict[str, Any]
    inputs: dict[str, Path]


def sample_request(
    settings: SampleSettings,
    model: Path,
    prompts: str,
    num_prompts: int | None,
    first_prompt: int = 0,
) -> Request:
    """Rollouts of the policy in the folder `model`. Over how many GPUs it is spread is no part of what they are, and
    neither is who scored them: `score_request`."""
    more, inputs = prompts_identity(prompts)
    more |= {"first_prompt": first_prompt} if first_prompt else {}
    values = settings.model_dump(mode="json", exclude={"tensor_parallel"})
    return Request(settings_identity(values, num_prompts=num_prompts, **more), {"model": model, **inputs})


def score_request(rollouts: Path, prompts: str, verifier: str) -> Request:
    """Rewards of the rollouts in an artifact of `sample`."""
    more, inputs = task_identity(prompts, verifier)
    return Request(settings_identity(more, scorer=scorer_version(verifier)), {"rollouts": rollouts, **inputs})


def import_request(settings: ImportSettings, source: str, fields: Mapping[str, str], tokenizer: Path | None) -> Request:
    """Rollouts of another program."""
    inputs = {"source": Path(source)} | ({"tokenizer": tokenizer} if tokenizer else {})
    return Request(settings_identity(settings, fields=dict(fields)), inputs)


def evaluate_request(
    settings: EvaluateSettings,
    models: Mapping[str, Path],
    exported: Path | None,
    prompts: str,
    rollouts: Path,
    verifier: str | None,
    origin: Path | None = None,
) -> Request:
    """Metrics of policies: those in `models`, and all of an export; `origin` is the first round's base, in later
    rounds."""
    more, inputs = task_identity(prompts, verifier)
    inputs |= {f"model-{name}": path for name, path in models.items()}
    inputs |= {"rollouts": rollouts} | ({"exported": exported} if exported else {})
    inputs |= {"origin": origin} if origin else {}
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
    more, inputs = task_identity(prompts, verifier)
    inputs |= {"model": model, "teacher": teacher, "candidates": candidates}
    return Request(settings_identity(settings, has_unlearned=has_unlearned, **more), inputs)
