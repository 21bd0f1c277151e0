"""All figures of a policy: accuracy on held-out prompts, divergence from the base, entropy, lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.data.rollouts import Rollouts, read_rollouts
from megatron_erpd.evaluation.divergence import compare_policies
from megatron_erpd.evaluation.metrics import EvaluationResult, PolicyMetrics, saved_metrics
from megatron_erpd.evaluation.responses import (
    Status,
    accuracies,
    decode,
    prompt_means,
    respond,
    score,
    standard_error,
)
from megatron_erpd.files import write_json
from megatron_erpd.manifest import METRICS
from megatron_erpd.progress import StepLines
from megatron_erpd.sampling.policy import Policy, load_policy, policy_fingerprint
from megatron_erpd.sampling.prompts import PromptRecord, encode_prompts, prompt_text, prompts_digest
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.settings import EvaluateSettings
from megatron_erpd.sources.tokenizer import check_policies, check_rollouts

NUM_EXAMPLES = 8


def evaluate_policies(
    policies: Mapping[str, str | Path],
    base: str | Path,
    prompts: Sequence[PromptRecord],
    output_dir: str | Path,
    settings: EvaluateSettings,
    *,
    origin: str | Path | None = None,
    verifier: str | None = None,
    workers: int | None = None,
    rollouts: Rollouts | str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    status: Status | None = None,
) -> dict[str, PolicyMetrics]:
    """Evaluates several policies against one base, which is loaded once.

    Each policy's figures are saved as `NAME.json` in `output_dir` as soon as they are there. A file that was made from
    the same policy, base, prompts, rollouts, settings and verifier is reused; any other is written again.

    Args:
        policies: names (they become file names) to Hugging Face folders; the base may be among them.
        base: Hugging Face folder of pi_0.
        prompts: held-out; the first `settings.num_prompts` are used.
        output_dir: made if need be.
        settings: what to measure.
        origin: Hugging Face folder of the first round's base, for `kl_from_origin_*`; None where that is `base`.
        verifier: as in `Verifier`; None leaves the accuracies out.
        workers: of the verifier, as there.
        rollouts: the fixed data for `forward_kl_data` and `reverse_kl_data`; `settings.num_rollouts` rows at equal
            distances are used.
        device, dtype: as in `load_policy`.
        status: called with the progress.

    Returns:
        The figures by name, in the order given.

    Raises:
        StageError: the verifier failed on every response.
        RolloutError, CheckpointError: the rollouts or a policy are of another tokenizer than the base.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    fixed = read_rollouts(rollouts) if isinstance(rollouts, str | Path) else rollouts
    common = {
        "base": policy_fingerprint(base),
        "origin": policy_fingerprint(base if origin is None else origin),
        "prompts": prompts_digest(prompts[: settings.num_prompts]),
        "rollouts": fixed.digest() if fixed is not None else None,
        "settings": settings.model_dump(exclude={"batch_size"}),
        "verifier": verifier,
    }
    identities = {name: {"policy": policy_fingerprint(path), **common} for name, path in policies.items()}
    saved = {name: saved_metrics(folder / f"{name}.json", identity) for name, identity in identities.items()}
    results = {name: metrics for name, metrics in saved.items() if metrics is not None}
    if len(results) == len(policies):
        return results
    base_policy = load_policy(base, device, dtype)
    judge = None if verifier is None else Verifier(verifier, workers)
    if fixed is not None:
        place = fixed.location(0).partition(": row")[0]
        if note := check_rollouts(fixed, place, base_policy.path, base_policy.tokenizer):
            print(f"note: {note}", flush=True)
    origin_policy = None
    if origin is not None and common["origin"] != common["base"]:
        origin_policy = load_policy(origin, device, dtype)
    for name, path in policies.items():
        if name in results:
            continue
        started, identity = time.monotonic(), identities[name]
        policy = base_policy if identity["policy"] == common["base"] else load_policy(path, device, dtype)
        check_policies(name, policy.path, base_policy.path)
        told = None if status is None else partial(status, name)
        evaluation = evaluate_policy(
            policy, base_policy, prompts, judge, fixed, settings, origin=origin_policy, status=told
        )
        facts = {"name": name, "identity": identity, "seconds": round(time.monotonic() - started, 3)}
        write_json(folder / f"{name}.json", {**facts, **asdict(evaluation)}, default=str)
        StepLines(folder / METRICS, f"evaluation/{name}").add(
            {"policy_seconds": facts["seconds"], **asdict(evaluation.metrics)}
        )
        results[name] = evaluation.metrics
    return {name: results[name] for name in policies}


