"""From a Hugging Face folder to a Megatron checkpoint.

    torchrun --nproc-per-node 2 -- tools/import_checkpoint.py --hf Qwen3-4B --output runs/mine/base \\
        --tensor-parallel 2

Megatron's own flags follow after a second `--`. `--help` tells all flags; `megatron-erpd import` is the same command.
"""

from megatron_erpd.pipeline.commands import run_command
from megatron_erpd.training.convert import import_checkpoint

if __name__ == "__main__":
    run_command(import_checkpoint)
