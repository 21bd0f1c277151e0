"""The report's figures, drawn by matplotlib without a display.

Colours are Okabe and Ito's, which stay apart under the common colour blindnesses; every series also has a marker or a
line style of its own, so that nothing is told by colour alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_erpd.files import new_file
from megatron_erpd.report.collect import Curve, PolicyFigures

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#222222",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.facecolor": "white",
    # The same figures give the same bytes.
    "svg.hashsalt": "megatron-erpd",
}
_COLOURS = {"base": "#333333", "teacher": "#D55E00", "unlearned": "#A8447E", "student": "#0072B2"}
_MARKERS = {"base": "o", "teacher": "s", "unlearned": "X", "student": "D"}
_CONTROLS = [("#009E73", "^", "--"), ("#B8860B", "v", ":"), ("#56B4E9", "P", "-."), ("#7A5195", "<", "--")]
PANEL = (4.5, 3.3)
"""Inches of one panel: at a phone's width its text is still read without zooming."""

SMOOTHED_FROM = 60
"""Steps from which a running mean is drawn over the single steps."""


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


class Palette:
    """A colour, marker and line style for every policy of a round, the same in all of its figures."""

    def __init__(self, names: Sequence[str]) -> None:
        families = dict.fromkeys(name.split("@")[0] for name in names)
        controls = [name for name in families if name not in _COLOURS]
        self._controls = {name: _CONTROLS[i % len(_CONTROLS)] for i, name in enumerate(controls)}

    def colour(self, name: str) -> str:
        return _COLOURS.get(name) or self._controls.get(name, _CONTROLS[-1])[0]

    def marker(self, name: str) -> str:
        return _MARKERS.get(name) or self._controls.get(name, _CONTROLS[-1])[1]

    def line(self, name: str) -> str:
        return self._controls[name][2] if name in self._controls else "-"


def accuracy_against_kl(policies: Sequence[PolicyFigures], palette: Palette, metric: str, title: str) -> Figure | None:
    """One panel of `draw_accuracy_against_kl`; None where no policy has been measured so."""
    with _style():
        figure = Figure(figsize=(PANEL[0], PANEL[1] + 0.7), layout="constrained")
        axes = figure.subplots()
        if not draw_accuracy_against_kl(axes, policies, palette, metric, title):
            return None
        # The two panels stand side by side on the page, so they share a scale.
        axes.set_ylim(_accuracy_limits(policies))
        figure.legend(loc="outside lower left", ncols=3, handlelength=1.4, columnspacing=1.2)
        return figure


