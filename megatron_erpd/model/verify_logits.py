"""A Megatron checkpoint's logits against those that transformers computes from a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_erpd.checkpoint import LogitComparison, compare_logits, megatron_logits
from megatron_erpd.checkpoint.verify_checkpoint import Pair
from megatron_erpd.errors import CheckpointError
from megatron_erpd.settings import Layout


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

        model = build_frozen_model(model_config(args))
        load_iteration(model, pair.iteration)
        for prompt, reference in zip(prompts, references, strict=True):
            logits = megatron_logits([model], torch.tensor([prompt], device=device))
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
