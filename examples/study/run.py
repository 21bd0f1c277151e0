"""Runs the study and writes `docs/study.md`.

    python examples/study/run.py                       all of it, on all cores; stop it and call it again as you like
    python examples/study/run.py --seeds 1 --extra-seeds 1 --no-docs     a first look

What is done is kept in `runs/study` and never made again. The page is made of `runs/study/results.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY), str(HERE)]

from arms import MAIN, first_round  # noqa: E402
from graph import Graph, run_graph  # noqa: E402
from sections import (  # noqa: E402
    METHODS,
    Config,
    Record,
    Study,
    ablations,
    axes,
    baselines,
    rounds,
    signals,
    stage1,
    tuning,
)

KEPT = (
    *("accuracy_sampled", "accuracy_greedy", "kl_per_sequence", "kl_per_token", "entropy", "mean_length"),
    "kl_from_origin_per_sequence",
)
"""What of an evaluation goes into the results."""
SECTIONS = ("stage1", "signals", "ablations", "baselines", "rounds", "axes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of everything that is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument(
        "--extra-seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4, 5],
        help="of ablations, rounds and axes; default: 1 2 3 4 5",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, a core each")
    parser.add_argument("--no-docs", action="store_true", help="write report.md beside the results, not docs/study.md")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    given = parser.parse_args(argv)
    os.chdir(REPOSITORY)  # the verifier's path is relative to it
    root = given.output.resolve()

    from megatron_erpd.launch.local import locked

    with locked(root):
        study = Study(Graph(root))
        tuning(study)
        if not given.report_only:
            print("settings: six for each method", flush=True)
            run_graph(study.graph, given.workers, _say)
        chosen = choose(study.records)
        (root / "chosen.json").write_text(json.dumps(chosen, indent=1) + "\n")
        build(study, given.sections, given.seeds, given.extra_seeds, chosen)
        if not given.report_only:
            print(f"arms: {len(study.records)}", flush=True)
            run_graph(study.graph, given.workers, _say)
    results = collect(study.records)
    (root / "results.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in results) + "\n]\n")
    from report import write_report

    folder = root if given.no_docs else REPOSITORY / "docs"
    page = write_report(results, folder / ("report.md" if given.no_docs else "study.md"))
    if not given.no_docs:
        shutil.copyfile(root / "results.json", folder / "study.json")
    print(page)


def build(
    study: Study, sections: Sequence[str], seeds: Sequence[int], extra_seeds: Sequence[int], chosen: dict[str, Config]
) -> None:
    """All jobs of the chosen sections."""
    for seed in seeds:
        round_ = first_round(study.graph, MAIN, seed)
        if "stage1" in sections:
            stage1(study, round_)
        if "signals" in sections:
            signals(study, round_)
        if "baselines" in sections:
            baselines(study, round_, chosen)
    for seed in extra_seeds:
        if "ablations" in sections:
            ablations(study, first_round(study.graph, MAIN, seed))
        if "rounds" in sections:
            rounds(study, seed, chosen)
        if "axes" in sections:
            axes(study, seed, chosen)


def choose(records: Sequence[Record]) -> dict[str, Config]:
    """For each method the setting with the highest sampled accuracy on the tuning seed."""
    best: dict[str, tuple[float, Config]] = {}
    for record in records:
        if record.section != "tuning" or not record.file.is_file():
            continue
        accuracy = _metrics(record.file)["accuracy_sampled"]
        if record.setting not in best or accuracy > best[record.setting][0]:
            best[record.setting] = (accuracy, record.config)
    missing = [method.name for method in METHODS if method.name not in best]
    if missing:
        sys.exit(f"no settings of {', '.join(missing)} have been evaluated; run without --report-only first")
    return {name: dict(config) for name, (_, config) in best.items()}


def collect(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The figures of every arm that is done."""
    rows = []
    for record in records:
        if record.file.is_file():
            row = {"section": record.section, "setting": record.setting, "arm": record.arm, "seed": record.seed}
            rows.append({**row, "config": dict(record.config), "metrics": _metrics(record.file)})
    return rows


def _metrics(file: Path) -> dict[str, Any]:
    metrics = json.loads(file.read_text())["metrics"]
    return {name: round(metrics[name], 6) for name in KEPT if metrics.get(name) is not None}


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
