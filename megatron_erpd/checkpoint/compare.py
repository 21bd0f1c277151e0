"""Weights compared bit for bit: a Megatron checkpoint with a Hugging Face folder, whichever of the two was made of the
other, or two Hugging Face folders."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from megatron_erpd.checkpoint.file_writer import PIECE_BYTES
from megatron_erpd.checkpoint.hugging_face.same_config import configuration_differences
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights, check_tensors
from megatron_erpd.checkpoint.mapping.config import ModelShape, read_model_shape
from megatron_erpd.checkpoint.mapping.param_map import Unit, is_ignored, units
from megatron_erpd.checkpoint.torch_dist.iterations import BRIDGE_TRACKER, TRACKER, iteration_folder, latest_iteration
from megatron_erpd.checkpoint.torch_dist.reader import METADATA, TorchDistReader
from megatron_erpd.errors import CheckpointError, raise_problems
from megatron_erpd.meeting import gather_objects
from megatron_erpd.model_folder import has_weights


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


def unlike_table(reader: TorchDistReader, shape: ModelShape) -> list[str]:
    """What a checkpoint lacks of a model of this shape or has besides, a line each; reads `.metadata` only."""
    found = units(shape)
    known = {unit.key for unit in found}
    problems = [f"the checkpoint has no tensor {unit}" for unit in found if not reader.chunks(unit)]
    for key in reader.names():
        if reader.layerless(key) not in known:
            problems.append(f"the checkpoint's tensor {key} is unknown for {shape.family.name}, and would be lost")
    return problems


@dataclass(frozen=True)
class Pair:
    """What is compared: an iteration of a Megatron checkpoint, and a Hugging Face folder with weights."""

    iteration: Path
    hf_folder: Path

    @property
    def config_folder(self) -> Path | None:
        """The configuration that the checkpoint's artifact holds; None for a checkpoint that is none's."""
        folder = self.iteration.parents[1] / "hf"
        return folder if self.iteration.parent.name == "megatron" and (folder / "config.json").is_file() else None


def find_pair(a: Path, b: Path) -> Pair:
    """Which of two paths is the checkpoint and which the Hugging Face folder.

    A checkpoint is an artifact with `megatron/`, Megatron's own folder or one of its `iter_...` folders; `@NUMBER`
    after the path of the first two chooses an iteration.

    Raises:
        CheckpointError: they are not one of each; says what was found.
    """
    checkpoints = [_find_iteration(path) for path in (a, b)]
    folders = [path if has_weights(path) else None for path in (a, b)]
    for iteration, folder in ((checkpoints[0], folders[1]), (checkpoints[1], folders[0])):
        if iteration is not None and folder is not None:
            return Pair(iteration, folder)
    found = [
        f"{path} is {'a checkpoint' if iteration else 'a Hugging Face folder' if folder else 'neither'}"
        for path, iteration, folder in zip((a, b), checkpoints, folders, strict=True)
    ]
    raise CheckpointError(
        f"a Megatron checkpoint and a Hugging Face folder with safetensors are compared, but {found[0]} and "
        f"{found[1]}; give an artifact of import or of a training, and the folder"
    )


def _find_iteration(path: Path) -> Path | None:
    match = re.fullmatch(r"(.+)@(\d+)", str(path))
    folder, number = (Path(match[1]), int(match[2])) if match and not path.exists() else (path, None)
    if (folder / METADATA).is_file():
        return folder
    for checkpoint in (folder / "megatron", folder):
        if any((checkpoint / name).is_file() for name in (TRACKER, BRIDGE_TRACKER)):
            return iteration_folder(checkpoint, latest_iteration(checkpoint) if number is None else number)
    return None


@dataclass(frozen=True)
class PairComparison:
    """What a comparison covered, and how it went."""

    pair: Pair
    compared: Compared
    seconds: float
    left_out: tuple[str, ...]
    """Tensors of the folder that carry nothing of their own."""
    rounded: bool
    """Whether the checkpoint is wider than the folder, so that its values were rounded before they were compared."""
    notes: tuple[str, ...] = ()
    """How the two configurations differ where that doesn't change what is computed, or why they weren't compared."""

    def describe(self) -> str:
        found = self.compared
        words = f"{found.num_tensors} tensors, {found.num_bytes / 1e9:.2f} GB, in {self.seconds:.1f} s"
        if self.rounded:
            words += "; the checkpoint's values rounded to the folder's type"
        if self.left_out:
            words += f"; left out, as they follow from others: {', '.join(self.left_out[:3])}"
            words += f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
        return words


def compare_pair(pair: Pair, progress: Callable[[int, int], None] = lambda done, total: None) -> PairComparison:
    """Compares the configurations, and every element of every tensor, bit for bit.

    Args:
        pair: from `find_pair`.
        progress: told the bytes that are compared, and of how many.

    Raises:
        CheckpointError: the configuration that the checkpoint's artifact holds computes something else than the
            folder's (names the keys); one of the two lacks a tensor, has one that is unknown or of another shape, or is
            broken.
    """
    if pair.config_folder is None:
        notes = [f"no configuration lies beside {pair.iteration}; what it computes was taken from the folder's"]
    else:
        problems, notes = configuration_differences(pair.config_folder, pair.hf_folder)
        raise_problems(f"{pair.iteration} and {pair.hf_folder} are not one model", problems)
    shape = read_model_shape(pair.hf_folder)
    weights, reader = HfWeights(pair.hf_folder), TorchDistReader(pair.iteration)
    raise_problems(pair.hf_folder, check_tensors(weights, shape))
    raise_problems(pair.iteration, unlike_table(reader, shape))
    tensors = [(unit, name) for unit in units(shape) for name in unit.hf_names]
    total, done = _num_bytes(weights, shape), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    begin = time.monotonic()
    compared = compare_checkpoint(reader, weights, tensors, advance)
    known = {name for _, name in tensors}
    wider = any(
        reader.dtype(chunk).itemsize > max(weights.itemsize(name) for name in unit.hf_names)
        for unit in units(shape)
        for chunk in reader.chunks(unit)[:1]
    )
    left_out = tuple(sorted(name for name in weights.names - known if is_ignored(name) or shape.tied_embeddings))
    return PairComparison(pair, compared, time.monotonic() - begin, left_out, wider, tuple(notes))


def _num_bytes(weights: HfWeights, shape: ModelShape) -> int:
    names = [name for unit in units(shape) for name in unit.hf_names]
    return sum(weights.itemsize(name) * prod(weights.shape(name)) for name in names)
