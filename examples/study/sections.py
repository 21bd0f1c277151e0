"""The sections of the study: which arms are compared, and how the methods that a user could pick instead are tuned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arms import MAIN, TEACHER_RATE, TEACHER_STEPS, Round, Task, first_round, next_round
from graph import Graph

TUNING_SEED = 101
"""Settings are chosen on this seed's base, rollouts and held-out problems; no table shows it."""
EPOCH = 4
"""Optimizer steps of one pass over the main task's 1,024 rollouts."""
CHECKPOINTS = (4, 8, 16, 32, 64)
"""Epochs at which stage 1 is looked at."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One evaluated policy: `file` is `NAME.json` of an evaluation."""

    section: str
    setting: str
    """What the section varies beside the arm: a task, or ''."""
    arm: str
    seed: int
    file: Path
    config: Config


@dataclass(frozen=True)
class Method:
    """A way from a base and its rollouts to a better policy, and the six settings among which it was tuned."""

    name: str
    title: str
    build: Callable[..., Path]
    grid: tuple[Config, ...]


class Study:
    """Collects the jobs of sections in a graph, and what their evaluations mean."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.records: list[Record] = []

    def evaluate(
        self,
        section: str,
        setting: str,
        round_: Round,
        arms: Mapping[str, Path | tuple[Path, int]],
        configs: Mapping[str, Config] | None = None,
        base: bool = False,
    ) -> None:
        """Evaluates arms of a section; with `base` the round's base is one of them."""
        folder = round_.evaluate(arms, f"{section}-{setting}" if setting else section)
        for arm in [*(["base"] if base else []), *arms]:
            config = (configs or {}).get(arm, {})
            self.records.append(Record(section, setting, arm, round_.seed, folder / f"{arm}.json", config))


def unlearned_policy(round_: Round) -> Path:
    """A policy that was trained to be wrong."""
    return round_.teacher("unlearned", steps=32, loss="ce", unlearn=True)


def _grid(**values: tuple[Any, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values()))


def _projection(round_: Round, delta: float, steps: int) -> Path:
    return round_.projection("erpd-projection", "strong", {"teacher": ce_teacher(round_)}, delta, steps)


def _gradient(round_: Round, budget: float, steps: int, **flags: Any) -> Path:
    return round_.gradient("erpd-gradient", "strong", {"teacher": ce_teacher(round_)}, budget, steps, **flags)


def _sequence_advantage(round_: Round, budget: float, steps: int) -> Path:
    return round_.gradient("sequence-advantage", None, {}, budget, steps)


def _replay(label: str, **fixed: Any) -> Callable[..., Path]:
    def build(round_: Round, steps: int, **flags: Any) -> Path:
        return round_.teacher(label, steps, **fixed, **flags)

    return build


def _on_policy(round_: Round, updates: int, learning_rate: float) -> Path:
    return round_.on_policy("on-policy", updates, learning_rate=learning_rate)


METHODS = (
    Method("erpd_projection", "ERPD, projection", _projection, _grid(delta=(0.06, 0.12, 0.24), steps=(32, 64))),
    Method("erpd_gradient", "ERPD, policy gradient", _gradient, _grid(budget=(0.05, 0.1, 0.2), steps=(32, 64))),
    Method(
        "sequence_advantage",
        "sequence advantage under a KL budget",
        _sequence_advantage,
        _grid(budget=(0.05, 0.1, 0.2), steps=(32, 64)),
    ),
    Method("sapo", "SAPO", _replay("sapo", loss="sapo"), _grid(steps=(8, 16, 32), learning_rate=(1e-4, 4e-4))),
    Method(
        "sapo_kl",
        "SAPO with a KL penalty",
        _replay("sapo-kl", loss="sapo"),
        _grid(steps=(32, 64), kl_coefficient=(0.1, 0.3, 1.0)),
    ),
    Method(
        "ppo_tight",
        "PPO with clip 0.2",
        _replay("ppo-tight", loss="ppo"),
        _grid(steps=(64, 256), learning_rate=(1e-4, 4e-4, 1e-3)),
    ),
    Method(
        "ppo_loose",
        "PPO with clip 0.9 / 9",
        _replay("ppo-loose", loss="ppo", clip_low=0.9, clip_high=9.0),
        _grid(steps=(16, 32, 64), learning_rate=(1e-4, 4e-4)),
    ),
    Method(
        "sft",
        "SFT on correct rollouts",
        _replay("sft", loss="sft"),
        _grid(steps=(16, 64, 256), learning_rate=(1e-4, 4e-4)),
    ),
    Method(
        "on_policy_same_data",
        "on-policy GRPO on as many rollouts",
        _on_policy,
        _grid(updates=(4,), learning_rate=(1e-4, 2e-4, 4e-4, 1e-3, 2e-3, 4e-3)),
    ),
    Method(
        "on_policy",
        "on-policy GRPO on 16 times as many rollouts",
        _on_policy,
        _grid(updates=(32, 64), learning_rate=(1e-4, 4e-4, 1e-3)),
    ),
)


