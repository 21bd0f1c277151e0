"""The figures of a policy and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PASS_REWARD = 1.0
"""A response solves its prompt when its reward is at least this: scorers with partial credit give 1 when right."""


@dataclass(frozen=True)
class PolicyMetrics:
    """One policy on N held-out prompts with G samples each, at temperature 1. Divergences in nats, lengths in tokens.

    Attributes:
        num_prompts, num_samples: N and G.
        accuracy_sampled: mean reward of the samples (mean@G); None where nothing was verified, here and below.
        accuracy_sampled_se: its standard error over prompts (a prompt's G samples are one observation).
        accuracy_greedy, accuracy_greedy_se: the same of the most likely response.
        pass_at_g: fraction of prompts with a sample whose reward is at least `PASS_REWARD`.
        pass_at, pass_at_se: k (1, 2, 4, ... and G) to the probability that one of k samples passes, by the estimator
            that takes all of a prompt's n verified samples, c of which pass: 1 - C(n - c, k) / C(n, k), without bias
            (Chen et al., 2021, arXiv 2107.03374, equation 1). Mean over prompts with n >= k, and its standard error.
        majority, majority_se: mean reward of a prompt's most frequent answer, of equally frequent ones the first drawn
            (Wang et al., 2022, arXiv 2203.11171). Answers are the same where their text is: in the last `\\boxed{}`,
            else between the last <answer> and </answer>, else the whole response.
        mean_length_passed, mean_length_failed: of the verified samples that pass, and of the others.
        unverified: fraction of the samples without a verdict; they enter no accuracy.
        kl_per_sequence: KL(policy || base), exact at every token of the policy's own samples, summed over a response,
            mean over responses.
        kl_per_sequence_se: its standard error over prompts.
        kl_per_token: the same sum over all responses, divided by all their tokens.
        kl_per_sequence_sampled, kl_per_token_sampled: the same from the log-ratios of the drawn tokens alone.
        kl_from_origin_per_sequence, kl_from_origin_per_sequence_se, kl_from_origin_per_token: as `kl_per_sequence` and
            so on, but KL(policy || the first round's base), on the same samples: how far all rounds together have come.
            The same as `kl_per_sequence` where the base is the first round's.
        entropy: of the policy per token, mean over the tokens of its own samples.
        mean_length: of the samples. mean_length_greedy: of the greedy responses.
        truncated: fraction of the samples that met `max_new_tokens`.
        forward_kl_data: KL(base || policy) per token, mean over the tokens of the fixed rollouts, exact; None
            without rollouts. reverse_kl_data: KL(policy || base) on the same tokens.
        num_rollouts: how many of the fixed rollouts that was.
    """

    num_prompts: int
    num_samples: int
    accuracy_sampled: float | None
    accuracy_sampled_se: float | None
    accuracy_greedy: float | None
    accuracy_greedy_se: float | None
    pass_at_g: float | None
    pass_at: dict[str, float]
    pass_at_se: dict[str, float]
    majority: float | None
    majority_se: float | None
    mean_length_passed: float | None
    mean_length_failed: float | None
    unverified: float
    kl_per_sequence: float
    kl_per_sequence_se: float | None
    kl_per_token: float
    kl_per_sequence_sampled: float
    kl_per_token_sampled: float
    kl_from_origin_per_sequence: float
    kl_from_origin_per_sequence_se: float | None
    kl_from_origin_per_token: float
    entropy: float
    mean_length: float
    mean_length_greedy: float
    truncated: float
    forward_kl_data: float | None
    reverse_kl_data: float | None
    num_rollouts: int


@dataclass(frozen=True)
class EvaluationResult:
    """`metrics`, a few prompts with their responses for people to read, and what policies are compared by.

    Attributes:
        prompt_rewards: mean reward of each prompt's samples, as in `accuracy_sampled`; None where none was verified.
    """

    metrics: PolicyMetrics
    examples: list[dict[str, Any]]
    prompt_rewards: list[float | None]


def saved_metrics(file: Path, identity: dict[str, Any]) -> PolicyMetrics | None:
    """The figures in `file` if they were made from the same things by a version that measured the same figures."""
    figures = saved_result(file, identity).get("metrics", {})
    return PolicyMetrics(**figures) if figures.keys() == {field.name for field in fields(PolicyMetrics)} else None


def saved_result(file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in `file` if its `identity` is this one; empty otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if content.get("identity") == json.loads(json.dumps(identity)) else {}
