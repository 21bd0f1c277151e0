"""What the study trains: tasks, the stages of a round as functions, and the sections of arms built from them.

An *arm* is one policy of a section, a section the arms that are compared with each other under one task and seed. All
arms of a round share its base and its rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph import Graph

VERIFIER = "python:examples/quickstart/task.py:score"
LEARNING_RATE = 1e-4
TEACHER_RATE = 4e-4
BATCH = 256
"""Rollouts of one optimizer step."""
TEACHER_STEPS = 256
"""64 epochs over the rollouts of 64 prompts: longer than is good for it."""
STUDENT_STEPS = 64
LAYOUT = {"micro_batch_size": 128}
NUM_HELDOUT = 256
"""Held-out problems, four samples each: a standard error of .015 for one policy, .007 for the mean of five seeds."""


@dataclass(frozen=True)
class Task:
    """Chain sums of one kind, the base policy that is trained on them, and how many rollouts of it there are."""

    name: str
    num_summands: int = 3
    carry_drop: float = 0.4
    epochs: float = 7
    """Epochs over the demonstrations: how well the base is trained."""
    num_prompts: int = 64
    num_rollouts: int = 16
    aligned: bool = False
    """Summands as wide as the sums: a base of this size learns long sums so, and not otherwise."""

    @property
    def max_new_tokens(self) -> int:
        """The length of an answer, its end token, and a few more."""
        width = len(str(99 * self.num_summands))
        return (self.num_summands - 1) * (width + 1) + 4

    def passes(self, steps: int) -> float:
        """Epochs that make so many optimizer steps."""
        return steps * BATCH / (self.num_prompts * self.num_rollouts)


MAIN = Task("main")


@dataclass
class Round:
    """The artifacts that all arms of a round start from."""

    graph: Graph
    task: Task
    seed: int
    base: Path
    hf: Path
    number: int = 1
    origin: Path | None = None
    """The Hugging Face folder of the first round's base, in later rounds."""
    policies: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = f"{_base_key(self.task)}/seed-{self.seed}"
        size = f"{self.task.num_prompts}p" + (f"-r{self.number}" if self.number > 1 else "")
        prompts = self.prepared / "prompts.jsonl"
        self.rollouts = self.graph.add(
            self.folder,
            "sample",
            {
                "verifier": VERIFIER,
                "num_prompts": self.task.num_prompts,
                "num_rollouts": self.task.num_rollouts,
                "max_new_tokens": self.task.max_new_tokens,
                "seed": self.seed + 100 * (self.number - 1),
            },
            {"model": self.hf, "prompts": prompts},
            label=f"rollouts-{size}",
            run_flags={"batch_size": 1024},
        )
        self.log_probs = self.graph.add(
            self.folder,
            "precompute",
            {"kind": "token"},
            {"base": self.base, "rollouts": self.rollouts},
            label=f"base-log-probs-{size}",
            run_flags=LAYOUT,
        )

    @property
    def prepared(self) -> Path:
        return prepared(self.graph, self.task, self.seed)

    def teacher(self, label: str, steps: int = TEACHER_STEPS, **flags: Any) -> Path:
        """A policy of stage 1."""
        settings = {"epochs": self.task.passes(steps), "global_batch_size": BATCH, "seed": self.seed, **flags}
        return self.graph.add(
            self.folder,
            "train-teacher",
            {"learning_rate": LEARNING_RATE, **settings},
            {"base": self.base, "rollouts": self.rollouts, "base-log-probs": self.log_probs},
            label=label,
            run_flags=LAYOUT,
        )

    def cache(self, policies: Mapping[str, Path], label: str = "cache", **flags: Any) -> Path:
        """A teacher cache: with `kind="token"` log-probs alone, else the target too."""
        return self.graph.add(
            self.folder,
            "precompute",
            flags,
            {
                "base": self.base,
                "rollouts": self.rollouts,
                "policy": [f"{name}={path}" for name, path in policies.items()],
            },
            label=label,
            run_flags=LAYOUT,
        )

    def distill(self, label: str, cache: Path | None, steps: int = STUDENT_STEPS, **flags: Any) -> Path:
        """A policy of stage 2."""
        settings = {"epochs": self.task.passes(steps), "global_batch_size": BATCH, "seed": self.seed, **flags}
        inputs = {"base": self.base, "rollouts": self.rollouts, "base-log-probs": self.log_probs}
        return self.graph.add(
            self.folder,
            "distill",
            {"learning_rate": LEARNING_RATE, **settings},
            inputs | ({"cache": cache} if cache else {}),
            label=label,
            run_flags=LAYOUT,
        )

    def projection(
        self,
        label: str,
        signal: str,
        policies: Mapping[str, Path],
        delta: float = 0.12,
        steps: int = STUDENT_STEPS,
        divergence: str = "reverse_kl",
        **cache: Any,
    ) -> Path:
        """Stage 2 as a projection on a signal."""
        settings = {"signal": signal, "projection": "global", "delta": delta, "k": 8, **cache}
        target = self.cache(policies, f"cache-{label}", **settings)
        return self.distill(label, target, steps, divergence=None if divergence == "reverse_kl" else divergence)

    def gradient(
        self,
        label: str,
        signal: str | None,
        policies: Mapping[str, Path],
        budget: float = 0.1,
        steps: int = STUDENT_STEPS // 2,
        **flags: Any,
    ) -> Path:
        """Stage 2 as a policy gradient on a signal; `signal=None` is the control without a teacher."""
        if signal is None:
            flags = {"signal_weight": 0, "advantage_weight": 1, **flags}
            cache = None
        else:
            flags = {"signal": signal, **flags}
            cache = self.cache(policies, f"tokens-{'-'.join(policies)}", kind="token")
        return self.distill(label, cache, steps, form="policy_gradient", kl_budget=budget, **flags)

    def on_policy(self, label: str, updates: int, **flags: Any) -> Path:
        """GRPO on fresh rollouts for the round's prompts; each update takes as many as a batch of the others holds."""
        return self.graph.add(
            self.folder,
            "train-on-policy",
            {
                "verifier": VERIFIER,
                "num_prompts": self.task.num_prompts,
                "updates": updates,
                "prompts_per_update": BATCH // self.task.num_rollouts,
                "num_rollouts": self.task.num_rollouts,
                "max_new_tokens": self.task.max_new_tokens,
                "seed": self.seed,
                **flags,
            },
            {"base": self.base, "prompts": self.prepared / "prompts.jsonl"},
            label=label,
            run_flags=LAYOUT,
        )

    def export(self, policies: Mapping[str, Path | tuple[Path, int]], label: str) -> Path:
        """Hugging Face folders of policies; a pair names the iteration too."""
        texts = []
        for name, policy in policies.items():
            texts.append(f"{name}={policy[0]}@{policy[1]}" if isinstance(policy, tuple) else f"{name}={policy}")
        return self.graph.add(self.folder, "export", {}, {"checkpoint": texts}, label=f"export-{label}")

    def evaluate(self, policies: Mapping[str, Path | tuple[Path, int]], label: str) -> Path:
        """Figures of the base and these policies, a file each."""
        exported = self.export(policies, label)
        models: dict[str, Path | list[str]] = {"model": [f"base={self.hf}"]}
        if self.origin is not None:
            models["origin"] = self.origin
        return self.graph.add(
            self.folder,
            "evaluate",
            {
                "verifier": VERIFIER,
                "num_prompts": NUM_HELDOUT,
                "num_samples": 4,
                "num_rollouts": 128,
                "max_new_tokens": self.task.max_new_tokens,
            },
            {
                **models,
                "exported": exported,
                "prompts": self.prepared / "heldout.jsonl",
                "rollouts": self.rollouts,
            },
            label=f"evaluation-{label}",
            run_flags={"batch_size": 1024},
        )


