"""One of a teacher's checkpoints, chosen on held-out validation prompts, and the signal that it speaks for.

    python tools/select_teacher.py --model Qwen3-4B --teacher runs/mine/teacher --candidates runs/mine/candidates \\
        --prompts validation.jsonl --verifier math-verify --output runs/mine/selection

`--help` tells all flags; `megatron-erpd select` is the same command.
"""

from megatron_erpd.commands.held_out import select
from megatron_erpd.launch.program import run_command

if __name__ == "__main__":
    run_command(select)
