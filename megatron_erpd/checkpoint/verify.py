"""Proofs that a conversion is right: weights compared bit for bit, logits against the `transformers` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_erpd.checkpoint.hf_weights import HfWeights
from megatron_erpd.checkpoint.shards import unwrap

LOGIT_TOLERANCE = 1e-4
"""Largest difference between two fp32 logits, as a fraction of the largest logit: rounding stays well below."""

_ROWS_AT_ONCE = 4096


def compare_weights(a: Path | str, b: Path | str) -> list[str]:
    """How the weights of two Hugging Face folders differ, a line per tensor; empty where they are equal bit for bit.

    Reads a few thousand rows at a time. How the tensors are spread over files makes no difference.

    Raises:
        CheckpointError: a folder has no readable weights.
    """
    first, second = HfWeights(a), HfWeights(b)
    lines = [f"{name}: only in {a}" for name in sorted(first.names - second.names)]
    lines += [f"{name}: only in {b}" for name in sorted(second.names - first.names)]
    for name in sorted(first.names & second.names):
        line = _compare_tensor(first, second, name)
        if line:
            lines.append(line)
    return lines


def _compare_tensor(first: HfWeights, second: HfWeights, name: str) -> str | None:
    described = [f"{weights.dtype(name)} {list(weights.shape(name))}" for weights in (first, second)]
    if described[0] != described[1]:
        return f"{name}: {described[0]} in the one, {described[1]} in the other"
    differing, largest, total = 0, 0.0, 0
    rows = first.shape(name)[0]
    for start in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - start)
        x, y = (weights.read(name, start, count).contiguous() for weights in (first, second))
        total += x.numel()
        # Bits, not values: -0.0 equals 0.0 and a NaN equals nothing.
        unequal = (x.view(torch.uint8) != y.view(torch.uint8)).view(x.numel(), -1).any(dim=1)
        if unequal.any():
            differing += int(unequal.sum())
            largest = max(largest, float((x.double() - y.double()).abs().max()))
    if not differing:
        return None
    return f"{name}: {differing} of {total} elements differ, by up to {largest:.3g}"


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

    assert len(model_chunks) == 1, "virtual pipelining is not supported here"
    model = unwrap(model_chunks[0])
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
