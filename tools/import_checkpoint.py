"""From a Hugging Face folder to a Megatron checkpoint.

    torchrun --nproc-per-node 8 -- tools/import_checkpoint.py --hf Qwen3-4B --output runs/mine/base

Any number of processes will do. `--help` tells all flags; `megatron-erpd import` is the same command.
"""

from megatron_erpd.commands.import_checkpoint import import_checkpoint
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(import_checkpoint)
