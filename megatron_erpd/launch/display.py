"""Shows a run's stages: a live table on a terminal, elsewhere a line for each change."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_erpd.units import duration

State = Literal["waiting", "checking", "running", "done", "kept", "undecided", "again", "failed", "stopped"]

_STYLES: dict[State, str] = {
    "waiting": "dim",
    "checking": "cyan",
    "running": "bold cyan",
    "done": "green",
    "kept": "green dim",
    "undecided": "yellow dim",
    "again": "yellow",
    "failed": "bold red",
    "stopped": "yellow",
}
_LINE_SECONDS = 60.0
"""Without a terminal, a running stage says where it is this often."""


@dataclass
class Row:
    """What is shown of one stage."""

    state: State = "waiting"
    seconds: float | None = None
    note: str = ""


class Display:
    """The stages of a run with their states. Use as a context manager."""

    def __init__(self, title: str, names: Sequence[str], console: Console | None = None) -> None:
        self.title = title
        self.rows = {name: Row() for name in names}
        self.console = console or Console()
        self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=4)
        self._said: dict[str, float] = {}
        self.notes: list[str] = []
        """Lines under the table."""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def update(self, name: str, state: State, seconds: float | None = None, note: str = "") -> None:
        """The state of a stage changed, or its progress."""
        row, before = self.rows[name], self.rows[name].state
        row.state, row.seconds, row.note = state, seconds, note
        if self.console.is_terminal or state in ("waiting", "checking"):
            return
        now = time.monotonic()
        if state == before and now - self._said.get(name, 0.0) < _LINE_SECONDS:
            return
        self._said[name] = now
        after = "" if seconds is None or state == "running" == before != state else f" {duration(seconds)}"
        self.say(f"[{name}] {state}{after}{': ' + note if note else ''}")

    def table(self, whole_notes: bool = False) -> Table:
        """The stages as they stand; notes that are too long end in an ellipsis. With `whole_notes` they go over several
        lines, and there is no title, which would."""
        title = None if whole_notes else self.title
        table = Table(title=title, title_justify="left", title_style="bold", expand=False, box=None, padding=(0, 2))
        for heading in ("stage", "state", "time", ""):
            table.add_column(
                heading,
                justify="right" if heading == "time" else "left",
                no_wrap=bool(heading) or not whole_notes,
                overflow="fold" if whole_notes else "ellipsis",
            )
        for name, row in self.rows.items():
            seconds = "" if row.seconds is None else duration(row.seconds)
            table.add_row(name, Text(row.state, _STYLES[row.state]), seconds, Text(row.note, "dim"))
        return table

    def show(self) -> None:
        """Prints the stages as they stand, with all that is to be said of them."""
        self.console.print(Text(self.title, "bold"), soft_wrap=True)
        self.console.print(self.table(whole_notes=True))
        for line in self.notes:
            self.say(line)


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("sampled", "accuracy_sampled", ".3f"),
    ("greedy", "accuracy_greedy", ".3f"),
    ("KL per\nseq.", "kl_per_sequence", ".3f"),
    ("KL per\ntoken", "kl_per_token", ".4f"),
    ("rev.\nKL data", "reverse_kl_data", ".3f"),
    ("fwd.\nKL data", "forward_kl_data", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("length", "mean_length", ".1f"),
)
"""Heading, key and format of the final table. Narrow, so that it fits 80 characters."""
_ROUNDS_COLUMNS: tuple[tuple[str, str, str], ...] = (
    *_COLUMNS[:4],
    ("KL seq.,\n1st base", "kl_from_origin_per_sequence", ".3f"),
    ("KL token,\n1st base", "kl_from_origin_per_token", ".4f"),
    *_COLUMNS[6:],
)


def findings_lines(summary: Path) -> list[str]:
    """Whether student and teacher are better than the base, and the warnings of all stages, from a run's
    `report/summary.json`; empty where there is none yet."""
    if not summary.is_file():
        return []
    found = json.loads(summary.read_text())
    lines = [finding["text"] for finding in found.get("findings", [])]
    return lines + [f"warning from {', '.join(w['stages'])}: {w['text']}" for w in found.get("warnings", [])]


def describe_summary(summary: Path) -> str:
    """`1 round; sampled accuracy of the last: base 0.459, student 0.817`, from a run's `report/summary.json`."""
    rounds: list[dict[str, Any]] = json.loads(summary.read_text())["rounds"]
    measured = {name: row.get("accuracy_sampled") for name, row in (rounds[-1]["policies"] if rounds else {}).items()}
    known = [f"{name} {value:.3f}" for name, value in measured.items() if value is not None]
    if not known:
        return "no policy is evaluated yet"
    return f"{len(rounds)} round{'s' * (len(rounds) != 1)}; sampled accuracy of the last: {', '.join(known)}"


def summary_table(summary: Path) -> Table:
    """Policies and what was measured of them, from a run's `report/summary.json`. Divergences are in nats.

    Several rounds stand one under the other, with the KL from the first round's base in the place of that on the data.
    """
    rounds: list[dict[str, Any]] = json.loads(summary.read_text())["rounds"]
    columns = _COLUMNS if len(rounds) < 2 else _ROUNDS_COLUMNS
    title = "held-out accuracy and divergence from the base (reverse KL: policy || base)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for round_ in rounds:
        if len(rounds) > 1:
            table.add_row(Text(round_["name"], "bold"))
        for name, metrics in round_["policies"].items():
            cells = ["-" if metrics.get(key) is None else format(float(metrics[key]), form) for _, key, form in columns]
            table.add_row(name, *cells)
    return table
