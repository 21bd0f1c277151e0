"""From Megatron checkpoints to Hugging Face folders.

    torchrun --nproc-per-node 8 -- tools/export_checkpoint.py --checkpoint student=runs/mine/round-01/student \\
        --output exported

Any number of processes will do. `--help` tells all flags; `megatron-erpd export` is the same command.
"""

from megatron_erpd.pipeline.program import run_command
from megatron_erpd.training.export_checkpoint import export_checkpoints

if __name__ == "__main__":
    run_command(export_checkpoints)
