"""Stage 1, off-policy replay on fixed rollouts; also the unlearned policy and the warm-up.

    torchrun --nproc-per-node 2 -- tools/train_teacher.py --base runs/mine/base --rollouts runs/mine/rollouts \\
        --base-log-probs runs/mine/base-log-probs --output runs/mine/teacher --loss ce --tensor-parallel 2

Megatron's own flags follow after a second `--`. `--help` tells all flags;
`megatron-erpd train-teacher` is the same command.
"""

from megatron_erpd.commands.train import train_teacher
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(train_teacher)