def save_accuracy_against_kl(policies: Sequence[PolicyFigures], palette: Palette, path: Path) -> bool:
    """Both panels, sampled and greedy, as one PNG; False where there is nothing to draw."""
    with _style():
        figure = Figure(figsize=(9.0, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set_ylim(_accuracy_limits(policies))
        drawn = draw_accuracy_against_kl(left, policies, palette, "accuracy_sampled", "Sampled at temperature 1")
        if not drawn:
            return False
        draw_accuracy_against_kl(right, policies, palette, "accuracy_greedy", "Greedy")
        right.set_ylabel("")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", handlelength=1.6)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        return True


def draw_accuracy_against_kl(
    axes: Axes, policies: Sequence[PolicyFigures], palette: Palette, metric: str, title: str
) -> bool:
    """Accuracy over KL(policy || base) per sequence, checkpoints of one training joined by a line, in order.

    The unlearned policy, whose KL is meant to be large, is named at the edge when it would squeeze the others.
    """
    drawn = [p for p in policies if _kl(p) is not None and metric in p.metrics]
    far = [p for p in drawn if _is_far(p, drawn)]
    drawn = [p for p in drawn if p not in far]
    if not drawn:
        return False
    base = next((p for p in drawn if p.role == "base"), None)
    for family in dict.fromkeys(p.family for p in drawn):
        members = [p for p in drawn if p.family == family]
        _draw_family(axes, members, base, palette, metric)
    if base is not None:
        axes.axhline(base.metrics[metric], color=palette.colour("base"), linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for p in far:
        note = f"{p.name}: {p.metrics[metric]:.2f} at {_kl(p):.1f} nats →"
        axes.annotate(note, (1, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color=palette.colour(p.family))
    axes.set_title(title)
    axes.set_xlabel("KL(policy ‖ base), nats per sequence")
    axes.set_ylabel("accuracy on held-out prompts")
    axes.set_xlim(left=-0.03 * max(axes.get_xlim()[1], 1e-6))
    return True


def _is_far(policy: PolicyFigures, policies: Sequence[PolicyFigures]) -> bool:
    limit = max((_kl(p) or 0.0 for p in policies if p.role != "unlearned"), default=0.0)
    return policy.role == "unlearned" and limit > 0 and (_kl(policy) or 0.0) > 1.5 * limit


def _accuracy_limits(policies: Sequence[PolicyFigures]) -> tuple[float, float]:
    """One range for sampled and greedy accuracy, with room for labels; far policies are named, not drawn."""
    metrics = ("accuracy_sampled", "accuracy_greedy")
    values = [p.metrics[m] for p in policies if not _is_far(p, policies) for m in metrics if m in p.metrics]
    lowest, highest = min(values, default=0.0), max(values, default=1.0)
    room = 0.12 * max(highest - lowest, 0.05)
    return lowest - 1.2 * room, highest + room


def _draw_family(
    axes: Axes, members: list[PolicyFigures], base: PolicyFigures | None, palette: Palette, metric: str
) -> None:
    family = members[0].family
    colour, marker = palette.colour(family), palette.marker(family)
    xs = np.array([_kl(p) or 0.0 for p in members])
    ys = np.array([p.metrics[metric] for p in members])
    errors = np.array([p.metrics.get(f"{metric}_se", 0.0) for p in members])
    on_the_way = np.array([p.iteration is not None for p in members])
    if len(members) > 1:
        # Every training starts from the base.
        start = ([0.0], [base.metrics[metric]]) if base else ([], [])
        axes.plot([*start[0], *xs], [*start[1], *ys], color=colour, linewidth=1.2, alpha=0.6, zorder=2)
        axes.plot(xs[on_the_way], ys[on_the_way], marker, color=colour, markersize=4, zorder=3)
    axes.errorbar(xs, ys, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6, zorder=2)
    results = ~on_the_way if (~on_the_way).any() else on_the_way
    size = 8 if family == "student" else 7
    axes.plot(
        xs[results], ys[results], marker, color=colour, markersize=size, markeredgecolor="white", label=family, zorder=4
    )
    for x, y, policy in zip(xs, ys, members, strict=True):
        if policy.iteration is not None:
            axes.annotate(
                str(policy.iteration), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7.5, color=colour
            )


def accuracy_over_rounds(
    rounds: Sequence[Sequence[PolicyFigures]], palette: Palette, metric: str, title: str
) -> Figure | None:
    """Accuracy over KL(policy || first round's base) per sequence, the numbers being the rounds'.

    A line joins the students, each of which is the next round's base; the other policies of a round start from that
    round's base. None where no policy has been measured so.
    """
    placed = [
        (number, p, p.metrics["kl_from_origin_per_sequence"], p.metrics[metric])
        for number, policies in enumerate(rounds, start=1)
        for p in policies
        if metric in p.metrics and "kl_from_origin_per_sequence" in p.metrics
        # Later bases are the students before them.
        if p.role not in ("base", "unlearned") or (p.role == "base" and number == 1)
    ]
    if not placed:
        return None
    with _style():
        figure = Figure(figsize=(PANEL[0], PANEL[1] + 0.7), layout="constrained")
        axes = figure.subplots()
        for family in dict.fromkeys(p.family for _, p, _, _ in placed):
            members = [(x, y) for _, p, x, y in placed if p.family == family]
            marker, size = palette.marker(family), 8 if family == "student" else 7
            axes.plot(*zip(*members, strict=True), marker, color=palette.colour(family), markersize=size, label=family)
        way = [(x, y) for _, p, x, y in placed if p.role in ("base", "student")]
        axes.plot(*zip(*way, strict=True), "-", color=palette.colour("student"), linewidth=1.2, alpha=0.6, zorder=1)
        for number, p, x, y in placed:
            if p.role != "base":
                colour = palette.colour(p.family)
                axes.annotate(
                    str(number), (x, y), textcoords="offset points", xytext=(5, -11), fontsize=8, color=colour
                )
        axes.set_title(title)
        axes.set_xlabel("KL(policy ‖ first base), nats per sequence")
        axes.set_ylabel("accuracy on held-out prompts")
        figure.legend(loc="outside lower left", ncols=3, handlelength=1.4, columnspacing=1.2)
        return figure


def _kl(policy: PolicyFigures) -> float | None:
    """The base is at 0 by definition, whether or not its evaluation says so."""
    return 0.0 if policy.role == "base" else policy.metrics.get("kl_per_sequence")


def curves(
    trainings: Sequence[Curve], palette: Palette, metrics: Sequence[str], title: str, unit: str
) -> Figure | None:
    """One metric over the steps of several trainings; None where none of them logged it."""
    with _style():
        figure = Figure(figsize=PANEL, layout="constrained")
        axes = figure.subplots()
        for training in trainings:
            steps, values = training.series(*metrics)
            if steps:
                _draw_curve(axes, steps, values, training.name, palette)
        if not axes.lines:
            return None
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(loc="best")
        return figure


def _draw_curve(axes: Axes, steps: list[int], values: list[float], name: str, palette: Palette) -> None:
    colour, line = palette.colour(name), palette.line(name)
    if len(steps) < SMOOTHED_FROM:
        axes.plot(steps, values, line, color=colour, linewidth=1.5, label=name)
        return
    width = max(3, len(steps) // 20) | 1
    axes.plot(steps, values, "-", color=colour, linewidth=0.7, alpha=0.3)
    smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width // 2 : width // 2 + len(smooth)], smooth, line, color=colour, linewidth=1.6, label=name)


def signal_histogram(above: np.ndarray, below: np.ndarray, threshold: float) -> Figure | None:
    """Shares of tokens over the signal, on a logarithmic scale: most tokens carry next to none."""
    both = np.concatenate([above, below])
    if not both.size:
        return None
    with _style():
        figure = Figure(figsize=PANEL, layout="constrained")
        axes = figure.subplots()
        edge = max(float(np.quantile(np.abs(both), 0.999)), 1e-3)
        bins = np.linspace(-edge, edge, 51)
        series = ((above, "-", "#0072B2", "above"), (below, "--", "#D55E00", "up to"))
        for values, line, colour, word in series:
            if values.size:
                weights = np.full(values.size, 1 / values.size)
                label = f"reward {word} {threshold:g} ({values.size:,} tokens)"
                clipped = np.clip(values, -edge, edge)
                axes.hist(
                    clipped, bins.tolist(), weights=weights, histtype="step", lw=1.6, ls=line, color=colour, label=label
                )
        axes.set_yscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * 12)  # room for the legend
        axes.set_title("Signal on the response tokens")
        axes.set_xlabel("signal, nats (the ends hold all beyond)")
        axes.set_ylabel("share of tokens")
        axes.legend(loc="upper left", fontsize=8)
        return figure


def to_data_uri(figure: Figure) -> str:
    """The figure as an SVG inside of a `data:` address, so that the page needs no other file."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
