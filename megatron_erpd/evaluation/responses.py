"""Responses to held-out prompts and their rewards: the part of a measurement that needs no base policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_erpd.errors import StageError
from megatron_erpd.evaluation.metrics import PASS_REWARD
from megatron_erpd.sampling.engine import SampledResponse, TransformersEngine
from megatron_erpd.sampling.policy import Policy
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.settings import HeldOutSettings

Status = Callable[[str, str, int, int], None]
"""Called with (policy's name, what is being done, finished, total)."""


def respond(
    policy: Policy, prompt_token_ids: list[list[int]], settings: HeldOutSettings, tell: Callable[[str, int, int], None]
) -> tuple[list[list[SampledResponse]], list[SampledResponse]]:
    """G samples at temperature 1, and the greedy response, to every prompt."""
    engine, longest, rows = TransformersEngine(policy), settings.max_new_tokens, settings.batch_size
    groups = engine.sample(
        prompt_token_ids,
        num_samples=settings.num_samples,
        max_new_tokens=longest,
        seed=settings.seed,
        batch_size=rows,
        progress=partial(tell, "sampling"),
    )
    greedy = engine.greedy(prompt_token_ids, max_new_tokens=longest, batch_size=rows, progress=partial(tell, "greedy"))
    return groups, greedy


def decode(policy: Policy, samples: Sequence[SampledResponse]) -> list[str]:
    return policy.tokenizer.batch_decode([s.response_token_ids for s in samples], skip_special_tokens=True)


def score(verifier: Verifier | None, records: Sequence[PromptRecord], texts: list[list[str]]) -> np.ndarray:
    """float64 `[N, G]`, NaN for unverified."""
    rewards = np.full((len(texts), len(texts[0])), np.nan)
    if verifier is None:
        return rewards
    before = verifier.num_errors
    questions = [(record, text) for record, group in zip(records, texts, strict=True) for text in group]
    rewards.flat = [np.nan if reward is None else reward for reward, _ in verifier.scores(questions)]
    if verifier.num_errors - before == rewards.size:
        raise StageError(f"verifier {verifier.spec} failed on every response, first with: {verifier.first_error}")
    return rewards


def accuracies(rewards: np.ndarray, greedy: np.ndarray) -> dict[str, Any]:
    """Means over prompts of the verified samples' mean, so that a prompt counts once however many were verified."""
    verified = ~np.isnan(rewards)
    some = verified.any(axis=1)
    means = np.nanmean(rewards[some], axis=1) if some.any() else np.empty(0)
    best = np.nanmax(rewards[some], axis=1) if some.any() else np.empty(0)
    first = greedy[~np.isnan(greedy)]
    return {
        "accuracy_sampled": mean(means),
        "accuracy_sampled_se": standard_error(means),
        "accuracy_greedy": mean(first),
        "accuracy_greedy_se": standard_error(first),
        "pass_at_g": mean((best >= PASS_REWARD).astype(np.float64)),
        "unverified": float(1 - verified.mean()),
    }


def prompt_means(rewards: np.ndarray) -> list[float | None]:
    """Of each prompt, the mean of its verified samples; None where there are none."""
    return [None if np.isnan(row).all() else float(np.nanmean(row)) for row in rewards]


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
