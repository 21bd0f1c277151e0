"""Reads a run's folder into figures: evaluations, training curves, what each stage took.

Every piece may be missing (a run that is not finished, without an unlearned policy, without controls, without a cache):
what is there is reported. A file that is there but unreadable is an error that names it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_erpd.errors import StageError
from megatron_erpd.evaluation.mismatch import Mismatch
from megatron_erpd.evaluation.mismatch_verdicts import MISMATCH, mismatch_report, read_mismatch
from megatron_erpd.evaluation.strength import SelectionResult, read_selection
from megatron_erpd.files import write_json
from megatron_erpd.manifest import MANIFEST, METRICS, REQUEST, WARNINGS, Manifest, read_manifest
from megatron_erpd.report.findings import findings

ROLES = ("base", "teacher", "unlearned", "student", "control")
"""What a policy is in a round. A name that is none of the first four is a further teacher's or a control's."""


@dataclass(frozen=True)
class PolicyFigures:
    """One evaluated policy."""

    name: str
    """`student`, or `teacher@32` for the checkpoint at iteration 32."""
    metrics: dict[str, float]
    """The numbers of its evaluation, with `reward_gained` and `kl_efficiency` where they are defined."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Prompts with `greedy` and `samples`: a response and its reward each."""
    prompt_rewards: list[float | None] = field(default_factory=list)
    """Mean reward of each held-out prompt; empty in evaluations of the version before."""
    is_further_teacher: bool = False
    """Whether it is one of the recipe's `teachers`, under a name of the user's own."""

    @property
    def family(self) -> str:
        return self.name.split("@")[0]

    @property
    def role(self) -> str:
        if self.is_further_teacher:
            return "teacher"
        return self.family if self.family in ROLES else "control"

    @property
    def iteration(self) -> int | None:
        """The iteration of a checkpoint on the way; None for a result."""
        _, _, iteration = self.name.partition("@")
        return int(iteration) if iteration.isdigit() else None


@dataclass(frozen=True)
class Curve:
    """The steps of one training, as its `metrics.jsonl` has them."""

    name: str
    rows: list[dict[str, float]]

    def series(self, *metrics: str) -> tuple[list[int], list[float]]:
        """Iterations and values of the first of these metrics that was logged; `loss` stands for `stage1/loss` too."""
        for metric in metrics:
            for key in (metric, f"stage1/{metric}", f"stage2/{metric}"):
                points = [(int(r["iteration"]), r[key]) for r in self.rows if math.isfinite(r.get(key, math.nan))]
                if points:
                    return [p[0] for p in points], [p[1] for p in points]
        return [], []

    @property
    def is_training(self) -> bool:
        """Whether these are steps of a training: other stages log how they went, too."""
        return any(key.startswith(("stage1/", "stage2/")) for row in self.rows for key in row)

    @property
    def stage(self) -> int:
        """2 for a distillation, 1 for a replay (or a warm-up)."""
        return 2 if any(key.startswith("stage2/") for row in self.rows for key in row) else 1


@dataclass(frozen=True)
class StageRecord:
    """One finished artifact."""

    name: str
    """Its folder in the run, as `round-01/teacher`."""
    manifest: Manifest

    @property
    def seconds(self) -> float | None:
        """What the stage took, where its manifest says."""
        value = self.manifest.summary.get("seconds")
        return float(value) if isinstance(value, int | float) else None

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(record["size"]) for record in self.manifest.files.values())

    @property
    def figures(self) -> dict[str, Any]:
        """The scalars of the manifest's summary and of its `figures` in turn, but for the time."""
        return {k: v for k, v in self.manifest.summary.items() if k != "seconds" and isinstance(v, int | float | str)}

    @property
    def warnings(self) -> list[str]:
        """What people should know of it."""
        return list(self.manifest.summary.get(WARNINGS, []))


