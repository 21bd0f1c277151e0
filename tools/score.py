"""Score sampled rollouts: rewards apart from them, for the trainings' --rewards.

    python tools/score.py --rollouts runs/mine/rollouts --prompts train.jsonl --verifier math-verify \\
        --output runs/mine/rewards

`--help` tells all flags; `megatron-erpd score` is the same command.
"""

from megatron_erpd.commands.rollouts import score
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(score)