def evaluate_policy(
    policy: Policy,
    base: Policy,
    prompts: Sequence[PromptRecord],
    verifier: Verifier | None,
    rollouts: Rollouts | None,
    settings: EvaluateSettings,
    *,
    origin: Policy | None = None,
    num_examples: int = NUM_EXAMPLES,
    status: Callable[[str, int, int], None] | None = None,
) -> EvaluationResult:
    """Evaluates one policy; see `evaluate_policies` and `PolicyMetrics`. `origin` is the first round's base, if `base`
    isn't.

    Samples depend on `settings.seed` and a prompt's place alone, so two policies are compared under the same noise.
    """
    tell = status or (lambda what, done, total: None)
    records = list(prompts[: settings.num_prompts])
    ids = encode_prompts(policy.tokenizer, records, settings)
    groups, greedy = respond(policy, ids, settings, tell)
    texts = [decode(policy, group) for group in groups]
    greedy_texts = decode(policy, greedy)
    rewards = score(verifier, records, texts)
    greedy_rewards = score(verifier, records, [[text] for text in greedy_texts])
    sequences = [(prompt, s.response_token_ids) for prompt, group in zip(ids, groups, strict=True) for s in group]
    own = compare_policies(policy, base, sequences, progress=partial(tell, "divergence"))
    far = own
    if origin is not None:
        far = compare_policies(policy, origin, sequences, progress=partial(tell, "divergence from the first base"))
    samples = [sample for group in groups for sample in group]
    metrics = PolicyMetrics(
        num_prompts=len(records),
        num_samples=settings.num_samples,
        **accuracies(rewards, greedy_rewards, texts, own.num_tokens.reshape(len(records), -1)),
        kl_per_sequence=float(own.reverse_kl.mean()),
        kl_per_sequence_se=standard_error(own.reverse_kl.reshape(len(records), -1).mean(axis=1)),
        kl_per_token=own.per_token("reverse_kl"),
        kl_per_sequence_sampled=float(own.log_ratio.mean()),
        kl_per_token_sampled=own.per_token("log_ratio"),
        kl_from_origin_per_sequence=float(far.reverse_kl.mean()),
        kl_from_origin_per_sequence_se=standard_error(far.reverse_kl.reshape(len(records), -1).mean(axis=1)),
        kl_from_origin_per_token=far.per_token("reverse_kl"),
        entropy=own.per_token("entropy"),
        mean_length=float(own.num_tokens.mean()),
        mean_length_greedy=float(np.mean([len(s.response_token_ids) for s in greedy])),
        truncated=float(np.mean([s.finish_reason == "length" for s in samples])),
        **_data_divergence(policy, base, rollouts, settings.num_rollouts, tell),
    )
    examples = [
        _example(records[i], greedy_texts[i], greedy_rewards[i, 0], texts[i], rewards[i])
        for i in range(min(num_examples, len(records)))
    ]
    return EvaluationResult(metrics, examples, prompt_means(rewards))


def _data_divergence(
    policy: Policy, base: Policy, rollouts: Rollouts | None, num_rollouts: int, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    if rollouts is None:
        return {"forward_kl_data": None, "reverse_kl_data": None, "num_rollouts": 0}
    # Rows of one prompt lie together: equal distances reach as many prompts as there can be.
    rows = np.unique(np.linspace(0, len(rollouts) - 1, min(num_rollouts, len(rollouts))).round().astype(np.int64))
    sequences = [(rollouts.prompt_tokens(int(i)), rollouts.response_tokens(int(i))) for i in rows]
    data = compare_policies(policy, base, sequences, progress=partial(tell, "fixed data"))
    return {
        "forward_kl_data": data.per_token("forward_kl"),
        "reverse_kl_data": data.per_token("reverse_kl"),
        "num_rollouts": len(rows),
    }


def _example(record: PromptRecord, greedy: str, greedy_reward: float, texts: list[str], rewards: np.ndarray) -> dict:
    def scored(text: str, reward: float) -> dict[str, Any]:
        return {"response": text, "reward": None if np.isnan(reward) else float(reward)}

    return {
        "prompt": prompt_text(record),
        "answer": record["answer"],
        "greedy": scored(greedy, greedy_reward),
        "samples": [scored(text, reward) for text, reward in zip(texts[:2], rewards[:2], strict=True)],
    }
