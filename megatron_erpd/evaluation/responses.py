"""Responses to held-out prompts and their rewards: the part of a measurement that needs no base policy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import comb
from typing import Any

import numpy as np

from megatron_erpd.errors import StageError
from megatron_erpd.evaluation.metrics import PASS_REWARD
from megatron_erpd.sampling.engine import SampledResponse, TransformersEngine
from megatron_erpd.sampling.math_answers import response_answer
from megatron_erpd.sampling.policy import Policy
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.settings import HeldOutSettings

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

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


def accuracies(rewards: np.ndarray, greedy: np.ndarray, texts: list[list[str]], lengths: np.ndarray) -> dict[str, Any]:
    """Means over prompts of the verified samples' mean, so that a prompt counts once however many were verified.

    Args:
        rewards: float64 `[N, G]`, NaN for unverified. greedy: `[N, 1]`.
        texts: of the samples. lengths: theirs in tokens, `[N, G]`.
    """
    verified = ~np.isnan(rewards)
    some = verified.any(axis=1)
    means = np.nanmean(rewards[some], axis=1) if some.any() else np.empty(0)
    best = np.nanmax(rewards[some], axis=1) if some.any() else np.empty(0)
    first = greedy[~np.isnan(greedy)]
    passed, voted = rewards >= PASS_REWARD, majority_rewards(rewards, texts)
    at = {k: pass_at(passed.sum(axis=1), verified.sum(axis=1), k) for k in _powers_up_to(rewards.shape[1])}
    errors = {k: standard_error(values) for k, values in at.items()}
    return {
        "accuracy_sampled": mean(means),
        "accuracy_sampled_se": standard_error(means),
        "accuracy_greedy": mean(first),
        "accuracy_greedy_se": standard_error(first),
        "pass_at_g": mean((best >= PASS_REWARD).astype(np.float64)),
        "pass_at": {str(k): float(values.mean()) for k, values in at.items() if len(values)},
        "pass_at_se": {str(k): error for k, error in errors.items() if error is not None},
        "majority": mean(voted),
        "majority_se": standard_error(voted),
        "mean_length_passed": mean(lengths[passed]),
        "mean_length_failed": mean(lengths[verified & ~passed]),
        "unverified": float(1 - verified.mean()),
    }


def pass_at(passed: np.ndarray, verified: np.ndarray, k: int) -> np.ndarray:
    """Of each prompt with at least k verified samples, the probability that one of k passes: `PolicyMetrics.pass_at`.

    Args:
        passed, verified: int `[N]`, numbers of a prompt's samples.
    """
    pairs = [(int(c), int(n)) for c, n in zip(passed, verified, strict=True) if n >= k]
    return np.array([1 - comb(n - c, k) / comb(n, k) for c, n in pairs])


def majority_rewards(rewards: np.ndarray, texts: list[list[str]]) -> np.ndarray:
    """The reward of each prompt's most frequent answer among the verified samples; prompts without any are left out."""
    found = []
    for row, group in zip(rewards, texts, strict=True):
        answers = [(_answer_of(text), float(reward)) for text, reward in zip(group, row, strict=True)]
        verified = [(answer, reward) for answer, reward in answers if not np.isnan(reward)]
        if verified:
            votes = Counter(answer for answer, _ in verified)  # of equal counts the first that came
            chosen = votes.most_common(1)[0][0]
            found.append(np.mean([reward for answer, reward in verified if answer == chosen]))
    return np.array(found)


def _answer_of(text: str) -> str:
    boxed = response_answer(text)
    if boxed is not None:
        return boxed.strip()
    between = _ANSWER.findall(text)
    return (between[-1] if between else text).strip()


def _powers_up_to(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest itself."""
    return [*(2**n for n in range(largest.bit_length()) if 2**n < largest), largest]


def prompt_means(rewards: np.ndarray) -> list[float | None]:
    """Of each prompt, the mean of its verified samples; None where there are none."""
    return [None if np.isnan(row).all() else float(np.nanmean(row)) for row in rewards]


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
