"""Writes the study's page: tables and verdicts made of the figures, and the plots beside it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Results, Row, difference, signed, verdict
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plots import draw
from sections import (
    AXES,
    AXIS_METHODS,
    CHECKPOINTS,
    FORMS,
    GRADIENT_ABLATIONS,
    METHODS,
    PROJECTION_ABLATIONS,
    ROUND_METHODS,
    STAGE1,
    TEACHER_ABLATIONS,
    TUNING_SEED,
)

ACCURACY, GREEDY, KL = "accuracy_sampled", "accuracy_greedy", "kl_per_sequence"
CONSTRAINTS = {"sapo": 0.0, "sapo-kl0.03": 0.03, "sapo-kl0.1": 0.1, "sapo-kl0.3": 0.3, "sapo-kl1": 1.0}
"""Stage-1 arms of claim 2 and the weight of their KL penalty."""
SECTIONS = ("stage1", "signals", "baselines", "ablations", "axes", "rounds")
DIRECT = ("sequence_advantage", "sapo_kl", "sft")
"""Methods of the axes that see the rollouts that ERPD sees."""
UNTIGHTENED = ("ce", "mse", "sapo", "ppo-loose", "cispo", "sft")
"""Stage-1 arms of claim 1: no KL penalty, no tight clip."""
WEAK = ("weak", "drifted", "unlearned", "contrast")
"""Signals of claim 4."""
TITLES = {method.name: method.title for method in METHODS}


def write_report(rows: Sequence[Row], chosen: Mapping[str, Mapping[str, Any]], page: Path) -> Path:
    """Writes `page` and its plots in `images/` beside it; returns the page's path.

    Args:
        rows: of `results.json`.
        chosen: the settings that tuning chose, by method.
    """
    results = Results(rows)
    page.parent.mkdir(parents=True, exist_ok=True)
    images = draw(results, page.parent / "images")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["signed"] = signed
    tables = {
        "stage1": stage1_table(results),
        "constraints": constraint_table(results),
        "students": student_table(results),
        "teachers": weak_table(results),
        "baselines": baseline_table(results),
        "axes": axis_tables(results),
    }
    text = environment.get_template("study.md.j2").render(
        **tables,
        claims=claims(tables),
        images=images,
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        methods=METHODS,
        titles=TITLES,
        chosen=chosen,
        tuning_seed=TUNING_SEED,
        untightened=UNTIGHTENED,
        weak_signals=WEAK,
        seeds={name: len(results.seeds(name)) for name in SECTIONS},
        checkpoints=CHECKPOINTS,
        signals=signal_table(results),
        forms=FORMS,
        tuned=tuning_table(results),
        ablations=ablation_tables(results),
        axis_methods=AXIS_METHODS,
        rounds=round_table(results),
    )
    page.write_text(text)
    return page


def claims(tables: Mapping[str, Any]) -> dict[int, str]:
    """Each of the method's four claims that there are figures for: held, held in part, or did not hold."""

    def word(holds: Sequence[bool], partly: bool | None = None) -> str:
        partly = any(holds) if partly is None else partly
        return "held" if all(holds) else "held in part" if partly else "did not hold"

    said: dict[int, str] = {}
    free = [row["drifts"] for row in tables["stage1"] if row["arm"] in UNTIGHTENED]
    if free:
        said[1] = word(free)
    tight = tables["constraints"][1:]
    if tight:
        said[2] = word([x for row in tight for x in (row["lowers"], not row["cured"])])
    ours = [row for row in tables["students"] if row["teacher"] == "ce"]
    if ours:
        said[3] = word([any(row["held"] for row in ours)], partly=any(row["no_worse"] for row in ours))
    weak = [row["all_better"] for row in tables["teachers"] if row["signal"] in WEAK]
    if weak:
        said[4] = word(weak)
    return said


def stage1_curve(results: Results, arm: str, metric: str) -> dict[int, dict[int, float]]:
    """Epochs to (seed to value) of a stage-1 arm's checkpoints."""
    names = {epochs: f"{arm}@{4 * epochs}" for epochs in CHECKPOINTS}
    curve = {epochs: results.values("stage1", arm, name, metric) for epochs, name in names.items()}
    return {epochs: values for epochs, values in curve.items() if values}


