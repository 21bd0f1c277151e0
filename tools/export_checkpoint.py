"""From Megatron checkpoints to Hugging Face folders.

    torchrun --nproc-per-node 8 -- tools/export_checkpoint.py --checkpoint student=runs/mine/round-01/student \\
        --output exported

Any number of processes will do. `--help` tells all flags; `megatron-erpd export` is the same command.
"""

from megatron_erpd.commands.export_checkpoint import export_checkpoints
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(export_checkpoints)
