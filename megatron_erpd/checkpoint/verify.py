"""Proofs that a conversion is right: weights compared bit for bit, logits against the `transformers` library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_erpd.checkpoint.file_writer import PIECE_BYTES
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights
from megatron_erpd.checkpoint.mapping.param_map import Unit
from megatron_erpd.checkpoint.mapping.shards import gather_objects, unwrap
from megatron_erpd.checkpoint.torch_dist.reader import TorchDistReader

LOGIT_TOLERANCE = 1e-4
"""Largest difference between two fp32 logits, as a fraction of the largest logit: rounding stays well below."""


def compare_weights(a: Path | str, b: Path | str) -> list[str]:
    """How the weights of two Hugging Face folders differ, a line per tensor; empty where they are equal bit for bit.

    Reads some MB at a time. How the tensors are spread over files makes no difference.

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
    tally = _Tally()
    for start, count in _pieces(first, name):
        tally.add(first.read(name, start, count), second.read(name, start, count))
    return tally.line(name)


@dataclass
class _Tally:
    """How the parts of two tensors differ."""

    total: int = 0
    differing: int = 0
    largest: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Compares two parts of one shape and type. Bits, not values: -0.0 equals 0.0 and a NaN equals nothing."""
        self.total += a.numel()
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        x, y = (part.contiguous().view(-1).view(integers).numpy() for part in (a, b))
        if np.array_equal(x, y):  # several times as fast as torch.equal
            return
        self.differing += int((x != y).sum())
        self.largest = max(self.largest, float((a.double() - b.double()).abs().max()))

    def line(self, name: str) -> str | None:
        if not self.differing:
            return None
        return f"{name}: {self.differing} of {self.total} elements differ, by up to {self.largest:.3g}"


@dataclass(frozen=True)
class Compared:
    """What was compared, bit for bit, and how it differs."""

    num_tensors: int
    num_bytes: int
    differences: tuple[str, ...]

    @classmethod
    def of_all(cls, mine: Compared) -> Compared:
        """The sum over all processes; collective."""
        parts: list[Compared] = gather_objects(mine)
        lines = tuple(line for part in parts for line in part.differences)
        return cls(sum(part.num_tensors for part in parts), sum(part.num_bytes for part in parts), lines)


def compare_checkpoint(
    reader: TorchDistReader,
    weights: HfWeights,
    tensors: Iterable[tuple[Unit, str]],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Compared:
    """Compares a Megatron checkpoint with a Hugging Face folder, bit for bit in the folder's element types.

    Every element of every tensor is compared. Pieces of some MB are in memory.

    Args:
        reader: the checkpoint.
        weights: the folder.
        tensors: which of the folder's tensors to compare, and the unit that each is in.
        progress: told how many bytes were compared.

    Raises:
        CheckpointError: a file can't be read.
    """
    lines: list[str] = []
    num_tensors = num_bytes = 0
    for unit, name in tensors:
        tally, covered = _Tally(), 0
        for start, count in _pieces(weights, name):
            theirs = weights.read(name, start, count)
            ours = torch.empty_like(theirs)
            covered += reader.read_rows(ours, unit, name, start)
            tally.add(ours, theirs)
            progress(theirs.nbytes)
            num_bytes += theirs.nbytes
        num_tensors += 1
        if covered != tally.total:
            lines.append(f"{name}: the checkpoint has {covered} of its {tally.total} elements")
        elif line := tally.line(name):
            lines.append(line)
    return Compared(num_tensors, num_bytes, tuple(lines))


def _pieces(weights: HfWeights, name: str) -> Iterator[tuple[int, int]]:
    """First row and number of rows of a tensor's pieces."""
    rows, *others = weights.shape(name)
    step = max(1, PIECE_BYTES // (prod(others) * weights.itemsize(name)))
    return ((start, min(step, rows - start)) for start in range(0, rows, step))


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
