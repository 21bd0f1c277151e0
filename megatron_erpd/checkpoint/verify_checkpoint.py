"""A Megatron checkpoint against a Hugging Face folder, whichever of the two was made of the other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_erpd.checkpoint.hugging_face.same_config import configuration_differences
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights, check_tensors
from megatron_erpd.checkpoint.mapping.config import ModelShape, read_model_shape
from megatron_erpd.checkpoint.mapping.param_map import is_ignored, units
from megatron_erpd.checkpoint.mapping.shards import raise_problems
from megatron_erpd.checkpoint.stream_export import unlike_table
from megatron_erpd.checkpoint.torch_dist.iterations import BRIDGE_TRACKER, TRACKER, iteration_folder, latest_iteration
from megatron_erpd.checkpoint.torch_dist.reader import METADATA, TorchDistReader
from megatron_erpd.checkpoint.verify import Compared, compare_checkpoint
from megatron_erpd.errors import CheckpointError
from megatron_erpd.model_folder import has_weights


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
class Verified:
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


def verify_checkpoint(pair: Pair, progress: Callable[[int, int], None] = lambda done, total: None) -> Verified:
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
    return Verified(pair, compared, time.monotonic() - begin, left_out, wider, tuple(notes))


def _num_bytes(weights: HfWeights, shape: ModelShape) -> int:
    names = [name for unit in units(shape) for name in unit.hf_names]
    return sum(weights.itemsize(name) * prod(weights.shape(name)) for name in names)
