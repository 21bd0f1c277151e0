"""A Megatron checkpoint's logits against those that transformers computes from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_erpd.checkpoint.compare import Pair
from megatron_erpd.errors import CheckpointError
from megatron_erpd.settings import Layout

LOGIT_TOLERANCE = 1e-4
"""Largest difference between two fp32 logits, as a fraction of the largest logit: rounding stays well below."""


@dataclass(frozen=True)
class LogitComparison:
    """Two models' logits for the same tokens."""

    max_difference: float
    max_logit: float
    """Largest absolute logit of the reference."""
    argmax_agreement: float
    """Fraction of positions where both models' likeliest token is the same."""

    @property
    def relative_difference(self) -> float:
        return self.max_difference / self.max_logit

    def agrees(self, tolerance: float = LOGIT_TOLERANCE) -> bool:
        return self.relative_difference <= tolerance


def compare_logits(logits: torch.Tensor, reference: torch.Tensor) -> LogitComparison:
    """Compares logits `[b, s, v]` with a reference's `[b, s, V]`, in fp32; padding columns `[V, v)` are left out."""
    ours, theirs = logits[..., : reference.shape[-1]].float(), reference.float()
    assert ours.shape == theirs.shape, f"logits {list(logits.shape)} against {list(reference.shape)}"
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return LogitComparison(float((ours - theirs).abs().max()), float(theirs.abs().max()), float(same))


@torch.no_grad()
def megatron_logits(model_chunks: Sequence[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """All logits of a Megatron model for a few short sequences.

    Activations are passed from stage to stage; the last stage gathers its logits over TP. Collective over the model's
    TP and PP ranks. No virtual pipelining, no context parallelism.

    Args:
        model_chunks: this rank's one chunk of the model, in evaluation mode, wrapped or not.
        tokens: `[b, s]` int64, on the model's device, the same on all ranks. Under sequence parallelism `s` must be a
            multiple of TP.

    Returns:
        `[b, s, padded vocabulary]` on the last pipeline stage, None on the others.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.utils import unwrap_model

    assert len(model_chunks) == 1, "virtual pipelining is not supported here"
    assert parallel_state.get_context_parallel_world_size() == 1, "context parallelism is not supported here"
    model = unwrap_model(model_chunks[0])
    batch, length = tokens.shape
    stages = parallel_state.get_pipeline_model_parallel_group()
    if not model.pre_process:
        split = parallel_state.get_tensor_model_parallel_world_size() if model.config.sequence_parallel else 1
        dtype = model.config.pipeline_dtype or model.config.params_dtype
        received = torch.empty(length // split, batch, model.config.hidden_size, dtype=dtype, device=tokens.device)
        dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=stages)
        model.set_input_tensor(received)
    positions = torch.arange(length, device=tokens.device).expand(batch, length)
    output = model(tokens, positions, None)
    if not model.post_process:
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=stages)
        return None
    return tensor_parallel.gather_from_tensor_model_parallel_region(output)


def compare_on_prompts(pair: Pair, prompts: list[list[int]]) -> list[LogitComparison]:
    """Runs prompts through both models, in fp32, one after the other: one model is in memory at a time.

    Args:
        pair: the checkpoint, built from the configuration that its artifact holds (where it holds one), and the folder
            for transformers, built from the folder's own.
        prompts: token ids, each a sequence of its own.

    Returns:
        One comparison per prompt.

    Raises:
        CheckpointError: a prompt is longer than the model's context.
    """
    from megatron_erpd import platform
    from megatron_erpd.model.runtime import initialize, stage_process

    length = max(len(prompt) for prompt in prompts)
    device = platform.device()
    references = _transformers_logits(pair.hf_folder, prompts, device)
    found = []
    with stage_process() as store:
        flags = {"no_load_optim": True, "train_iters": 0}
        args = initialize(pair.config_folder or pair.hf_folder, Layout(), flags, [], length, store)
        from megatron_erpd.model.model import build_frozen_model, load_iteration, model_config

        chunks = build_frozen_model(model_config(args))
        load_iteration(chunks, pair.iteration)
        for prompt, reference in zip(prompts, references, strict=True):
            logits = megatron_logits(chunks, torch.tensor([prompt], device=device))
            assert logits is not None  # there is one pipeline stage
            found.append(compare_logits(logits.cpu(), reference))
    return found


def _transformers_logits(folder: Path, prompts: list[list[int]], device: torch.device | str) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: transformers can't load it: {error}") from None
    model = model.to(device).eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt], device=device)).logits.cpu() for prompt in prompts]