def best_epoch(results: Results, arm: str) -> int:
    """The checkpoint with the highest accuracy in mean over seeds."""
    curve = stage1_curve(results, arm, ACCURACY)
    return max(curve, key=lambda epochs: sum(curve[epochs].values()) / len(curve[epochs]))


def stage1_table(results: Results) -> list[dict[str, Any]]:
    """Each arm's accuracy and KL at its checkpoints; whether it ends below its best."""
    table = []
    for arm in STAGE1:
        accuracy = stage1_curve(results, arm, ACCURACY)
        if not accuracy:
            continue
        best, last = best_epoch(results, arm), max(accuracy)
        fall = difference(accuracy[last], accuracy[best]) if last != best else None
        cell = {e: results.spread("stage1", arm, f"{arm}@{4 * e}", ACCURACY) for e in CHECKPOINTS}
        table.append(
            {
                "arm": arm,
                "accuracy": cell,
                "kl": {e: results.spread("stage1", arm, f"{arm}@{4 * e}", KL) for e in CHECKPOINTS},
                "entropy": results.spread("stage1", arm, f"{arm}@{4 * last}", "entropy"),
                "best": best,
                "last": last,
                "fall": fall,
                "drifts": fall is not None and verdict(fall) == "behind",
                "gain": difference(accuracy[best], results.values("stage1", "ce", "base", ACCURACY)),
            }
        )
    return table


def constraint_table(results: Results) -> list[dict[str, Any]]:
    """SAPO under growing KL penalties, at the same epochs: its best accuracy, and what it loses afterwards."""
    table = []
    for arm, weight in CONSTRAINTS.items():
        accuracy = stage1_curve(results, arm, ACCURACY)
        accuracy = {epochs: values for epochs, values in accuracy.items() if epochs <= 32}
        if not accuracy:
            continue
        best = max(accuracy, key=lambda e: sum(accuracy[e].values()) / len(accuracy[e]))
        last = max(accuracy)
        table.append(
            {
                "weight": weight,
                "best_epoch": best,
                "best": results.spread("stage1", arm, f"{arm}@{4 * best}", ACCURACY),
                "best_kl": results.spread("stage1", arm, f"{arm}@{4 * best}", KL),
                "last": results.spread("stage1", arm, f"{arm}@{4 * last}", ACCURACY),
                "last_kl": results.spread("stage1", arm, f"{arm}@{4 * last}", KL),
                "fall": difference(accuracy[last], accuracy[best]),
                "values": accuracy[best],
            }
        )
    for row in table:
        row["over_free"] = difference(row["values"], table[0]["values"])
        row["lowers"] = verdict(row["over_free"]) == "behind"
        row["raises"] = verdict(row["over_free"]) == "ahead"
        row["cured"] = verdict(row["fall"]) != "behind"
    return table


def student_table(results: Results) -> list[dict[str, Any]]:
    """Students against the best checkpoint of their own teacher, seed by seed."""
    forms = [(form, budget) for form, budgets in FORMS.items() for budget in budgets]
    pairs = [
        *(
            ("ce", f"{form}, budget {budget}", "signals", "strong", f"strong-{form.replace(' ', '-')}-{budget}")
            for form, budget in forms
        ),
        *(
            (arm, "projection, budget 0.12", "ablations", "teacher", f"student-of-{arm}")
            for arm in TEACHER_ABLATIONS
            if arm in STAGE1 and arm != "ce"
        ),
    ]
    table = []
    for arm, title, section, setting, student in pairs:
        accuracy = results.values(section, setting, student, ACCURACY)
        if not accuracy or not stage1_curve(results, arm, ACCURACY):
            continue
        best, last = best_epoch(results, arm), max(stage1_curve(results, arm, ACCURACY))
        name, final = f"{arm}@{4 * best}", f"{arm}@{4 * last}"
        gap = difference(accuracy, results.values("stage1", arm, name, ACCURACY))
        teacher_kl = results.spread("stage1", arm, name, KL)
        final_kl = results.spread("stage1", arm, final, KL)
        student_kl = results.spread(section, setting, student, KL)
        if gap is None or teacher_kl is None or student_kl is None or final_kl is None:
            continue
        ratio = student_kl.mean / teacher_kl.mean
        table.append(
            {
                "teacher": arm,
                "student": title,
                "best": best,
                "teacher_accuracy": results.spread("stage1", arm, name, ACCURACY),
                "teacher_kl": teacher_kl,
                "final_accuracy": results.spread("stage1", arm, final, ACCURACY),
                "final_kl": final_kl,
                "accuracy": results.spread(section, setting, student, ACCURACY),
                "kl": student_kl,
                "gap": gap,
                "ratio": ratio,
                "final_ratio": student_kl.mean / final_kl.mean,
                "no_worse": verdict(gap) != "behind",
                "third": ratio <= 1 / 3,
                "held": gap.mean >= 0 and ratio <= 1 / 3,
            }
        )
    return table


