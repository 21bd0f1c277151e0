"""Rows of figures, for the terminal and for the page."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.implementations import FLOOR, NO_DIVERGENCE, STRAIGHTFORWARD
from benchmarks.records import Figures, Record, bytes_text, seconds_text

GROUPS: tuple[tuple[str, str, str], ...] = (
    ("logits", "full", "Logits against a full target"),
    ("logits", "topk", "Logits against the target's top 64 and its tail"),
    ("hidden", "hidden", "From hidden states, against a target from hidden states"),
    ("hidden", "topk", "From hidden states, against the target's top 64 and its tail"),
)
"""Policy and target of each table, and its title."""

COLUMNS = (
    *("case", "implementation", "forward", "forward + backward", "of straightforward", "of floor"),
    *("extra memory", "of straightforward", "saved", "collectives"),
)
NONE = "—"


def group_cases(figures: Figures, policy: str, target: str) -> list[Case]:
    return [case for case in figures.cases() if (case.policy, case.target) == (policy, target)]


def case_label(case: Case) -> str:
    width = f", h={case.hidden:,}" if case.hidden else ""
    return f"{case.kind}, V={case.vocab:,}, n={case.tokens:,}{width}, TP {case.tp}, {case.dtype}"


def rows(figures: Figures, cases: list[Case]) -> list[list[str]]:
    """One for each case and implementation, a column each of `COLUMNS`; the case is named in its first row."""
    found = []
    for case in cases:
        label = case_label(case)
        for name in figures.names(case):
            forward, both = (figures.find(case, p, name) for p in ("forward", "forward+backward"))  # type: ignore[arg-type]
            if forward is None or both is None:
                continue
            found.append([label, name, *_cells(figures, forward, both)])
            label = ""
    return found


def _cells(figures: Figures, forward: Record, both: Record) -> list[str]:
    name = both.implementation
    times = [seconds_text(forward.seconds), seconds_text(both.seconds)]
    ratios = [_ratio(figures.time_ratio(both, other)) for other in (STRAIGHTFORWARD, FLOOR)]
    if name == FLOOR:
        return [*times, ratios[0], *[NONE] * 5]
    if name in NO_DIVERGENCE:
        return [*times, *ratios, *[NONE] * 4]
    return [
        *times,
        *ratios,
        bytes_text(both.extra_bytes),
        _ratio(figures.memory_ratio(both)),
        bytes_text(both.saved_bytes),
        f"{both.collectives_forward} / {both.collectives_backward}",
    ]


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3f}x" if value < 0.1 else f"{value:.2f}x"


def print_tables(console: Console, figures: Figures) -> None:
    for policy, target, title in GROUPS:
        cases = group_cases(figures, policy, target)
        if not cases:
            continue
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index < 2 else "right")
        for row in rows(figures, cases):
            if row[0] and table.rows:
                table.add_section()
            table.add_row(*row)
        console.print(table)


def markdown_table(columns: tuple[str, ...], lines: list[list[str]], left: int = 1) -> str:
    """A table of GitHub's Markdown, its first `left` columns aligned left and the others right."""
    rule = ["---" if index < left else "---:" for index in range(len(columns))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(columns), rule, *lines])
