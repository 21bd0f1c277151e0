"""The size of a stage's micro-batches, in its processes: chosen by the GPU's memory where none is given, and checked
against the rollouts before anything is written."""

from __future__ import annotations

from megatron_erpd import platform
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.data.batch import TokenSource
from megatron_erpd.model.arguments import rank
from megatron_erpd.plan.budgets import StageRollouts, sized
from megatron_erpd.recipe.requests import Distill, Precompute, TrainOnPolicy, TrainTeacher
from megatron_erpd.recipe.stages import Stage


def with_size[R: (Precompute, TrainTeacher, TrainOnPolicy, Distill)](
    request: R, rollouts: TokenSource | StageRollouts
) -> R:
    """The request, on GPUs with the token budget that a layout without a size of micro-batches gets; rank 0 says what
    there is to say.

    Raises:
        LayoutError: from `budgets.sized`.
    """
    if not isinstance(rollouts, StageRollouts):
        names = rollouts.sample_ids
        rollouts = StageRollouts(rollouts.prompt_lengths, rollouts.lengths, lambda row: f"rollout {names[row]}")
    stage = Stage(request.command, request)
    layout, lines = sized(stage, read_model_shape(request.base / "hf"), rollouts, platform.device_memory())
    if rank() == 0:
        for line in lines:
            print(line, flush=True)
    return request.model_copy(update={"layout": layout})
