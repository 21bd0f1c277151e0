"""From Megatron checkpoints to Hugging Face folders.

    torchrun --nproc-per-node 2 -- tools/export_checkpoint.py --checkpoint student=runs/mine/round-01/student \\
        --output exported --tensor-parallel 2

Megatron's own flags follow after a second `--`. `--help` tells all flags; `megatron-erpd export` is the same command.
"""

from megatron_erpd.pipeline.commands import run_command
from megatron_erpd.training.convert import export_checkpoints

if __name__ == "__main__":
    run_command(export_checkpoints)
