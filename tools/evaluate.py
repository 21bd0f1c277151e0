"""Accuracy on held-out prompts, and divergence from the base policy.

    python tools/evaluate.py --model base=Qwen3-4B --exported exported --prompts heldout.jsonl \\
        --rollouts runs/mine/rollouts --verifier math-verify --output runs/mine/evaluation

`--help` tells all flags; `megatron-erpd evaluate` is the same command.
"""

from megatron_erpd.commands.held_out import evaluate
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(evaluate)
