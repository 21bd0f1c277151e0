"""The report of a running run: figures after every stage, the page at most once a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_erpd.manifest import MANIFEST
from megatron_erpd.recipe.stages import Stage

PAGE_SECONDS = 60.0
"""The page takes some seconds to draw, so it is drawn this often at the most."""


class InterimReport:
    """Brings `report/summary.json` up to date when a stage is done, and `report/index.html` at most once a minute.

    The report's own stage, the last of a run, draws everything again. A report of an earlier state of the run loses its
    manifest, as it is no longer what that says. A report that can't be written never ends a run: what went wrong is
    returned, in words.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, stage: Stage) -> str | None:
        """What is due after a stage."""
        if not self.shows(stage):
            return None
        return self.draw_page() if self.page_is_due() else self.write_figures()

    def shows(self, stage: Stage) -> bool:
        """Whether a report has anything to say of a stage."""
        return stage.command not in ("report", "prepare") and any(self.root.glob("round-*"))

    def page_is_due(self) -> bool:
        """Whether nobody has drawn the page in the last minute."""
        page = self.root / "report" / "index.html"
        return not page.is_file() or time.time() - page.stat().st_mtime >= PAGE_SECONDS

    def write_figures(self) -> str | None:
        """`summary.json` alone: takes a fraction of a second."""
        from megatron_erpd.report.collect import collect_run, write_summary

        return self._try(lambda: write_summary(collect_run(self.root), self.root / "report" / "summary.json"))

    def draw_page(self) -> str | None:
        """Both."""

        def draw() -> None:
            from megatron_erpd.report.render import render_report

            render_report(self.root)

        return self._try(draw)

    def _try(self, write: Callable[[], object]) -> str | None:
        try:
            (self.root / "report" / MANIFEST).unlink(missing_ok=True)
            write()
        except Exception as error:  # whatever it is, the run is worth more than its report
            return f"the report is not brought up to date ({error}); `megatron-erpd report {self.root}` tries again"
        return None


if __name__ == "__main__":  # `python -m megatron_erpd.launch.interim_report RUN`
    if note := InterimReport(Path(sys.argv[1])).draw_page():
        print(note)
