"""Choosing the teacher among its checkpoints by their reward on held-out validation prompts.

These prompts are not those of the final evaluation: the best of several is best partly by chance, so its reward here is
a little too high, and only other prompts tell what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.evaluation.metrics import saved_result
from megatron_erpd.evaluation.responses import Status, decode, prompt_means, respond, score, standard_error
from megatron_erpd.evaluation.strength import SelectionResult, recommend_signal
from megatron_erpd.files import write_json
from megatron_erpd.sampling.policy import load_policy, policy_fingerprint
from megatron_erpd.sampling.prompts import PromptRecord, encode_prompts, prompts_digest
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.settings import SelectSettings

REWARDS = "rewards"
_KINDS = ("sampled", "greedy")


def select_checkpoint(
    base: Path,
    candidates: Mapping[int, Path],
    prompts: Sequence[PromptRecord],
    folder: Path,
    settings: SelectSettings,
    verifier: str,
    has_unlearned: bool,
    status: Status | None = None,
    workers: int | None = None,
) -> SelectionResult:
    """Samples base and candidates on the prompts and chooses.

    Each policy's rewards are saved as soon as they are there (`rewards/NAME.json`); a file that was made from the same
    policy, prompts, settings and verifier is reused.

    Args:
        base: Hugging Face folder of pi_0.
        candidates: iteration to Hugging Face folder; with `by: last` only the last one is sampled.
        prompts: validation prompts; the first `settings.num_prompts` are used.
        folder: where the rewards are kept.
        verifier, workers: as in `Verifier`.
        has_unlearned: whether an unlearned policy will be there (see `recommend_signal`).

    Returns:
        The finding. The highest mean reward of the samples wins; of equal ones the earliest, which has moved least.

    Raises:
        RecipeError: fewer than two prompts. StageError: nothing of a policy's was verified.
    """
    records = list(prompts[: settings.num_prompts])
    if len(records) < 2:
        raise RecipeError(f"prompts: {len(records)} validation prompt tells nothing about chance; give more")
    iterations = sorted(candidates)[-1:] if settings.by == "last" else sorted(candidates)
    judge = cache(partial(Verifier, verifier, workers))  # started when a response is there
    measure = partial(
        _rewards, records=records, folder=folder, settings=settings, verifier=verifier, judge=judge, status=status
    )
    reference = measure("base", base)
    found = [_figures(measure(f"teacher@{i}", candidates[i]), reference) | {"iteration": i} for i in iterations]
    chosen = max(found, key=lambda figures: (figures["reward"], -figures["iteration"]))
    advice = recommend_signal(chosen["difference"], chosen["difference_se"], has_unlearned)
    return SelectionResult(
        by=settings.by,
        iteration=chosen["iteration"],
        base=_means(reference),
        candidates=found,
        signal=advice.signal,
        why=advice.why,
        num_prompts=len(records),
        num_samples=settings.num_samples,
    )


def candidate_folders(exported: Path) -> dict[int, Path]:
    """Iteration to folder of an export's checkpoints, `NAME@ITERATION` each.

    Raises:
        StageError: there is none.
    """
    named = [(p.name.rpartition("@")[2], p) for p in exported.glob("*@*") if (p / "config.json").is_file()]
    found = {int(iteration): path for iteration, path in named if iteration.isdigit()}
    if not found:
        raise StageError(
            f"{exported}: holds no checkpoint as NAME@ITERATION; make it with `megatron-erpd export --checkpoint "
            "teacher=DIR@all`"
        )
    return found


def _rewards(
    name: str,
    path: Path,
    *,
    records: Sequence[PromptRecord],
    folder: Path,
    settings: SelectSettings,
    verifier: str,
    judge: Callable[[], Verifier],
    status: Status | None,
) -> dict[str, np.ndarray]:
    """Per prompt the mean reward of the verified samples, and that of the greedy response: float64 `[N]`, or NaN."""
    identity = {
        "policy": policy_fingerprint(path),
        "prompts": prompts_digest(records),
        "settings": settings.model_dump(exclude={"batch_size", "by"}),
        "verifier": verifier,
    }
    file = folder / REWARDS / f"{name}.json"
    saved = saved_result(file, identity)
    if not saved.keys() >= set(_KINDS):
        policy = load_policy(path)
        ids = encode_prompts(policy.tokenizer, records, settings)
        groups, greedy = respond(policy, ids, settings, partial(status, name) if status else lambda *_: None)
        sampled = score(judge(), records, [decode(policy, group) for group in groups])
        likeliest = score(judge(), records, [[text] for text in decode(policy, greedy)])
        saved = {"identity": identity, "sampled": prompt_means(sampled), "greedy": prompt_means(likeliest)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, saved)
    rewards = {kind: np.array(saved[kind], dtype=np.float64) for kind in _KINDS}  # None, unverified, is NaN
    for kind, row in rewards.items():
        if np.isnan(row).all():
            raise StageError(f"{name}: the verifier {verifier} gave no verdict on any {kind} response; correct it")
    return rewards


def _means(rewards: Mapping[str, np.ndarray]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, kind in (("reward", "sampled"), ("greedy", "greedy")):
        figures |= _mean_and_error(name, rewards[kind][~np.isnan(rewards[kind])])
    return figures


def _figures(rewards: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A candidate's means, and its difference from the base over the prompts on which both have a verdict."""
    difference = rewards["sampled"] - base["sampled"]
    return _means(rewards) | _mean_and_error("difference", difference[~np.isnan(difference)])


def _mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    error = standard_error(values)
    if error is None:
        raise StageError(
            f"{name}: only {len(values)} of the validation prompts have a verdict (for the base too); a standard error "
            "needs at least two: give more prompts or correct the verifier"
        )
    return {name: float(values.mean()), f"{name}_se": error}
