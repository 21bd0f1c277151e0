"""Scores: a verifier with what identifies its verdicts, and the stage that makes rewards on disk of sampled rollouts,
resumable part by part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.data.rewards import read_rewards, reward_files, write_content, write_rewards
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, rollout_files
from megatron_erpd.errors import RolloutError, StageError
from megatron_erpd.files import write_json
from megatron_erpd.manifest import read_manifest
from megatron_erpd.objectives.advantages import zero_variance_groups
from megatron_erpd.progress import OnProgress
from megatron_erpd.sampling.inputs import questions_digest, verifier_file, verifier_identity
from megatron_erpd.sampling.prompts import PromptRecord, load_prompts, prompt_text, prompts_digest
from megatron_erpd.sampling.verifiers import Question, Verdict, Verifier

REPORT = "report.json"
VERIFIER_ERROR = "verifier_error"
"""In the metadata of a rollout on which the verifier failed: with what."""
_SCORED_BY, _ANSWERS = "scored_by", "answers"


class Scorer:
    """A verifier that is started when it is first asked, and what it says of the part files that it scores.

    Args:
        spec, workers: as in `Verifier`.

    Attributes:
        num_asked: responses that it was asked about.
    """

    def __init__(self, spec: str, workers: int | None = None) -> None:
        self.spec = spec
        self.num_asked = 0
        self._workers = workers
        self._identity = verifier_identity(spec)

    @property
    def name(self) -> str:
        """The spec, a file's without its folder."""
        file = verifier_file(self.spec)
        return self.spec if file is None else f"python:{file.name}:{self.spec.rpartition(':')[2]}"

    @cached_property
    def verifier(self) -> Verifier:
        """Its process. Raises `RecipeError` where the spec names nothing that can be loaded."""
        return Verifier(self.spec, self._workers)

    @property
    def has_always_failed(self) -> bool:
        return 0 < self.num_asked == self.verifier.num_errors

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        """As `Verifier.scores`."""
        self.num_asked += len(questions)
        return self.verifier.scores(questions)

    def file_metadata(self, records: Sequence[PromptRecord]) -> dict[str, str]:
        """What a part file of the rollouts of `records` says of its rewards."""
        return {_SCORED_BY: self._identity, _ANSWERS: prompts_digest(records)}

    def has_scored(self, part: Rollouts, records: Sequence[PromptRecord]) -> bool:
        """Whether the rewards of a part file are this verifier's for these records, and it didn't fail on all."""
        said = part.file_metadata
        if any(said.get(name) != value for name, value in self.file_metadata(records).items()):
            return False
        return any(error is None for error in errors_of(part))


def errors_of(rollouts: Rollouts) -> list[str | None]:
    """With what the verifier failed on each rollout, None where it did not."""
    status = rollouts.reward_status
    found = [None if s == "scored" else rollouts.metadata(i).get(VERIFIER_ERROR) for i, s in enumerate(status)]
    return [None if error is None else str(error) for error in found]


def prompts_of_rollouts(rollouts: Path, prompts: str, verifier: str) -> list[PromptRecord]:
    """The prompts, of a file or a task, that an artifact of `sample` was sampled from, by group, for a verifier.

    Raises:
        StageError: the folder holds no finished artifact, or `sample` didn't write it. RecipeError: as `load_prompts`.
    """
    manifest = read_manifest(rollouts)
    if manifest.stage != "sample":
        raise StageError(
            f"{rollouts}: was written by `{manifest.stage}`, and only rollouts of `megatron-erpd sample` know their "
            "prompts; imported ones bring their rewards with them"
        )
    settings = manifest.settings
    return load_prompts(prompts, settings.get("num_prompts"), settings.get("first_prompt", 0), verifier)


