"""`megatron-erpd report`: the page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_erpd.files import check_output


def report(argv: list[str]) -> None:
    """Writes a run's report: one HTML page, its figures as JSON, and the picture of accuracy against divergence."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd report",
        description=report.__doc__,
        epilog="example: megatron-erpd report runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "run", type=Path, help="the run's folder; a run that is not finished is reported as far as it is"
    )
    given = parser.parse_args(argv)
    from megatron_erpd.launch.display import describe_summary, findings_lines
    from megatron_erpd.report.render import render_report

    if given.run.is_dir():
        check_output(given.run / "report")
    print(f"wrote {render_report(given.run)}")
    summary = given.run / "report" / "summary.json"
    print(f"{given.run}: {describe_summary(summary)}")
    for line in findings_lines(summary):
        print(line)