@dataclass(frozen=True)
class Round:
    """One round: from a base policy to a student."""

    name: str
    folder: Path
    policies: list[PolicyFigures]
    curves: list[Curve]
    stages: list[StageRecord]
    target: dict[str, dict[str, float]]
    """Of the cached target: mean, min and max over the tokens of `eta` and of `target_kl` (in nats)."""
    selection: SelectionResult | None = None
    """How the teacher was chosen among its checkpoints, where it was."""
    mismatch: Mismatch | None = None
    """The sampler's log-probs against the training engine's, where precompute has compared them."""

    def policy(self, name: str) -> PolicyFigures | None:
        return next((p for p in self.policies if p.name == name), None)

    @property
    def results(self) -> list[PolicyFigures]:
        """The policies without the checkpoints on the way."""
        return [p for p in self.policies if p.iteration is None]


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    name: str
    folder: Path
    rounds: list[Round]
    preparation: list[StageRecord]
    """What was made before the rounds, by the recipe's own command."""
    recipe: str
    """The recipe's text as run; empty where there is none."""

    @property
    def evaluated(self) -> list[Round]:
        """The rounds with evaluations."""
        return [r for r in self.rounds if r.policies]

    @property
    def stages(self) -> list[StageRecord]:
        """All finished artifacts in the order in which they were finished."""
        records = self.preparation + [stage for round_ in self.rounds for stage in round_.stages]
        return sorted(records, key=lambda s: s.manifest.created)

    @property
    def warnings(self) -> list[tuple[str, list[str]]]:
        """What people should know of the artifacts: each warning once, with the stages that gave it."""
        found: dict[str, list[str]] = {}
        for stage in self.stages:
            for warning in stage.warnings:
                found.setdefault(warning, []).append(stage.name)
        return list(found.items())

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages, as the last artifact recorded them."""
        return self.stages[-1].manifest.versions if self.stages else {}


def collect_run(run_dir: str | Path) -> Run:
    """Reads a run's folder.

    Raises:
        StageError: no such folder, no round in it, or a file that can't be read; the message names it.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise StageError(f"{folder}: no such folder; give the folder of a run, as runs/NAME")
    rounds = [_collect_round(path) for path in sorted(folder.glob("round-*")) if path.is_dir()]
    if not rounds:
        raise StageError(f"{folder}: holds no round-01; start the run with 'megatron-erpd run'")
    preparation = [StageRecord(path.name, read_manifest(path)) for path in _finished([folder / "prepare"])]
    recipe = folder / "recipe.yaml"
    text = recipe.read_text() if recipe.is_file() else ""
    return Run(folder.resolve().name, folder, rounds, preparation, text)


def summarise(run: Run) -> dict[str, Any]:
    """The run's figures as JSON: `policies` (of later rounds as `round-02/NAME`), the same in `rounds` (a name and the
    policies of each evaluated round), `targets`, `selections`, `mismatches`, `findings` (is the student better than the
    base, and the teacher?), `warnings` and `stages`.

    Standard errors are the keys that end in `_se`; rewards are means over held-out prompts, divergences are in nats.
    """
    rounds = run.evaluated
    policies = {
        (policy.name if round_ is rounds[0] else f"{round_.name}/{policy.name}"): policy.metrics
        for round_ in rounds
        for policy in round_.policies
    }
    stages = {
        stage.name: {"stage": stage.manifest.stage, "seconds": stage.seconds, "bytes": stage.size, **stage.figures}
        for stage in run.stages
    }
    targets = {round_.name: round_.target for round_ in run.rounds if round_.target}
    selections = {round_.name: asdict(round_.selection) for round_ in run.rounds if round_.selection}
    mismatches = {round_.name: mismatch_report(round_.mismatch) for round_ in run.rounds if round_.mismatch}
    return {
        "name": run.name,
        "policies": policies,
        "rounds": [{"name": r.name, "policies": {p.name: p.metrics for p in r.policies}} for r in rounds],
        "targets": targets,
        "selections": selections,
        "mismatches": mismatches,
        "findings": [asdict(finding) | {"text": str(finding)} for finding in findings(run)],
        "warnings": [{"text": text, "stages": names} for text, names in run.warnings],
        "stages": stages,
        "versions": run.versions,
    }


def write_summary(run: Run, path: Path) -> dict[str, Any]:
    """Writes `summarise(run)` to `path` by rename, and returns it."""
    summary = summarise(run)
    write_json(path, summary)
    return summary


