"""Running several policies of one architecture through the same pipeline stages at once.

Live teachers and the offline scoring need the logits of several policies on the same tokens. Each pipeline stage
runs its part of every policy, and the hidden states travel between stages side by side, concatenated on the hidden
dimension. So a schedule of Megatron's moves all of them with its own sends and receives, and no second pipeline
can get out of step with the first. (Stages tell each other their shapes: `variable_seq_lengths`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_erpd.data.collate import Batch
from megatron_erpd.model.heads import HiddenStates
from megatron_erpd.model.model import unwrap


def forward_stage(models: Sequence[Any], batch: Batch, processors: Sequence[Any], context: Any = None) -> list[Any]:
    """This pipeline stage of every model on one micro-batch.

    Args:
        models: the policies, the trained one (if any) first. Those after the first run without gradients.
        batch: tokens and positions `[b, s]`, this context-parallel rank's slice.
        processors: one output processor per model. A processor after the first is run first, so that the first
            one's can use what the others gave (as `context["outputs"]`).
        context: handed to the first model's processor.

    Returns:
        On the last stage each processor's result; elsewhere hidden states `[s, b, h]` (see `join`).
    """
    cores = [unwrap(m) for m in models]
    if len(cores) > 1 and not cores[0].pre_process:
        received = cores[0].decoder.input_tensor
        for core, part in zip(cores, received.chunk(len(cores), dim=-1), strict=True):
            core.set_input_tensor(part if core is cores[0] else part.detach())
    outputs: list[Any] = [None] * len(models)
    with torch.no_grad():
        for i in range(1, len(models)):
            outputs[i] = _forward(models[i], batch, processors[i], None)
    if isinstance(context, dict):
        context["outputs"] = outputs[1:]
    outputs[0] = _forward(models[0], batch, processors[0], context)
    return outputs


def join(outputs: list[Any], model: Any) -> torch.Tensor:
    """What a stage hands to the schedule: the first processor's result, or all policies' hidden states side by side."""
    if unwrap(model).post_process or len(outputs) == 1:
        return outputs[0].rows if isinstance(outputs[0], HiddenStates) else outputs[0]
    return torch.cat(outputs, dim=-1)


def _forward(model: Any, batch: Batch, processor: Any, context: Any) -> Any:
    return model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=None,
        packed_seq_params=batch.packed_seq_params,
        output_processor=processor,
        output_processor_context=context,
    )
