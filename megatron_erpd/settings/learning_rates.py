"""The learning rate of a training whose settings give none: by the number of parameters of the base policy.

One rate for stage 1, stage 2 and the controls: the published runs below train the same models at the same rates,
whether by policy gradients, preferences or distillation. Their warm-ups take 10 steps or a tenth of all.

| parameters  | rate | published runs of this size                                                                   |
|-------------|------|-----------------------------------------------------------------------------------------------|
| below 10M   | 1e-4 | none; docs/study.md tuned the quickstart's model of 75,200 parameters (1e-4 to 4e-4)          |
| 10M to 400M | 5e-6 | MiniLLM, on-policy distillation of GPT-2 124M: 5e-6 (microsoft/LMOps,                         |
|             |      | minillm/scripts/gpt2/minillm/train_base_xl.sh); SmolLM2 135M and 360M, DPO: 1e-6              |
|             |      | (huggingface/alignment-handbook, recipes/smollm2/dpo/config_smol.yaml)                        |
| from 400M   | 1e-6 | Open-R1, GRPO of DeepSeek-R1-Distill-Qwen-1.5B (huggingface/open-r1,                          |
|             |      | recipes/DeepSeek-R1-Distill-Qwen-1.5B/grpo/config_demo.yaml); slime, GRPO of Qwen3-4B         |
|             |      | (THUDM/slime, scripts/run-qwen3-4B.sh); verl, GRPO of Qwen2-7B and DeepSeek-V3 671B           |
|             |      | (volcengine/verl, examples/grpo_trainer/run_qwen2-7b_math.sh and                              |
|             |      | run_deepseek671b_math_megatron_80gb.sh); DAPO, Qwen2.5-32B (volcengine/verl,                  |
|             |      | recipe/dapo/run_dapo_qwen2.5_32b.sh). Lower: Tülu 3, PPO of 8B at 3e-7, of 70B and 405B at    |
|             |      | 1e-7 (allenai/open-instruct, docs/tulu3.md)                                                   |

A rate that is too low costs epochs; one that is too high ruins the policy in a few steps (SmolLM2-135M fell from an
accuracy of .05 to .000 in six steps at 1e-4). Within a row the lower end is the safer choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DefaultRate:
    """A row of the table: models of at least `low` and less than `high` parameters."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        """`default for models of 10M to 400M parameters`."""
        if self.low == 0:
            sizes = f"below {count(self.high)}"
        elif math.isinf(self.high):
            sizes = f"from {count(self.low)}"
        else:
            sizes = f"of {count(self.low)} to {count(self.high)}"
        return f"default for models {sizes} parameters"


DEFAULT_RATES = (DefaultRate(1e-4, 0, 10e6), DefaultRate(5e-6, 10e6, 400e6), DefaultRate(1e-6, 400e6, math.inf))
WARMUP_FRACTION = 0.1
"""Of the steps, with a rate from the table: a warm-up is part of the runs that it is from."""


def default_rate(num_parameters: int) -> DefaultRate:
    """The row of a model of this size."""
    return next(row for row in DEFAULT_RATES if row.low <= num_parameters < row.high)


def chosen_rates(
    learning_rate: float | None, warmup_fraction: float | None, num_parameters: Callable[[], int]
) -> dict[str, float]:
    """The two settings as a training takes them; None of either stands for its default.

    Args:
        num_parameters: of the base policy; asked only where the rate is not given.
    """
    default_warmup = WARMUP_FRACTION if learning_rate is None else 0.0
    return {
        "learning_rate": default_rate(num_parameters()).rate if learning_rate is None else learning_rate,
        "warmup_fraction": default_warmup if warmup_fraction is None else warmup_fraction,
    }


def describe_rates(learning_rate: float | None, warmup_fraction: float | None, num_parameters: int) -> str:
    """The rate that a training takes and why, as `1e-06: default for models from 400M parameters (this one has 4.02B),
    warm-up over the first 10% of the steps`."""
    rates = chosen_rates(learning_rate, warmup_fraction, lambda: num_parameters)
    why = "given"
    if learning_rate is None:
        why = f"{default_rate(num_parameters)} (this one has {count(num_parameters)})"
    warmup = rates["warmup_fraction"]
    after = f", warm-up over the first {100 * warmup:g}% of the steps" if warmup else ""
    return f"{rates['learning_rate']:g}: {why}{after}"


def count(parameters: float) -> str:
    """Parameters as people say them: `75.2K`, `135M`, `4.02B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return f"{parameters:g}"