def _collect_round(folder: Path) -> Round:
    evaluations = sorted((folder / "evaluation").glob("*.json"))
    teachers = {path.name for path in folder.glob("teachers/*")}
    policies = [_read_policy(path, teachers) for path in evaluations if path.name not in (MANIFEST, REQUEST)]
    base = next((p for p in policies if p.name == "base"), None)
    policies = [_with_efficiency(policy, base) for policy in policies]
    policies.sort(key=lambda p: (ROLES.index(p.role), p.family, math.inf if p.iteration is None else p.iteration))
    named = [*sorted(folder.glob("teachers/*")), *sorted(folder.glob("controls/*"))]
    artifacts = [*sorted(p for p in folder.iterdir() if p.is_dir()), *named]
    stages = [StageRecord(f"{folder.name}/{p.relative_to(folder)}", read_manifest(p)) for p in _finished(artifacts)]
    curves = [Curve(p.name, _read_lines(p / METRICS)) for p in artifacts if (p / METRICS).is_file()]
    chosen = folder / "selection"
    selection = read_selection(chosen) if (chosen / MANIFEST).is_file() else None
    curves = [curve for curve in curves if curve.is_training]
    log_probs = folder / "base-log-probs"
    mismatch = read_mismatch(log_probs) if (log_probs / MISMATCH).is_file() else None
    return Round(folder.name, folder, policies, curves, stages, _target(folder / "cache"), selection, mismatch)


def _target(cache: Path) -> dict[str, dict[str, float]]:
    index = cache / "cache.json"
    if not index.is_file():
        return {}
    try:
        return json.loads(index.read_text()).get("statistics") or {}
    except (json.JSONDecodeError, AttributeError) as error:
        raise StageError(f"{index}: not a cache's index ({error}); delete the folder and precompute again") from None


def _finished(folders: list[Path]) -> Iterator[Path]:
    return (folder for folder in folders if (folder / MANIFEST).is_file())


def _read_policy(path: Path, teachers: set[str]) -> PolicyFigures:
    try:
        record = json.loads(path.read_text())
        measured: dict[str, Any] = {}
        for name, value in record["metrics"].items():  # of `pass_at`, a figure for each k: `pass_at_8`
            measured |= {f"{name}_{k}": of_k for k, of_k in value.items()} if isinstance(value, dict) else {name: value}
        # What wasn't measured (accuracy without a verifier, say) is null.
        numbers = {name: float(value) for name, value in measured.items() if value is not None}
        examples, rewards = list(record["examples"]), list(record.get("prompt_rewards", []))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(f"{path}: not an evaluation ({error}); delete the folder and run 'evaluate' again") from None
    metrics = {k: v for k, v in numbers.items() if math.isfinite(v)}
    return PolicyFigures(path.stem, metrics, examples, rewards, is_further_teacher=path.stem.split("@")[0] in teachers)


def _with_efficiency(policy: PolicyFigures, base: PolicyFigures | None) -> PolicyFigures:
    """Adds the reward gained over the base, and the gain per nat of KL(policy || base) per sequence."""
    if base is None or policy is base or not {"accuracy_sampled"} <= base.metrics.keys() & policy.metrics.keys():
        return policy
    gained = policy.metrics["accuracy_sampled"] - base.metrics["accuracy_sampled"]
    error = _error_of_gain(policy, base)
    derived = {"reward_gained": gained} | ({} if error is None else {"reward_gained_se": error})
    nats = policy.metrics.get("kl_per_sequence", 0.0)
    # A KL that the estimate can't tell from 0 gives no ratio worth printing.
    if nats > 2 * policy.metrics.get("kl_per_sequence_se", 0.0) and nats > 1e-3:
        derived["kl_efficiency"] = gained / nats
    return replace(policy, metrics=policy.metrics | derived)


def _error_of_gain(policy: PolicyFigures, base: PolicyFigures) -> float | None:
    """The standard error of the reward gained over the base: of the differences prompt by prompt, where both have them,
    else of two independent means (which is larger, as both policies find the same prompts hard)."""
    both = [
        ours - theirs
        for ours, theirs in zip(policy.prompt_rewards, base.prompt_rewards, strict=False)
        if ours is not None and theirs is not None
    ]
    if len(policy.prompt_rewards) == len(base.prompt_rewards) and len(both) > 1:
        return statistics.stdev(both) / math.sqrt(len(both))
    errors = [e for p in (policy, base) if (e := p.metrics.get("accuracy_sampled_se")) is not None]
    return math.hypot(*errors) if len(errors) == 2 else None


def _read_lines(path: Path) -> list[dict[str, float]]:
    """The steps of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = path.read_text().splitlines()
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(
                {k: float(v) for k, v in row.items() if isinstance(v, int | float)} | {"iteration": row["iteration"]}
            )
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise StageError(f"{path}: line {number} is not a step ({error}); run the stage again") from None
    return rows