def tuning(study: Study) -> None:
    """Every setting of every method, once."""
    round_ = first_round(study.graph, MAIN, TUNING_SEED)
    for method in METHODS:
        arms = {f"{method.name}-{i}": method.build(round_, **config) for i, config in enumerate(method.grid)}
        configs = {f"{method.name}-{i}": config for i, config in enumerate(method.grid)}
        study.evaluate("tuning", method.name, round_, arms, configs)


STAGE1: dict[str, tuple[int, dict[str, Any]]] = {
    "ce": (64, {"loss": "ce", "learning_rate": TEACHER_RATE}),
    "mse": (64, {"loss": "mse", "learning_rate": TEACHER_RATE}),
    "sapo": (64, {"loss": "sapo"}),
    "ppo-loose": (32, {"loss": "ppo", "clip_low": 0.9, "clip_high": 9.0}),
    "ppo-tight": (32, {"loss": "ppo"}),
    "gspo": (32, {"loss": "gspo"}),
    "cispo": (32, {"loss": "cispo"}),
    "sft": (32, {"loss": "sft"}),
    "sapo-kl0.03": (32, {"loss": "sapo", "kl_coefficient": 0.03}),
    "sapo-kl0.1": (32, {"loss": "sapo", "kl_coefficient": 0.1}),
    "sapo-kl0.3": (32, {"loss": "sapo", "kl_coefficient": 0.3}),
    "sapo-kl1": (32, {"loss": "sapo", "kl_coefficient": 1.0}),
}
"""Arm -> (epochs, flags): stage 1 without and with a constraint."""


