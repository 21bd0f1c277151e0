"""Sample rollouts from a policy and score them.

    python tools/sample.py --model Qwen3-4B --prompts train.jsonl --verifier math-verify \\
        --output runs/mine/rollouts

`--help` tells all flags; `megatron-erpd sample` is the same command.
"""

from megatron_erpd.commands.rollouts import sample
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(sample)