def weak_table(results: Results) -> list[dict[str, Any]]:
    """For each signal its best arm of either form, and in how many seeds it improves on the base."""
    base = results.values("stage1", "ce", "base", ACCURACY)
    greedy = results.values("stage1", "ce", "base", GREEDY)
    policies = {
        "strong": ("stage1", "ce", "ce@256"),
        "weak": ("signals", "policies", "weak"),
        "drifted": ("stage1", "sapo", "sapo@256"),
        "unlearned": ("signals", "policies", "weak"),
        "contrast": ("signals", "policies", "unlearned"),
    }
    table = []
    for signal in dict.fromkeys(setting for setting, _ in results.arms("signals") if setting != "policies"):
        for form in FORMS:
            arms = results.of_form(signal, form)
            if not arms:
                continue
            arm = max(arms, key=lambda a: results.spread("signals", signal, a, ACCURACY).mean)  # type: ignore[union-attr]
            values, own = (results.values("signals", signal, arm, m) for m in (ACCURACY, GREEDY))
            common = sorted(values.keys() & base.keys())
            table.append(
                {
                    "signal": signal,
                    "form": form,
                    "budget": results.config("signals", signal, arm)["budget"],
                    "policy": results.spread(*policies[signal], ACCURACY) if signal in policies else None,
                    "accuracy": results.spread("signals", signal, arm, ACCURACY),
                    "kl": results.spread("signals", signal, arm, KL),
                    "gain": difference(values, base),
                    "greedy_gain": difference(own, greedy),
                    "better": sum(values[s] > base[s] for s in common),
                    "count": len(common),
                    "all_better": bool(common) and all(values[s] > base[s] for s in common),
                }
            )
    return table


def signal_table(results: Results) -> list[dict[str, Any]]:
    """Every signal, form and budget."""
    return [
        {
            **results.config("signals", setting, arm),
            "accuracy": results.spread("signals", setting, arm, ACCURACY),
            "greedy": results.spread("signals", setting, arm, GREEDY),
            "kl": results.spread("signals", setting, arm, KL),
        }
        for setting, arm in results.arms("signals")
        if setting != "policies"
    ]


def baseline_table(results: Results) -> list[dict[str, Any]]:
    """Every tuned method, with its paired difference to ERPD's better form."""
    reference = better_form(results, "baselines", "")
    ours = results.values("baselines", "", reference, ACCURACY)
    table = []
    for _, arm in results.arms("baselines", ""):
        gap = difference(ours, results.values("baselines", "", arm, ACCURACY)) if arm != reference else None
        table.append(
            {
                "title": TITLES.get(arm, arm),
                "accuracy": results.spread("baselines", "", arm, ACCURACY),
                "greedy": results.spread("baselines", "", arm, GREEDY),
                "kl": results.spread("baselines", "", arm, KL),
                "efficiency": _efficiency(results, "baselines", "", arm),
                "gap": gap,
                "verdict": verdict(gap),
                "other": arm != "base" and not arm.startswith("erpd"),
            }
        )
    return table


def better_form(results: Results, section: str, setting: str) -> str:
    """ERPD's form with the higher mean accuracy."""
    forms = ("erpd_projection", "erpd_gradient")
    found = {form: results.spread(section, setting, form, ACCURACY) for form in forms}
    return max(forms, key=lambda f: found[f].mean if found[f] else -1.0)  # type: ignore[union-attr]


def _efficiency(results: Results, section: str, setting: str, arm: str) -> float | None:
    """Sampled accuracy gained per nat of KL per response, from the means."""
    base, own = (results.spread(section, setting, a, ACCURACY) for a in ("base", arm))
    kl = results.spread(section, setting, arm, KL)
    return (own.mean - base.mean) / kl.mean if base and own and kl and kl.mean > 0 else None


