"""What a run did, for people: figures in `summary.json`, one self-contained page in `index.html`."""

from megatron_erpd.report.collect import collect_run, write_summary
from megatron_erpd.report.render import render_report

__all__ = ["collect_run", "render_report", "write_summary"]