def stage1_policy(round_: Round, arm: str) -> Path:
    """A policy of the section, whose checkpoints are kept every four epochs."""
    epochs, flags = STAGE1[arm]
    return round_.teacher(arm, EPOCH * epochs, checkpoints=epochs // 4, **flags)


def ce_teacher(round_: Round) -> Path:
    """The teacher of the main task: outcome cross-entropy, many more steps than are good for it."""
    return stage1_policy(round_, "ce")


def stage1(study: Study, round_: Round) -> None:
    """Stage-1 variants against epochs."""
    for arm, (epochs, _) in STAGE1.items():
        policy = stage1_policy(round_, arm)
        kept = {f"{arm}@{EPOCH * e}": e for e in CHECKPOINTS if e <= epochs}
        arms = {name: (policy, EPOCH * e) for name, e in kept.items()}
        configs = {name: {"arm": arm, "epochs": e} for name, e in kept.items()}
        study.evaluate("stage1", arm, round_, arms, configs, base=arm == "ce")


FORMS = {"projection": (0.06, 0.12, 0.24), "policy gradient": (0.05, 0.1, 0.2)}


def weak_teacher(round_: Round) -> Path:
    """Stage 1 cut short: hardly better than the base."""
    return round_.teacher("weak", steps=8, loss="ce")


def drifted_teacher(round_: Round) -> Path:
    """Stage 1 gone wrong: below the base (the stage-1 section's `sapo`)."""
    return stage1_policy(round_, "sapo")


def signals_of(round_: Round) -> dict[str, tuple[str, dict[str, Path]]]:
    """Arm -> (signal, policies) of the signals section."""
    teacher, unlearned = ce_teacher(round_), unlearned_policy(round_)
    weak, drifted = weak_teacher(round_), drifted_teacher(round_)
    return {
        "strong": ("teacher/base", {"teacher": teacher}),
        "weak": ("weak/base", {"weak": weak}),
        "drifted": ("drifted/base", {"drifted": drifted}),
        "unlearned": ("weak/unlearned", {"weak": weak, "unlearned": unlearned}),
        "contrast": ("base/unlearned", {"unlearned": unlearned}),
        "mixed": ("0.5*teacher/base + 0.5*base/unlearned", {"teacher": teacher, "unlearned": unlearned}),
    }


def signals(study: Study, round_: Round) -> None:
    """Signals x forms x budgets, and the policies that the signals are made of."""
    for signal, (text, policies) in signals_of(round_).items():
        arms: dict[str, Path] = {}
        configs: dict[str, Config] = {}
        for form, budgets in FORMS.items():
            for budget in budgets:
                arm = f"{signal}-{form.replace(' ', '-')}-{budget}"
                build = round_.projection if form == "projection" else round_.gradient
                arms[arm] = build(arm, text, policies, budget)
                configs[arm] = {"signal": signal, "form": form, "budget": budget}
        study.evaluate("signals", signal, round_, arms, configs)
    policies = {"weak": weak_teacher(round_), "unlearned": unlearned_policy(round_)}
    study.evaluate("signals", "policies", round_, policies)


PROJECTION_ABLATIONS: dict[str, dict[str, Any]] = {
    "default (global, reverse KL, k = 8)": {},
    "forward KL": {"divergence": "forward_kl"},
    "JS": {"divergence": "js"},
    "per token": {"projection": "per_token"},
    "per token, forward KL": {"projection": "per_token", "divergence": "forward_kl"},
    "k = 1": {"k": 1},
    "k = 2": {"k": 2},
    "k = 4": {"k": 4},
    "full vocabulary (k = 17)": {"k": 17},
    "signal clipped at 2": {"projection_clip": 2.0},
    "eta up to 3": {"eta_max": 3.0},
}
GRADIENT_ABLATIONS: dict[str, dict[str, Any]] = {
    "default (clip 5, scale 1, PPO .9/9)": {},
    "signal clipped at 1": {"signal_clip": 1.0},
    "scale 4": {"signal_scale": 4.0},
    "sign agreement": {"sign_agreement": True},
    "plus sequence advantage": {"advantage_weight": 1.0},
    "PPO clip .2": {"clip_low": 0.2, "clip_high": 0.2},
    "SAPO": {"loss": "sapo"},
    "shuffled signal": {"shuffle_signal": True},
}
TEACHER_ABLATIONS = ("ce", "ce-mean", "mse", "sapo", "ppo-loose", "sft")
"""Teachers of a student each: the stage-1 section's, and `ce` on the averaged log-ratio."""


def ablations(study: Study, round_: Round) -> None:
    """One thing changed at a time."""
    teacher = {"teacher": ce_teacher(round_)}
    for setting, table in (("projection", PROJECTION_ABLATIONS), ("gradient", GRADIENT_ABLATIONS)):
        build = round_.projection if setting == "projection" else round_.gradient
        arms = {f"{setting}-{i}": build(f"{setting}-{i}", "strong", teacher, **f) for i, f in enumerate(table.values())}
        configs = {f"{setting}-{i}": {"arm": arm} for i, arm in enumerate(table)}
        study.evaluate("ablations", setting, round_, arms, configs)
    students: dict[str, Path] = {}
    for arm in TEACHER_ABLATIONS:
        if arm == "ce-mean":
            policy = round_.teacher(arm, **STAGE1["ce"][1], sequence_log_ratio="mean")
            students["ce-mean"] = policy
        else:
            policy = stage1_policy(round_, arm)
        students[f"student-of-{arm}"] = round_.projection(f"student-of-{arm}", "strong", {"teacher": policy})
    study.evaluate("ablations", "teacher", round_, students)


def baselines(study: Study, round_: Round, chosen: Mapping[str, Config], setting: str = "") -> None:
    """Every method at the setting that was chosen for it."""
    arms = {method.name: method.build(round_, **chosen[method.name]) for method in METHODS}
    study.evaluate("baselines", setting, round_, arms, dict(chosen), base=True)


SIX = Task("six", 6, 0.18, aligned=True)
AXES: dict[str, dict[str, Task]] = {
    "response length": {
        "3 summands": MAIN,
        "6 summands": SIX,
        "12 summands": Task("twelve", 12, 0.07, aligned=True),
    },
    "sparse rewards": {"6 summands, dense": SIX, "6 summands, sparse": replace(SIX, name="sparse", carry_drop=0.4)},
    "number of prompts": {
        "16 prompts": replace(MAIN, name="16p", num_prompts=16),
        "64 prompts": MAIN,
        "256 prompts": replace(MAIN, name="256p", num_prompts=256),
    },
    "quality of the base": {
        "carries dropped at .2": Task("good", 3, 0.2),
        "carries dropped at .4": MAIN,
        "under-trained": Task("young", 3, 0.4, epochs=2),
    },
}
AXIS_METHODS = ("erpd_projection", "erpd_gradient", "sequence_advantage", "sapo_kl", "sft", "on_policy")


def axes(study: Study, seed: int, chosen: Mapping[str, Config]) -> None:
    """ERPD and the strongest baselines where the task, the data or the base differ."""
    for task in {task for settings in AXES.values() for task in settings.values()} - {MAIN}:
        round_ = first_round(study.graph, task, seed)
        by_name = {method.name: method for method in METHODS}
        arms: dict[str, Path | tuple[Path, int]] = {
            name: by_name[name].build(round_, **chosen[name]) for name in AXIS_METHODS
        }
        arms |= {f"teacher@{step}": (ce_teacher(round_), step) for step in (32, 64, TEACHER_STEPS)}
        study.evaluate("axes", task.name, round_, arms, base=True)


ROUND_METHODS = ("erpd_projection", "sequence_advantage", "sft")


def rounds(study: Study, seed: int, chosen: Mapping[str, Config], number: int = 3) -> None:
    """Several rounds, each from the policy of the one before, with fresh rollouts."""
    by_name = {method.name: method for method in METHODS}
    for name in ROUND_METHODS:
        round_ = first_round(study.graph, MAIN, seed)
        for i in range(1, number + 1):
            policy = by_name[name].build(round_, **chosen[name])
            study.evaluate("rounds", f"{name}-{i}", round_, {name: policy}, {name: {"round": i}})
            if i < number:
                round_ = next_round(round_, policy, name)
