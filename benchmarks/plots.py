"""The page's plots: time and memory against the number of tokens, a panel for each vocabulary and type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.cases import DTYPES, Case, Dtype
from benchmarks.implementations import (
    FLOOR,
    FUSED_PLAIN,
    FUSED_TRITON,
    LIGER,
    LIGER_FUSED,
    MEGATRON,
    NO_DIVERGENCE,
    PLAIN,
    PRODUCTS_NEEDED,
    PRODUCTS_REMADE,
    STRAIGHTFORWARD,
    TRITON,
)
from benchmarks.records import Figures, Record

STYLES: dict[str, tuple[str, str]] = {
    TRITON: ("#0072b2", "o-"),
    PLAIN: ("#56b4e9", "o-"),
    FUSED_TRITON: ("#009e73", "D-"),
    FUSED_PLAIN: ("#2ca089", "D-"),
    STRAIGHTFORWARD: ("#d55e00", "s-"),
    MEGATRON: ("#cc79a7", "^-"),
    LIGER: ("#e69f00", "v-"),
    LIGER_FUSED: ("#e69f00", "v-"),
    PRODUCTS_NEEDED: ("#999999", "x:"),
    PRODUCTS_REMADE: ("#666666", "+:"),
    FLOOR: ("#000000", "--"),
}
"""Colour, marker and line of each implementation. Okabe and Ito's colours: colour-blind people can tell them apart."""

Y_LABELS = {"time": "forward + backward, ms", "memory": "extra memory, MiB"}
SHOWN: tuple[tuple[str, str], ...] = (("logits", "full"), ("logits", "topk"), ("hidden", "hidden"))
"""Policy and target of each plot; always of forward KL and the smallest tensor-parallel size that was measured."""


def draw(figures: Figures, folder: Path, device: str) -> dict[str, str]:
    """Draws what there are figures for; returns `POLICY-TARGET` to the name of the file in `folder`."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for policy, target in SHOWN:
        cases = [
            case for case in figures.cases() if (case.policy, case.target, case.kind) == (policy, target, "forward_kl")
        ]
        cases = [case for case in cases if case.tp == min(c.tp for c in cases)]
        if not cases:
            continue
        name = f"{policy}-{target}"
        path = folder / f"performance-{device}-{name}.png"
        _figure(figures, cases).savefig(path, dpi=110, metadata={"Software": None})
        names[name] = path.name
    return names


def _figure(figures: Figures, cases: list[Case]) -> Figure:
    panels = list(dict.fromkeys((case.vocab, case.dtype) for case in sorted(cases, key=_order)))
    figure = Figure(figsize=(max(7.0, 3.6 * len(panels)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    values: dict[str, Callable[[Record], float]] = {
        "time": lambda record: record.seconds * 1e3,
        "memory": lambda record: 0.0 if record.implementation in NO_DIVERGENCE else record.extra_bytes / 2**20,
    }
    for column, (vocab, dtype) in enumerate(panels):
        inside = [case for case in cases if (case.vocab, case.dtype) == (vocab, dtype)]
        for row, (name, value) in enumerate(values.items()):
            _panel(axes[row, column], figures, inside, value)
            if column == 0:
                axes[row, column].set_ylabel(Y_LABELS[name])
        axes[0, column].set_title(_title(vocab, dtype, inside[0].tp), fontsize=10)
        axes[1, column].set_xlabel("tokens")
    handles: dict[str, Artist] = {}
    for panel in axes.flat:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _panel(panel: Axes, figures: Figures, cases: list[Case], value: Callable[[Record], float]) -> None:
    for name, (colour, style) in STYLES.items():
        found = (figures.find(case, "forward+backward", name) for case in cases)
        points = sorted((record.case.tokens, value(record)) for record in found if record)
        points = [(tokens, y) for tokens, y in points if y > 0]
        if points:
            panel.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=6)
    tokens = sorted({case.tokens for case in cases})
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(tokens, [f"{count:,}" for count in tokens])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.set_xlim(tokens[0] / 1.5, tokens[-1] * 1.5)
    panel.grid(color="#e4e4e4", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)


def _order(case: Case) -> tuple[int, int]:
    return list(DTYPES).index(case.dtype), case.vocab


def _title(vocab: int, dtype: Dtype, tp: int) -> str:
    return f"V = {vocab:,}, {dtype}" + (f", TP {tp}" if tp > 1 else "")
