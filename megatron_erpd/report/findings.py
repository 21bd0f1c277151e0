"""Is the student better than the base, and the teacher? In words, with the settings to look at first where it isn't.

Better is: by more than two standard errors of the difference in held-out reward, as in `evaluation.strength`. Which
settings are most likely at fault is told by what was seen; the rules and their limits are this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron_erpd.data.rollout_warnings import MANY
from megatron_erpd.evaluation.strength import STRONG_ABOVE, WORSE_BELOW, recommend_signal

if TYPE_CHECKING:
    from megatron_erpd.report.collect import PolicyFigures, Round, Run

FAR_NATS = 3.0
"""KL(policy || base) per response: in docs/study.md students that are better than their base lie below 1 nat, and
policies above 3 are worse than it."""
NEAR_NATS = 0.02
"""KL per response: no event's probability, and so no accuracy, differs by more than sqrt(0.02 / 2) = 0.1 (Pinsker)."""
COLLAPSED = 0.25
"""Entropy per token as a share of the base's, below which a policy says almost always the same."""
CUT_OFF = 0.2
"""Share of responses that met `max_new_tokens`."""
HARD = 0.02
"""Accuracy of the base below which hardly any rollout is right."""
NUM_SETTINGS = 3

Comparison = Literal["better", "same", "worse", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What the held-out rewards say of a policy.

    Attributes:
        policy: its name; in runs of several rounds with the round's, as `round-02/student`.
        level: better or worse than the round's base by more than two standard errors, the same within these, or
            unknown.
        text: the comparison, and what was seen of the policy where it isn't better.
        settings: those most likely at fault, as `student.learning_rate (0.0001)`, the likeliest first.
    """

    policy: str
    level: Comparison
    text: str
    settings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text + (f"; look at {', '.join(self.settings)}" if self.settings else "")


def findings(run: Run) -> list[Finding]:
    """On the student and the teachers of every round, the student first."""
    rounds = [round_ for round_ in run.rounds if round_.policies or round_.selection]
    return [finding for round_ in rounds for finding in _of_round(round_, f"{round_.name}/" * (len(rounds) > 1))]


def _of_round(round_: Round, prefix: str) -> Iterator[Finding]:
    base = round_.policy("base")
    judged = [policy for role in ("student", "teacher") for policy in round_.results if policy.role == role]
    if base is not None:
        teachers = [_difference(policy) for policy in judged if policy.role == "teacher"]
        strong = any(_level(*found) == "better" for found in teachers if found) or not teachers
        for policy in judged:
            yield _judge(policy, base, round_, prefix, strong)
    elif round_.selection:
        yield _selected(round_, prefix)


def _judge(policy: PolicyFigures, base: PolicyFigures, round_: Round, prefix: str, has_strong_teacher: bool) -> Finding:
    name, difference = prefix + policy.name, _difference(policy)
    if difference is None:
        missing = "accuracy_sampled" not in policy.metrics or "accuracy_sampled" not in base.metrics
        why = "no held-out response was verified" if missing else "one held-out prompt has no standard error"
        settings = ["evaluation.verifier"] if missing else ["evaluation.num_prompts"]
        return Finding(name, "unknown", f"whether {name} is better than base isn't known: {why}", settings)
    level = _level(*difference)
    ours, theirs = policy.metrics["accuracy_sampled"], base.metrics["accuracy_sampled"]
    nats, prompts = policy.metrics.get("kl_per_sequence"), policy.metrics.get("num_prompts")
    text = f"{name} {_words(level)} base: {ours:.3f} vs {theirs:.3f}, {_plus_minus(*difference)}"
    text += f" on {prompts:.0f} held-out prompts" if prompts else ""
    text += f", {nats:.3g} nats per response" if nats is not None else ""
    if level == "better":
        return Finding(name, level, text)
    if policy.role == "teacher":
        text += f". {_signal(*difference, round_)}"
    return _with_symptoms(Finding(name, level, text), list(_symptoms(policy, base, round_, has_strong_teacher)))


def _selected(round_: Round, prefix: str) -> Finding:
    """On the teacher, by the validation prompts, while nothing is evaluated."""
    assert round_.selection is not None
    chosen, name = round_.selection.chosen, f"{prefix}teacher"
    difference = chosen["difference"], chosen["difference_se"]
    level = _level(*difference)
    text = (
        f"{name} {_words(level)} base: {chosen['reward']:.3f} vs {round_.selection.base['reward']:.3f}, "
        f"{_plus_minus(*difference)} on {round_.selection.num_prompts} validation prompts"
    )
    if level == "better":
        return Finding(name, level, text)
    found = [*_of_the_rollouts(round_), _undecided("teacher", _settings(round_, "teacher"))]
    return _with_symptoms(Finding(name, level, f"{text}. {_signal(*difference, round_)}"), found)


def _difference(policy: PolicyFigures) -> tuple[float, float] | None:
    """Held-out reward minus the base's, and its standard error."""
    gained, error = (policy.metrics.get(name) for name in ("reward_gained", "reward_gained_se"))
    return None if gained is None or error is None else (gained, error)


def _level(difference: float, error: float) -> Comparison:
    if difference > STRONG_ABOVE * error:
        return "better"
    return "worse" if difference < WORSE_BELOW * error else "same"


def _words(level: Comparison) -> str:
    return {"better": "better than", "worse": "worse than", "same": "not better than", "unknown": ""}[level]


def _plus_minus(difference: float, error: float) -> str:
    return f"{difference:+.3f} ± {error:.3f}"


def _signal(difference: float, error: float, round_: Round) -> str:
    """Which signal suits a teacher that isn't better."""
    has_unlearned = any(policy.role == "unlearned" for policy in round_.policies) or any(
        stage.name == f"{round_.name}/unlearned" for stage in round_.stages
    )
    suits = recommend_signal(difference, error, has_unlearned=True).signal
    needs = "" if has_unlearned else ", which needs the section `unlearned`"
    return f"The signal that suits such a teacher is {suits}{needs}"


@dataclass(frozen=True)
class _Symptom:
    """What was seen, in words that follow a semicolon, and the settings that it speaks for."""

    seen: str
    settings: Sequence[str]


def _with_symptoms(finding: Finding, symptoms: Sequence[_Symptom]) -> Finding:
    """Adds the likeliest settings, and those sightings that speak for them."""
    settings: list[str] = []
    seen = []
    for symptom in symptoms:
        new = [setting for setting in symptom.settings if setting not in settings]
        if len(settings) < NUM_SETTINGS and new:
            settings += new
            seen.append(symptom.seen)
    text = "; ".join([finding.text, *filter(None, seen)])
    return Finding(finding.policy, finding.level, text, settings[:NUM_SETTINGS])


def _symptoms(
    policy: PolicyFigures, base: PolicyFigures, round_: Round, has_strong_teacher: bool
) -> Iterator[_Symptom]:
    """What was seen of a policy that isn't better than its base, the most telling first."""
    ours, theirs = policy.metrics, base.metrics
    where = policy.role if policy.name in ("student", "teacher") else f"teachers.{policy.name}"
    settings = _settings(round_, policy.name if policy.name == where else where.replace(".", "/"))
    difference, error = ours["reward_gained"], ours["reward_gained_se"]
    if 0 < error < difference:
        yield _Symptom("more prompts may tell the difference", ["evaluation.num_prompts"])
    nats, entropy = ours.get("kl_per_sequence", 0.0), ours.get("entropy", 0.0)
    before = theirs.get("entropy", 0.0)
    if nats > FAR_NATS:
        yield _Symptom("it went far from the base", _strength(where, settings, round_))
    elif nats > NEAR_NATS and entropy < COLLAPSED * before:
        seen = f"its entropy collapsed, from {before:.3g} to {entropy:.3g} nats per token"
        yield _Symptom(seen, _strength(where, settings, round_))
    elif nats < NEAR_NATS:
        yield _Symptom("it hardly moved: these may be too small", _strength(where, settings, round_))
    yield from _of_the_rollouts(round_)
    cut = max(ours.get("truncated", 0.0), theirs.get("truncated", 0.0))
    if cut >= CUT_OFF:
        places = ["rollouts.max_new_tokens", "evaluation.max_new_tokens"]
        yield _Symptom(f"{cut:.0%} of the held-out responses are cut off", places)
    if theirs["accuracy_sampled"] < HARD:
        yield _Symptom("the base hardly ever solves a prompt", ["rollouts.prompts", "rollouts.verifier"])
    if policy.role == "student" and not has_strong_teacher:
        yield _Symptom("its teacher isn't better either", ["cache.signal", "teacher.learning_rate", "teacher.epochs"])
    yield _undecided(where, settings)


def _strength(where: str, settings: dict[str, Any], round_: Round) -> list[str]:
    """What decides how far a training goes."""
    if where != "student":
        third = ("max_kl",) if "max_kl" in settings else ()
        return _named(where, settings, "learning_rate", "epochs", *third)
    if settings.get("form") == "policy_gradient":
        return _named(where, settings, "learning_rate", "epochs", "kl_budget")
    if settings.get("teacher", "cache") != "cache":
        return _named(where, settings, "learning_rate", "epochs", "delta")
    region = _named("cache", _settings(round_, "cache"), "delta")
    return [*_named(where, settings, "learning_rate", "epochs"), *region]


def _undecided(where: str, settings: dict[str, Any]) -> _Symptom:
    """Where nothing else was seen, or not enough of it."""
    return _Symptom("", _named(where, settings, "learning_rate", "epochs", "global_batch_size"))


def _of_the_rollouts(round_: Round) -> Iterator[_Symptom]:
    for stage in ("teacher", "rewards", "rollouts"):
        figures = _summary(round_, stage)
        groups = figures.get("groups", figures.get("num_groups", 0))
        without = figures.get("groups_without_signal", figures.get("zero_variance_groups", 0))
        if groups and without >= MANY * groups:
            places = ["rollouts.num_rollouts", "rollouts.prompts", "rollouts.temperature"]
            yield _Symptom(f"{without} of {groups} groups of rollouts teach nothing", places)
            return


def _settings(round_: Round, stage: str) -> dict[str, Any]:
    return next((s.manifest.settings for s in round_.stages if s.name == f"{round_.name}/{stage}"), {})


def _summary(round_: Round, stage: str) -> dict[str, Any]:
    return next((s.manifest.summary for s in round_.stages if s.name == f"{round_.name}/{stage}"), {})


def _named(where: str, settings: dict[str, Any], *names: str) -> list[str]:
    """Settings as a recipe names them, with their values where these are known."""
    found = []
    for name in names:
        value = settings.get(name)
        shown = "" if value is None else f" ({value:g})" if isinstance(value, int | float) else f" ({value})"
        found.append(f"{where}.{name}{shown}")
    return found
