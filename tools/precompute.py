"""The teacher cache, log-probs and target distributions of fixed policies.

    torchrun --nproc-per-node 2 -- tools/precompute.py --base runs/mine/base --policy teacher=runs/mine/teacher \\
        --rollouts runs/mine/rollouts --output runs/mine/cache --tensor-parallel 2

The first `--` keeps torchrun from taking `--signal` for a flag of its own. Megatron's own flags
follow after a second one. `--help` tells all flags; `megatron-erpd precompute` is the same command.
"""

from megatron_erpd.commands.precompute import precompute
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(precompute)