def tuning_table(results: Results) -> list[dict[str, Any]]:
    """All settings that were tried."""
    return [
        {
            "title": TITLES.get(setting, setting),
            "config": results.config("tuning", setting, arm),
            "accuracy": results.spread("tuning", setting, arm, ACCURACY),
            "kl": results.spread("tuning", setting, arm, KL),
        }
        for setting, arm in results.arms("tuning")
    ]


def ablation_tables(results: Results) -> dict[str, list[dict[str, Any]]]:
    """One thing changed at a time, with the paired difference to the default."""
    tables: dict[str, list[dict[str, Any]]] = {}
    names = {"projection": list(PROJECTION_ABLATIONS), "gradient": list(GRADIENT_ABLATIONS)}
    for setting, arm in results.arms("ablations"):
        default = "student-of-ce" if setting == "teacher" else f"{setting}-0"
        title = names[setting][int(arm.rsplit("-", 1)[1])] if setting in names else arm
        values = results.values("ablations", setting, arm, ACCURACY)
        gap = difference(values, results.values("ablations", setting, default, ACCURACY)) if arm != default else None
        tables.setdefault(setting, []).append(
            {
                "arm": title,
                "accuracy": results.spread("ablations", setting, arm, ACCURACY),
                "greedy": results.spread("ablations", setting, arm, GREEDY),
                "kl": results.spread("ablations", setting, arm, KL),
                "gap": gap,
            }
        )
    return tables


def axis_tables(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Where the task, the data or the base differ: ERPD's better form against the best direct method there."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for axis, settings in AXES.items():
        for title, task in settings.items():
            section, setting = ("baselines", "") if task.name == "main" else ("axes", task.name)
            if results.spread(section, setting, "base", ACCURACY) is None:
                continue
            ours = better_form(results, section, setting)
            others = [m for m in DIRECT if results.spread(section, setting, m, ACCURACY)]
            best = max(others, key=lambda m: results.spread(section, setting, m, ACCURACY).mean)  # type: ignore[union-attr]
            gap = difference(
                results.values(section, setting, ours, ACCURACY), results.values(section, setting, best, ACCURACY)
            )
            greedy = difference(
                results.values(section, setting, ours, GREEDY), results.values(section, setting, best, GREEDY)
            )
            teachers = ("stage1", "ce") if task.name == "main" else (section, setting)
            tables.setdefault(axis, []).append(
                {
                    "setting": title,
                    "base": results.spread(section, setting, "base", ACCURACY),
                    "base_greedy": results.spread(section, setting, "base", GREEDY),
                    "teacher": _best_teacher(results, *teachers),
                    "arms": {m: results.spread(section, setting, m, ACCURACY) for m in AXIS_METHODS},
                    "ours": ours,
                    "best": best,
                    "gap": gap,
                    "greedy_gap": greedy,
                    "on_policy_gap": difference(
                        results.values(section, setting, ours, ACCURACY),
                        results.values(section, setting, "on_policy", ACCURACY),
                    ),
                    "ours_kl": results.spread(section, setting, ours, KL),
                    "best_kl": results.spread(section, setting, best, KL),
                    "verdict": verdict(gap),
                }
            )
    return tables


def _best_teacher(results: Results, section: str, setting: str) -> Any:
    prefix = "ce@" if section == "stage1" else "teacher@"
    names = [arm for _, arm in results.arms(section, setting) if arm.startswith(prefix)]
    found = [results.spread(section, setting, arm, ACCURACY) for arm in names]
    return max((s for s in found if s), key=lambda s: s.mean, default=None)


def round_table(results: Results) -> list[dict[str, Any]]:
    """Accuracy and the KL to the first round's base, round by round."""
    table = []
    for method in ROUND_METHODS:
        for number in range(1, 10):
            setting = f"{method}-{number}"
            accuracy = results.spread("rounds", setting, method, ACCURACY)
            if accuracy is None:
                break
            origin = results.spread("rounds", setting, method, "kl_from_origin_per_sequence")
            table.append(
                {
                    "title": TITLES[method],
                    "method": method,
                    "round": number,
                    "accuracy": accuracy,
                    "greedy": results.spread("rounds", setting, method, GREEDY),
                    "kl": results.spread("rounds", setting, method, KL),
                    "origin": origin or results.spread("rounds", setting, method, KL),
                }
            )
    return table
