"""Starting and ending a stage's process: output folder, Megatron's global state, process groups."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_erpd import platform
from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST, differences, input_digest, read_manifest, write_manifest
from megatron_erpd.settings import Layout
from megatron_erpd.training.arguments import parse_megatron_arguments, rank, single_process_store

REQUEST = "request.json"


def prepare_output(output: Path, stage: str, settings: dict[str, Any], inputs: Mapping[str, Path]) -> None:
    """Takes the output folder for a stage, or refuses it.

    A finished artifact is never written over. An unfinished one is taken up again only by the same stage with the same
    settings and inputs: what was asked for is kept in `request.json` from the start.

    Raises:
        StageError: the folder holds a finished artifact, or an unfinished one of another request.
    """
    if rank() != 0:  # one rank decides; its error ends the others
        return
    wanted = {
        "stage": stage,
        "settings": json.loads(json.dumps(settings)),
        "inputs": {name: input_digest(path) for name, path in inputs.items()},
    }
    if (output / MANIFEST).is_file():
        lines = differences(read_manifest(output), stage, settings, wanted["inputs"])
        what = "the same one" if not lines else "another one:\n  " + "\n  ".join(lines)
        raise StageError(f"{output}: already holds a finished artifact, {what}; give another --output or delete it")
    request = output / REQUEST
    if request.is_file():
        found = json.loads(request.read_text())
        if found != wanted:
            changed = [key for key in wanted if found.get(key) != wanted[key]]
            raise StageError(
                f"{output}: was begun with other {' and '.join(changed)} and can't be continued with these; "
                "give another --output or delete it"
            )
        return
    if output.is_dir() and any(p.name != "logs" for p in output.iterdir()):
        raise StageError(f"{output}: holds files that no stage left there; give an empty or new folder as --output")
    output.mkdir(parents=True, exist_ok=True)
    temporary = request.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
    temporary.replace(request)


def finish_output(output: Path, summary: dict[str, Any] | None = None) -> None:
    """Publishes the manifest of what `prepare_output` was asked for. One rank calls it, when all else is written."""
    request = json.loads((output / REQUEST).read_text())
    (output / REQUEST).unlink()
    write_manifest(output, request["stage"], request["settings"], request["inputs"], summary)


def initialize(
    hf_folder: Path,
    layout: Layout,
    run_flags: Mapping[str, object],
    pass_through: list[str],
    max_length: int,
    store: torch.distributed.Store | None,
) -> argparse.Namespace:
    """Megatron's global state for a stage that does not train: arguments, process groups, seeds."""
    flags = {**common_flags(), "eval_interval": 1, "eval_iters": 0, "save_interval": 1, "lr": 1.0, **run_flags}
    args = parse_megatron_arguments(hf_folder, layout, flags, pass_through, max_length)
    from megatron.training.initialize import initialize_megatron

    initialize_megatron(allow_no_cuda=platform.is_cpu(), store=store)
    return args


def common_flags() -> dict[str, object]:
    """Megatron flags that are the same for every stage."""
    return {
        "ckpt_format": "torch_dist",
        "dataloader_type": "external",
        "calculate_per_token_loss": True,
        "no_create_attention_mask_in_dataloader": True,
        # The other dispatcher refuses sequences of varying length, also in models without experts.
        "moe_token_dispatcher_type": "alltoall",
        # Reruns of a step would update the KL controller twice; NaNs are still checked.
        "rerun_mode": "disabled",
    }


@contextmanager
def stage_process() -> Iterator[torch.distributed.Store | None]:
    """A stage's use of this process: gives the store to meet in, and clears Megatron's global state afterwards.

    A process group that the caller made before the stage is used and stays, and so do Megatron's groups in it: further
    stages of the same layout take them over (gloo keeps the threads of a group that is dropped). Otherwise all groups
    are left. After an error nothing is cleared: the process is about to end, and clearing could wait for ranks that are
    gone.
    """
    inherited = torch.distributed.is_initialized()
    yield single_process_store()
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    if not inherited:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
