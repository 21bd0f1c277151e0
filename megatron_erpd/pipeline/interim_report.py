"""A run's report while it is going on: figures after every stage, the page now and then."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_erpd.manifest import MANIFEST
from megatron_erpd.pipeline.stages import Stage

PAGE_SECONDS = 60.0
"""The page's pictures take some seconds, in which no stage is started: they are drawn this often at the most."""


class InterimReport:
    """Brings `report/summary.json` up to date when a stage is done, and `report/index.html` at most once a minute.

    The report's own stage, the last of a run, draws everything again. A report of an earlier state of the run loses its
    manifest, as it is no longer what that says.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, stage: Stage) -> str | None:
        """Returns what went wrong, in words; a report that can't be written never ends a run."""
        return self.refresh() if self.shows(stage) else None

    def shows(self, stage: Stage) -> bool:
        """Whether a report has anything to say of a stage."""
        return stage.command not in ("report", "prepare") and any(self.root.glob("round-*"))

    def refresh(self) -> str | None:
        """As a call, whatever stage was done."""
        from megatron_erpd.report.collect import collect_run, write_summary

        try:
            (self.root / "report" / MANIFEST).unlink(missing_ok=True)
            if self._is_drawn():
                write_summary(collect_run(self.root), self.root / "report" / "summary.json")
                return None
            from megatron_erpd.report.render import render_report

            render_report(self.root)
        except Exception as error:  # whatever it is, the run is worth more than its report
            return f"the report is not brought up to date ({error}); `megatron-erpd report {self.root}` tries again"
        return None

    def _is_drawn(self) -> bool:
        """Whether the page is of the last minute, whoever has drawn it."""
        page = self.root / "report" / "index.html"
        return page.is_file() and time.time() - page.stat().st_mtime < PAGE_SECONDS


if __name__ == "__main__":  # `python -m megatron_erpd.pipeline.interim_report RUN`
    if note := InterimReport(Path(sys.argv[1])).refresh():
        print(note)
