"""A baseline: GRPO on policy, one update on fresh rollouts at a time.

    torchrun --nproc-per-node 2 tools/train_on_policy.py --base runs/mine/base --prompts train.jsonl \\
        --verifier math-verify --output runs/mine/grpo --tensor-parallel 2

Megatron's own flags follow after `--`. `--help` tells all flags; `megatron-erpd train-on-policy` is the same command.
"""

from megatron_erpd.commands.on_policy import train_on_policy
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(train_on_policy)
