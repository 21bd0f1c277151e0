"""The study's plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figures import Results, Spread, difference
from sections import AXES, AXIS_METHODS, CHECKPOINTS, FORMS, METHODS, ROUND_METHODS, STAGE1

ACCURACY, KL = "accuracy_sampled", "kl_per_sequence"
MARKERS = {"projection": "o", "policy gradient": "^"}
COLOURS = [
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b", "#7f7f7f", "#17becf"),
    *("#bcbd22", "#9467bd"),
]
"""Twelve colours that also differ for the colour-blind as far as twelve can."""
TITLES = {method.name: method.title for method in METHODS}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Draws every plot that there are figures for; returns name to path, relative to the page."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Results], plt.Figure | None]] = {
        "stage1": _stage1,
        "frontier": _frontier,
        "axes": _axes,
        "rounds": _rounds,
    }
    images = {}
    for name, plot in plots.items():
        figure = plot(results)
        if figure is None:
            continue
        path = folder / f"study-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        images[name] = f"{folder.name}/{path.name}"
    return images


def _stage1(results: Results) -> plt.Figure | None:
    """Accuracy, KL and entropy of stage 1 against epochs."""
    if not results.arms("stage1"):
        return None
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panel_metrics = (
        (ACCURACY, "accuracy (sampled)"),
        (KL, "KL(policy || base), nats per response"),
        ("entropy", "entropy, nats per token"),
    )
    for panel, (metric, label) in zip(panels, panel_metrics, strict=True):
        for i, arm in enumerate(STAGE1):
            points = [(e, results.spread("stage1", arm, f"{arm}@{4 * e}", metric)) for e in CHECKPOINTS]
            found = [(e, s.mean) for e, s in points if s]
            style = "--" if "kl" in arm else "-"
            if found:
                panel.plot(*zip(*found, strict=True), style, marker=".", color=_colour(i), label=arm)
        base = results.spread("stage1", "ce", "base", metric)
        if base:
            panel.axhline(base.mean, color="black", linewidth=0.8, linestyle=":")
        panel.set(xlabel="epochs over the rollouts", ylabel=label, xscale="log", xticks=CHECKPOINTS)
        panel.set_xticklabels([str(e) for e in CHECKPOINTS])
        panel.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _frontier(results: Results) -> plt.Figure | None:
    """Accuracy against KL: students of every signal, tuned methods, and stage 1 on its way."""
    if not results.arms("signals") and not results.arms("baselines"):
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    kinds = list(dict.fromkeys(s for s, _ in results.arms("signals") if s != "policies"))
    for i, signal in enumerate(kinds):
        for form in FORMS:
            arms = results.of_form(signal, form)
            points = [_point(results, "signals", signal, arm) for arm in arms]
            found = sorted(p for p in points if p)
            if found:
                left.plot(*zip(*found, strict=True), marker=MARKERS[form], color=_colour(i), label=f"{signal}, {form}")
    left.set_title("students by signal and form, three budgets each", fontsize=10)
    for i, (_, arm) in enumerate(results.arms("baselines", "")):
        point = _point(results, "baselines", "", arm)
        if point:
            right.scatter(*point, color=_colour(i), label=TITLES.get(arm, arm), zorder=3, s=45)
    right.set_title("methods at their tuned settings", fontsize=10)
    for panel in (left, right):
        for arm, style in (("ce", "-"), ("sapo", "--")):
            way = [_point(results, "stage1", arm, f"{arm}@{4 * e}") for e in CHECKPOINTS]
            found = [p for p in way if p]
            if found:
                panel.plot(*zip(*found, strict=True), style, color="grey", linewidth=1, label=f"teacher: {arm}")
        panel.set(xlabel="KL(policy || base), nats per response")
        panel.legend(fontsize=7, frameon=False)
        panel.set_xlim(left=-0.05, right=3.2)
    left.set_ylabel("accuracy (sampled)")
    return figure


def _axes(results: Results) -> plt.Figure | None:
    """Gain over the base of the compared methods, setting by setting."""
    if not results.arms("axes"):
        return None
    figure, panels = plt.subplots(1, len(AXES), figsize=(3.6 * len(AXES), 4.2), layout="constrained", sharey=True)
    for panel, (axis, settings) in zip(panels, AXES.items(), strict=True):
        titles = list(settings)
        for i, method in enumerate(AXIS_METHODS):
            gains: list[tuple[float, Spread]] = []
            for x, title in enumerate(titles):
                name = settings[title].name
                section, setting = ("baselines", "") if name == "main" else ("axes", name)
                own = results.values(section, setting, method, ACCURACY)
                base = results.values(section, setting, "base", ACCURACY)
                gain = difference(own, base)
                if gain:
                    gains.append((x + 0.15 * (i - len(AXIS_METHODS) / 2), gain))
            if gains:
                panel.bar(
                    [x for x, _ in gains],
                    [g.mean for _, g in gains],
                    0.15,
                    yerr=[g.error if g.count > 1 else 0 for _, g in gains],
                    color=_colour(i),
                    label=TITLES[method],
                )
        panel.set_title(axis, fontsize=10)
        panel.set_xticks(range(len(titles)), titles, rotation=20, ha="right", fontsize=8)
    panels[0].set_ylabel("sampled accuracy gained over the base")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _rounds(results: Results) -> plt.Figure | None:
    """Accuracy against the KL from the first base, round by round."""
    if not results.arms("rounds"):
        return None
    figure, panel = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for i, method in enumerate(ROUND_METHODS):
        points = []
        for number in range(1, 10):
            setting = f"{method}-{number}"
            accuracy = results.spread("rounds", setting, method, ACCURACY)
            origin = results.spread("rounds", setting, method, "kl_from_origin_per_sequence")
            kl = origin or results.spread("rounds", setting, method, KL)
            if accuracy and kl:
                points.append((kl.mean, accuracy.mean))
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", color=_colour(i), label=TITLES[method])
            for number, point in enumerate(points, start=1):
                panel.annotate(str(number), point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    panel.set(xlabel="KL(policy || first base), nats per response", ylabel="accuracy (sampled)")
    panel.legend(fontsize=8, frameon=False)
    return figure


def _point(results: Results, section: str, setting: str, arm: str) -> tuple[float, float] | None:
    kl, accuracy = (results.spread(section, setting, arm, metric) for metric in (KL, ACCURACY))
    return (kl.mean, accuracy.mean) if kl and accuracy else None


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
