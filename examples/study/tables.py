"""The tables of the study's page, as rows of means and paired differences."""

from __future__ import annotations

from typing import Any

from figures import Results, Spread, difference, verdict
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
)

ACCURACY, GREEDY, KL = "accuracy_sampled", "accuracy_greedy", "kl_per_sequence"
CONSTRAINTS = {"sapo": 0.0, "sapo-kl0.03": 0.03, "sapo-kl0.1": 0.1, "sapo-kl0.3": 0.3, "sapo-kl1": 1.0}
"""Stage-1 arms of claim 2 and the weight of their KL penalty."""
DIRECT = ("sequence_advantage", "sapo_kl", "sft")
"""Methods of the axes that see the rollouts that ERPD sees."""
TITLES = {method.name: method.title for method in METHODS}


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


IGNORANT = 0.05
"""A base below this accuracy hardly learned the task: what is never sampled cannot be reinforced."""


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
            teacher = _best_teacher(results, *(("stage1", "ce") if task.name == "main" else (section, setting)))
            tables.setdefault(axis, []).append(
                {
                    "setting": title,
                    "ignorant": sum(x < IGNORANT for x in results.values(section, setting, "base", ACCURACY).values()),
                    "base": results.spread(section, setting, "base", ACCURACY),
                    "base_greedy": results.spread(section, setting, "base", GREEDY),
                    "teacher": teacher,
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
                    "teacher_better": _mean_of(teacher) > _mean_of(results.spread(section, setting, ours, ACCURACY)),
                }
            )
    return tables


def _mean_of(found: Spread | None) -> float:
    return found.mean if found else -1.0


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