def score_rollouts(
    rollouts: Path,
    prompts: Sequence[PromptRecord],
    output: Path,
    verifier: str,
    progress: OnProgress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Scores rollouts and writes `rewards-00000-of-000NN.parquet` for each of their part files, and `report.json`.

    Rewards that the rollouts brought with them are taken as they are where this verifier made them for the answers that
    the prompts have now; the verifier is asked about the others. Called again after an interruption, it makes
    the parts that are missing.

    Args:
        rollouts: an artifact of `sample`.
        prompts: those that they were sampled from, from `prompts_of_rollouts`; a rollout's group is its place in them.
        output: made if need be.
        verifier, workers: as in `Verifier`.
        progress: told the number of rollouts that have a reward, of all.

    Returns:
        The report: counts, rewards, `changed` (rewards other than the rollouts' own), `asked` (responses that the
        verifier was asked about, in this run), errors of the verifier.

    Raises:
        RolloutError: a rollout is of another prompt.
        StageError: the verifier failed on every response that it was asked about.
    """
    scorer, files, done = Scorer(verifier, workers), rollout_files(rollouts), 0
    every, made = read_rollouts(rollouts), []
    for file in files:
        target, part = output / file.name.replace("rollouts", "rewards", 1), read_rollouts(file)
        done += len(part)
        if target.exists():
            continue
        rewards, errors = _scores(part, prompts, scorer, file)
        write_rewards(target, part.sample_ids, rewards, errors)
        made.append(target)
        if progress is not None:
            progress(done, len(every))
    if scorer.num_asked and scorer.has_always_failed:
        for target in made:  # or a verifier that works again would find nothing to do
            target.unlink()
        raise StageError(
            f"verifier {verifier} failed on all {scorer.num_asked} responses, first with: "
            f"{scorer.verifier.first_error}; correct it and score again"
        )
    report = _report(every, output, verifier, scorer.num_asked)
    write_json(output / REPORT, report)
    return report


def _scores(
    part: Rollouts, prompts: Sequence[PromptRecord], scorer: Scorer, file: Path
) -> tuple[list[float | None], list[str | None]]:
    """Rewards and errors of a part file's rollouts."""
    groups = sorted({int(group) for group in part.group_ids})
    if groups[-1] >= len(prompts):
        raise RolloutError(f"{file}: has rollouts of prompt {groups[-1]}, and there are {len(prompts)} prompts")
    records = [prompts[group] for group in groups]
    if scorer.has_scored(part, records):
        return [None if np.isnan(reward) else float(reward) for reward in part.rewards], errors_of(part)
    if part.file_metadata.get("part_prompts") != questions_digest(records):
        _check_prompts(part, prompts)
    questions = [(prompts[int(group)], part.response_text(i) or "") for i, group in enumerate(part.group_ids)]
    verdicts = scorer(questions)
    return [reward for reward, _ in verdicts], [error for _, error in verdicts]


def _check_prompts(part: Rollouts, prompts: Sequence[PromptRecord]) -> None:
    for i, group in enumerate(part.group_ids):
        if part.prompt_text(i) != prompt_text(prompts[int(group)]):
            raise RolloutError(
                f"{part.location(i)}: is not a rollout of prompt {group} of the prompts, which is another text; give "
                "the prompts that it was sampled from"
            )


def _report(rollouts: Rollouts, output: Path, verifier: str, asked: int) -> dict[str, Any]:
    changed = write_content(output, rollouts)
    _, values, errors = read_rewards(reward_files(output))
    failed = [error for error in errors if error]
    return {
        **reward_figures(values, rollouts.group_ids),
        "changed": changed,
        "asked": asked,
        "verifier": {"spec": verifier, "errors": len(failed), "first_error": failed[0] if failed else None},
    }


def reward_figures(rewards: np.ndarray, group_ids: np.ndarray) -> dict[str, Any]:
    """`num_rollouts` to `reward` of `sample.describe_rollouts`, of float32 `[N]` with NaN for unverified."""
    constant = zero_variance_groups(rewards, group_ids)
    scored = rewards[~np.isnan(rewards)]
    reward = (
        {
            "mean": float(scored.mean(dtype=np.float64)),
            "std": float(scored.std(dtype=np.float64)),
            "min": float(scored.min()),
            "max": float(scored.max()),
        }
        if len(scored)
        else None
    )
    return {
        "num_rollouts": len(rewards),
        "num_groups": len(np.unique(group_ids)),
        "zero_variance_groups": len(np.unique(group_ids[constant])),
        "accepted": len(scored),
        "unverified": len(rewards) - len(scored),
        "reward": reward,
    }
