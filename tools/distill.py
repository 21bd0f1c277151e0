"""Stage 2, from the base policy to the student under a trust region.

    torchrun --nproc-per-node 2 -- tools/distill.py --base runs/mine/base --rollouts runs/mine/rollouts \\
        --base-log-probs runs/mine/base-log-probs --cache runs/mine/cache --output runs/mine/student \\
        --tensor-parallel 2

The first `--` keeps torchrun from taking `--signal` for a flag of its own. Megatron's own flags
follow after a second one. `--help` tells all flags; `megatron-erpd distill` is the same command.
"""

from megatron_erpd.commands.train import distill
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(distill)
