"""A Megatron checkpoint as a Hugging Face folder; no model is built.

Every process writes files of its own, a few MB at a time, and compares them with the checkpoint afterwards. The folder
gets its name when every tensor that the source lists is there and was found equal.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_erpd.checkpoint.compare import Compared, compare_checkpoint, unlike_table
from megatron_erpd.checkpoint.file_writer import Fill, require_space
from megatron_erpd.checkpoint.hugging_face.export_plan import as_dtype, check_written, element_types, set_config_dtype
from megatron_erpd.checkpoint.hugging_face.sidecar import copy_files
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights
from megatron_erpd.checkpoint.hugging_face.writer import (
    DEFAULT_SHARD_BYTES,
    PlannedFile,
    ShardWriter,
    plan_files,
    write_index,
)
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.param_map import Unit, hf_shapes, units
from megatron_erpd.checkpoint.torch_dist.reader import TorchDistReader
from megatron_erpd.errors import CheckpointError, raise_problems
from megatron_erpd.files import partial_folder, publish_folder, remove_unfinished, write_json
from megatron_erpd.meeting import ShareProgress, do_together, rank, share

_PLAN = ".export.json"
"""In an unfinished export: what it is of, so that no other export resumes it."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote and compared."""

    compared: Compared
    seconds: float
    """That reading and writing took."""
    compare_seconds: float
    checksums: dict[str, str]
    """Name of a weight file to SHA-256, of the files that this process wrote; kept ones are not read again."""


def export_checkpoint(
    iteration: Path,
    source_hf_folder: Path,
    output: Path,
    dtype: torch.dtype | str | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ExportResult:
    """Writes an iteration of a Megatron checkpoint, of any layout, as a Hugging Face folder like the one it came from.

    A tensor's rows are put together from the chunks that the checkpoint has of them, a few MB at a time. With the
    source's element types an import and an export give the same bits. Called again after an interruption, it keeps the
    files that are whole.

    Collective over all processes, of which there may be any number.

    Args:
        iteration: an `iter_...` folder.
        source_hf_folder: where configuration, tokenizer and the list of tensors come from: the original folder, or what
            `copy_sidecar` made of it.
        output: folder to make; must not exist.
        dtype: element type of all tensors; None for the source's, tensor by tensor.
        max_shard_bytes: size at which another file is begun.

    Raises:
        CheckpointError: the output exists, the checkpoint lacks a tensor or has an unknown one, it doesn't fit
            `config.json`, a file is broken, there is no room, or what was written differs from the checkpoint.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists and is never written over; give another folder or delete it")
    shape = read_model_shape(source_hf_folder)
    reader = TorchDistReader(iteration)
    dtypes, problems = element_types(source_hf_folder, shape, as_dtype(dtype))
    raise_problems(source_hf_folder, problems)
    raise_problems(iteration, unlike_table(reader, shape))
    files = plan_files(hf_shapes(shape), dtypes, max_shard_bytes)
    folder = partial_folder(output)
    do_together(folder, lambda: _begin(folder, source_hf_folder, files, dtypes, iteration))

    owner = {name: unit for unit in units(shape) for name in unit.hf_names}
    mine = share(files)
    todo = [file for file in mine if not (folder / file.name).is_file()]
    checksums: dict[str, str] = {}
    progress = ShareProgress("exported", sum(file.tensor_bytes for file in todo))

    def write() -> None:
        for file in todo:
            checksums[file.name] = _write_file(folder, file, owner, reader, progress)

    begin = time.monotonic()
    do_together(folder, write)
    written_at = time.monotonic()
    found: list[Compared] = []

    def compare() -> None:
        tensors = [(owner[name], name) for file in mine for name in file.shapes]
        written = HfWeights(folder, only=[file.name for file in mine], once=True)
        found.append(compare_checkpoint(reader, written, tensors))
        if found[0].differences:
            for file in mine:  # or the next attempt would keep them
                (folder / file.name).unlink()
        raise_problems(f"{folder}: differs from {iteration}, export again", found[0].differences)

    do_together(folder, compare)
    compared_at = time.monotonic()

    def publish() -> None:
        if rank() == 0:
            write_index(folder, files)
            check_written(folder, shape, dtypes)
            (folder / _PLAN).unlink()
            publish_folder(output)

    do_together(output, publish)
    seconds = written_at - begin, compared_at - written_at
    return ExportResult(Compared.of_all(found[0]), *seconds, checksums)


def _begin(
    folder: Path, source: Path, files: Sequence[PlannedFile], dtypes: Mapping[str, torch.dtype], iteration: Path
) -> None:
    """Makes the folder and all in it but the weights, or finds it as an interrupted export of the same left it."""
    if rank() != 0:
        return
    # Two checkpoints of one architecture may have the same metadata, and files of the same size.
    found = {path.name: path.stat() for path in sorted(iteration.iterdir())}
    plan = {
        "checkpoint": {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()},
        "files": {file.name: hashlib.sha256(file.header()).hexdigest() for file in files},
    }
    if folder.exists() and _read_plan(folder) != plan:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    write_json(folder / _PLAN, plan)
    require_space(folder, sum(file.tensor_bytes for file in files if not (folder / file.name).is_file()))
    copy_files(source, folder)
    set_config_dtype(folder / "config.json", dtypes)


def _read_plan(folder: Path) -> object:
    try:
        return json.loads((folder / _PLAN).read_text())
    except (OSError, ValueError):
        return None


def _write_file(
    folder: Path, file: PlannedFile, owner: Mapping[str, Unit], reader: TorchDistReader, progress: ShareProgress
) -> str:
    with ShardWriter(folder, file) as writer:
        for name in file.shapes:
            writer.add_rows(name, _reads(name, owner[name], reader, progress))
    return writer.sha256


def _reads(name: str, unit: Unit, reader: TorchDistReader, progress: ShareProgress) -> Fill:
    """What reads rows of a Hugging Face tensor where they lie in the checkpoint; padding rows are none of them."""

    def fill(rows: torch.Tensor, start: int) -> None:
        if reader.read_rows(rows, unit, name, start) != rows.numel():
            raise CheckpointError(f"{reader.folder}: {unit}: its chunks do not cover {name} exactly")
        progress.advance(rows.nbytes)

    return fill
