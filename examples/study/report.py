"""Writes the study's page: tables and verdicts made of the figures, and the plots beside it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Results, Row, signed
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plots import draw
from sections import AXIS_METHODS, CHECKPOINTS, TUNING_SEED
from tables import (
    TITLES,
    ablation_tables,
    axis_tables,
    baseline_table,
    constraint_table,
    round_table,
    signal_table,
    stage1_table,
    student_table,
    tuning_table,
    weak_table,
)

SECTIONS = ("stage1", "signals", "baselines", "ablations", "axes", "rounds")
UNTIGHTENED = ("ce", "mse", "sapo", "ppo-loose", "cispo", "sft")
"""Stage-1 arms of claim 1: no KL penalty, no tight clip."""
WEAK = ("weak", "drifted", "unlearned", "contrast")
"""Signals of claim 4."""


def write_report(rows: Sequence[Row], page: Path) -> Path:
    """Writes `page` and its plots in `images/` beside it; returns the page's path.

    Args:
        rows: of `results.json`.
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
        titles=TITLES,
        tuning_seed=TUNING_SEED,
        untightened=UNTIGHTENED,
        weak_signals=WEAK,
        seeds={name: len(results.seeds(name)) for name in SECTIONS},
        checkpoints=CHECKPOINTS,
        signals=signal_table(results),
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
