"""One HTML page and a JSON file about a run.

    python tools/report.py runs/mine

`--help` tells all flags; `megatron-erpd report` is the same command.
"""

from megatron_erpd.commands.report import report
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(report)
