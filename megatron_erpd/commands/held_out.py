"""`select` and `evaluate`: what is measured of policies on held-out prompts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_erpd.commands.common import begin, say_not_read, start, status, tokenizer_of
from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.files import write_json
from megatron_erpd.manifest import finish_artifact, input_digest, read_manifest
from megatron_erpd.recipe.requests import Evaluate, Select
from megatron_erpd.settings import HeldOutSettings

if TYPE_CHECKING:
    from megatron_erpd.sampling.prompts import PromptRecord


def select(argv: list[str]) -> None:
    """`megatron-erpd select`: one of a teacher's checkpoints."""
    request = start(Select, argv)
    begin(request)

    from megatron_erpd.checkpoint.torch_dist.iterations import take_iteration
    from megatron_erpd.evaluation.selection import candidate_folders, select_checkpoint
    from megatron_erpd.evaluation.strength import SELECTION
    from megatron_erpd.sampling.prompts import load_prompts

    settings, output = request.settings, request.output
    _check_candidates(request.candidates, request.teacher)
    say_not_read(request.prompts)
    prompts = load_prompts(request.prompts, settings.num_prompts, verifier=request.verifier)
    selection = select_checkpoint(
        request.model,
        candidate_folders(request.candidates),
        prompts,
        output,
        settings,
        verifier=request.verifier,
        workers=request.workers,
        has_unlearned=request.unlearned,
        status=status(),
    )
    print(selection.describe())
    take_iteration(request.teacher / "megatron", selection.iteration, output / "megatron")
    shutil.copytree(request.teacher / "hf", output / "hf", dirs_exist_ok=True)
    write_json(output / SELECTION, asdict(selection))
    warnings = _prompt_warnings("selection", prompts, settings, request.model, request.rollouts)
    finish_artifact(output, selection.figures(), warnings=warnings)


def evaluate(argv: list[str]) -> None:
    """`megatron-erpd evaluate`: accuracy of policies, and how far they are from the base policy."""
    request = start(Evaluate, argv)
    settings, models, output = request.settings, request.models, request.output
    if "base" not in models:
        raise RecipeError("--model: the base policy is missing, and divergences are measured from it; give base=HF")
    begin(request)

    from megatron_erpd.evaluation.evaluate import evaluate_policies
    from megatron_erpd.evaluation.held_out import metrics_warnings
    from megatron_erpd.sampling.prompts import load_prompts

    say_not_read(request.prompts)
    prompts = load_prompts(request.prompts, settings.num_prompts, verifier=request.verifier)
    found = evaluate_policies(
        models | _exported(request.exported, models),
        models["base"],
        prompts,
        output,
        settings,
        origin=request.origin,
        verifier=request.verifier,
        workers=request.workers,
        rollouts=request.rollouts,
        status=status(),
    )
    warnings = _prompt_warnings("evaluation", prompts, settings, models["base"], request.rollouts)
    accuracy = {name: metrics.accuracy_sampled for name, metrics in found.items()}
    summary = {"accuracy": accuracy} if request.verifier else None
    finish_artifact(output, summary, warnings=[*warnings, *metrics_warnings(found)])


def _prompt_warnings(
    section: str, prompts: Sequence[PromptRecord], settings: HeldOutSettings, model: Path, rollouts: Path | None
) -> list[str]:
    """Of held-out prompts, as the base policy in the folder `model` sees them."""
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.evaluation.held_out import prompt_warnings
    from megatron_erpd.sampling.prompts import encode_prompts

    # A number that nobody gave is the most that is wanted.
    asked = settings.num_prompts if "num_prompts" in settings.model_fields_set else None
    ids = encode_prompts(tokenizer_of(model), prompts, settings)
    trained_on = None if rollouts is None else read_rollouts(rollouts)
    return prompt_warnings(prompts, ids, trained_on, asked, section)


def _check_candidates(candidates: Path, teacher: Path) -> None:
    """The export must be of this teacher: its checkpoints are told by their iterations alone."""
    if input_digest(teacher) not in read_manifest(candidates).inputs.values():
        raise StageError(f"--candidates {candidates}: was not exported from {teacher}; export its checkpoints again")


def _exported(folder: Path | None, models: Mapping[str, Path]) -> dict[str, Path]:
    """The policies of an export by their folders' names."""
    if folder is None:
        return {}
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()}
    if not found:
        raise StageError(f"--exported {folder}: holds no Hugging Face folder; give what `megatron-erpd export` wrote")
    twice = sorted(found.keys() & models.keys())
    if twice:
        raise RecipeError(f"--model {twice[0]}: {folder} holds a policy of this name too; name yours otherwise")
    return found
