"""Architectures that this project has no table for, converted by Megatron-Bridge where that is installed.

Megatron-Bridge (`megatron.bridge`) needs Transformer Engine, and so a GPU build. Its checkpoints are Megatron's own
(torch_dist, see `iterations`), with `run_config.yaml` beside the tensors. Both conversions run in one process, which
holds the whole model and has no process group yet: Megatron-Bridge makes one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_erpd.checkpoint.hugging_face.sidecar import copy_files, read_tensor_list
from megatron_erpd.checkpoint.torch_dist.iterations import find_iteration, iteration_folder
from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import new_folder

_INSTALL = (
    "use a container of NVIDIA NeMo, or where CUDA and Transformer Engine are installed `pip install megatron-bridge`"
)


def import_with_bridge(source: Path, checkpoint: Path) -> None:
    """Writes a Megatron checkpoint folder with the weights of a Hugging Face folder.

    Args:
        source: folder with `config.json` and safetensors; code in it is not executed.
        checkpoint: appears by rename when it is whole; must not exist.

    Raises:
        CheckpointError: Megatron-Bridge isn't installed, doesn't know the architecture, or fails.
    """
    bridge = _auto_bridge()
    if not bridge.can_handle(str(source)):
        raise CheckpointError(
            f"{source}: Megatron-Bridge has no conversion for {_architecture(source)} either; take a newer version"
        )
    _refuse_present(checkpoint)
    with new_folder(checkpoint) as partial, _named_errors(source):
        bridge.import_ckpt(str(source), str(partial))
        find_iteration(partial)


def export_with_bridge(source: Path, checkpoint: Path, output: Path) -> None:
    """Writes a Hugging Face folder with the weights of a Megatron checkpoint.

    Args:
        source: the Hugging Face folder that was imported, weights included: Megatron-Bridge takes names and files from
            it, and every one of its tensors must be in the export, in the same shape.
        checkpoint: Megatron checkpoint folder, of which the latest iteration counts, or one of its iterations.
        output: appears by rename when it is whole; must not exist.

    Raises:
        CheckpointError: Megatron-Bridge isn't installed or fails, or tensors are missing, unknown or of another shape.
    """
    root, iteration = find_iteration(checkpoint)
    bridge = _auto_bridge()
    _refuse_present(output)
    with new_folder(output) as partial, _named_errors(checkpoint):
        bridge.from_hf_pretrained(str(source)).export_ckpt(
            str(iteration_folder(root, iteration)), str(partial), show_progress=False
        )
        copy_files(source, partial)
        problems = _tensor_problems(source, partial)
        if problems:
            raise CheckpointError(f"{checkpoint}: exported by Megatron-Bridge, {'; '.join(problems[:5])}")


def _auto_bridge() -> Any:
    try:
        from megatron.bridge import AutoBridge
    except Exception as error:  # also what a missing or broken Transformer Engine raises
        raise CheckpointError(
            f"--via megatron-bridge: can't be imported here ({type(error).__name__}: {error}); {_INSTALL}"
        ) from error
    return AutoBridge


def _architecture(source: Path) -> str:
    try:
        return ", ".join(json.loads((source / "config.json").read_text())["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return "this model"


def _refuse_present(output: Path) -> None:
    if output.exists():
        raise CheckpointError(f"{output}: is there already and is never written over; remove it or name another folder")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of a library that raises whatever it likes
        raise CheckpointError(f"{path}: Megatron-Bridge fails ({type(error).__name__}: {error})") from error


def _tensor_problems(source: Path, export: Path) -> list[str]:
    wanted, found = read_tensor_list(source), read_tensor_list(export)
    if wanted is None or found is None:
        return [f"{export if wanted else source} has no list of tensors to compare"]
    problems = [f"tensor {name} is missing" for name in wanted if name not in found]
    problems += [f"tensor {name} is unknown to {source}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if wanted[name][1] != found[name][1]:
            problems.append(f"tensor {name} has shape {found[name][1]}, in {source} {wanted[name][1]}")
    return sorted(problems)
