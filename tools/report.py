"""One HTML page and a JSON file about a run.

    python tools/report.py runs/mine

`--help` tells all flags; `megatron-erpd report` is the same command.
"""

from megatron_erpd.pipeline.commands import report
from megatron_erpd.pipeline.program import run_command

if __name__ == "__main__":
    run_command(report)
