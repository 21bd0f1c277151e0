"""Rollouts that another program wrote, checked and in this project's format.

    python tools/import_rollouts.py --source dump.jsonl --format verl --tokenizer Qwen3-4B \\
        --output runs/mine/rollouts

`--help` tells all flags; `megatron-erpd import-rollouts` is the same command.
"""

from megatron_erpd.commands.rollouts import import_rollouts
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(import_rollouts)
