"""A run's folder as the stages leave it, with made-up numbers and without a model."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.data.rollouts import read_rollouts, write_rollouts
from megatron_erpd.evaluation.strength import SELECTION, SelectionResult
from megatron_erpd.manifest import write_manifest
from megatron_erpd.teacher_cache import CacheMeta, CacheWriter, finalize, prepare_cache

CHARACTERS = "0123456789+= "
NUM_STEPS = 64


def make_run(folder: Path, seed: int = 1) -> Path:
    """A finished round with a teacher and its checkpoints, an unlearned policy, a student, two controls and a cache."""
    rng = random.Random(seed)
    round_ = folder / "round-01"
    (folder / "recipe.yaml").parent.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: synthetic\nteacher:\n  loss: ce  # <b>\n")
    tokenizer(round_ / "base" / "hf")
    finish(round_ / "base", "import", 1.2)
    rollouts(round_ / "rollouts", rng)
    cache(round_ / "cache", round_ / "rollouts", rng)
    for name, prefix, drift in (("teacher", "stage1", 1.0), ("unlearned", "stage1", 3.0), ("student", "stage2", 0.3)):
        metrics(round_ / name, prefix, drift, rng)
    metrics(round_ / "controls" / "direct", "stage1", 0.5, rng)
    metrics(round_ / "controls" / "sequence-advantage", "stage2", 0.4, rng)
    evaluations(round_ / "evaluation")
    return folder


def evaluations(folder: Path, before: float = 0.0) -> None:
    """`before` is what the rounds before are worth: added to sampled accuracy and to the KL from the first base."""
    folder.mkdir(parents=True)
    policies = {"base": (0.41, 0.67, 0.0), "unlearned": (0.02, 0.01, 9.5), "student": (0.76, 0.79, 0.8)}
    policies |= {"direct": (0.74, 0.77, 0.8), "sequence-advantage": (0.72, 0.76, 0.66)}
    policies |= {"teacher@16": (0.62, 0.7, 0.7), "teacher@8": (0.55, 0.69, 0.4), "teacher": (0.7, 0.72, 2.1)}
    for name, (sampled, greedy, kl) in policies.items():
        metrics: dict[str, Any] = {
            "accuracy_sampled": sampled + before,
            "accuracy_sampled_se": 0.011,
            "accuracy_greedy": greedy,
            "accuracy_greedy_se": 0.012,
            "kl_per_sequence": kl,
            "kl_per_sequence_se": 0.02 * kl,
            "kl_per_token": kl / 8,
            "kl_from_origin_per_sequence": kl + before,
            "kl_from_origin_per_token": (kl + before) / 8,
            "forward_kl_data": kl / 7,
            "reverse_kl_data": kl / 9,
            "entropy": 0.3 / (1 + kl),
            "mean_length": 8.0,
            "truncated": 0.0,
            "pass_at_g": min(1.0, sampled + 0.1),
            "pass_at": {"1": sampled, "4": min(1.0, sampled + 0.1)},
            "majority": None,
            "unverified": 0.0,
            "num_prompts": 256,
            "num_rollouts": None,
        }
        scored = {"response": f"231 861 {name}", "reward": float(sampled > 0.5)}
        unscored = {"response": "231 <8", "reward": None}
        example = {"prompt": "54+78+63=", "answer": "861", "greedy": scored, "samples": [unscored, scored]}
        record = {"name": name, "seconds": 2.5, "metrics": metrics, "examples": [example]}
        (folder / f"{name}.json").write_text(json.dumps(record))
    finish(folder, "evaluate", 95.0)


def metrics(folder: Path, prefix: str, drift: float, rng: random.Random) -> None:
    folder.mkdir(parents=True)
    names = {
        "loss": 0.7,
        "policy_base_kl": 0.0,
        "kl_k3": 0.0,
        "entropy": 0.4,
        "reward_weighted_log_ratio": 0.0,
        "clip_fraction": 0.01,
    }
    if prefix == "stage2":
        names |= {"reverse_kl": 0.3, "kl_coefficient": 0.1}
    lines = []
    for iteration in range(1, NUM_STEPS + 1):
        change = drift * iteration / NUM_STEPS
        row: dict[str, float] = {"iteration": iteration, "learning-rate": 1e-4}
        row |= {f"{prefix}/{n}": start + 0.1 * change + 0.02 * rng.random() for n, start in names.items()}
        lines.append(json.dumps(row))
    # A kill while the last step was being written.
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iterat')
    finish(folder, "train-teacher" if prefix == "stage1" else "distill", 61.0, loss=0.123456)


def rollouts(folder: Path, rng: random.Random) -> None:
    rows = []
    for group in range(6):
        prompt = "+".join(str(rng.randint(10, 99)) for _ in range(3)) + "="
        for _ in range(4):
            response = f"{rng.randint(100, 999)} {rng.randint(100, 999)}"
            # The last group carries no signal: all of its rewards are equal.
            reward = 1.0 if group == 5 else float(rng.random() < 0.5)
            rows.append(
                {
                    "prompt_token_ids": [CHARACTERS.index(c) for c in prompt],
                    "response_token_ids": [CHARACTERS.index(c) for c in response],
                    "group_id": group,
                    "reward": reward,
                    "prompt": prompt,
                    "response": response,
                }
            )
    rows[-1]["reward"] = None
    write_rollouts(folder / "rollouts.parquet", rows)
    finish(folder, "sample", 12.0, num_rollouts=len(rows), mean_reward=0.5)


def cache(folder: Path, rollouts_folder: Path, rng: random.Random) -> None:
    """Token rows of base and teacher: the teacher lowers the third token of a rollout without reward by 3 nats."""
    data = read_rollouts(rollouts_folder)
    meta = CacheMeta(
        kind="token",
        policies=("base", "teacher"),
        fingerprints={"base": "b", "teacher": "t"},
        vocab_size=len(CHARACTERS),
    )
    prepare_cache(folder, meta)
    with CacheWriter(folder, meta) as writer:
        for i, name in enumerate(data.sample_ids):
            length = int(data.response_lengths[i])
            base = np.array([-rng.random() - 3.5 for _ in range(length)], np.float32)
            signal = np.array([rng.gauss(0.1, 0.2) for _ in range(length)], np.float32)
            signal[2] = -3.0 if data.rewards[i] == 0 else 1.5
            writer.write_log_probs("base", name, data.token_crc(i), base)
            writer.write_log_probs("teacher", name, data.token_crc(i), base + signal)
    finalize(folder, meta)
    finish(folder, "precompute", 8.0)


def tokenizer(folder: Path) -> None:
    """A tokenizer of single characters, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(CHARACTERS)} | {"<unk>": len(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers.decoders import Fuse

    backend.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def selection(folder: Path) -> None:
    """The teacher at iteration 16, better than at 64 and than the base."""
    folder.mkdir(parents=True)
    figures = {"reward": 0.41, "reward_se": 0.02, "greedy": 0.67, "greedy_se": 0.03}
    rows = {16: (0.62, 0.21), 64: (0.55, 0.14)}
    candidates = [
        figures | {"reward": reward, "difference": gained, "difference_se": 0.025, "iteration": iteration}
        for iteration, (reward, gained) in rows.items()
    ]
    found = SelectionResult(
        "best_reward", 16, figures, candidates, "strong", "it is better", num_prompts=64, num_samples=4
    )
    (folder / SELECTION).write_text(json.dumps(asdict(found)))
    finish(folder, "select", 20.0, **found.figures())


def finish(folder: Path, stage: str, seconds: float, **figures: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, stage, {}, {}, {"seconds": seconds, **figures})