def prepared(graph: Graph, task: Task, seed: int) -> Path:
    """Prompts, demonstrations and an untrained model."""
    flags = {"num_summands": task.num_summands, "carry_drop": task.carry_drop, "seed": seed, "aligned": task.aligned}
    return graph.add(f"{_base_key(task)}/seed-{seed}", "prepare", flags)


def first_round(graph: Graph, task: Task, seed: int) -> Round:
    """The round that starts from a base trained on demonstrations that drop carries."""
    folder, source = f"{_base_key(task)}/seed-{seed}", prepared(graph, task, seed)
    initial = graph.add(folder, "import", {}, {"hf": source / "model"}, label="initial")
    base = graph.add(
        folder,
        "train-teacher",
        {
            "loss": "sft",
            "epochs": task.epochs,
            "global_batch_size": 128,
            "learning_rate": 4e-3,
            "min_learning_rate": 4e-4,
            "warmup_fraction": 0.02,
            "seed": seed,
        },
        {"base": initial, "rollouts": source / "demonstrations.parquet"},
        label="base",
        run_flags=LAYOUT,
    )
    exported = graph.add(folder, "export", {}, {"checkpoint": [f"base={base}"]}, label="base-hf")
    return Round(graph, task, seed, base, exported / "base")


def next_round(previous: Round, student: Path, label: str) -> Round:
    """The round that starts from a student."""
    hf = previous.export({label: student}, f"next-{label}") / label
    origin = previous.origin or previous.hf
    return Round(previous.graph, previous.task, previous.seed, student, hf, previous.number + 1, origin)


def _base_key(task: Task) -> str:
    """What tells bases apart; tasks that differ in the number of prompts alone share theirs."""
    aligned = "-aligned" if task.aligned else ""
    return f"n{task.num_summands}{aligned}-drop{task.carry_drop}-epochs{task.epochs:g}"
