"""Starting and ending a stage's process: output folder, Megatron's global state, process groups."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from megatron_erpd import meeting, platform
from megatron_erpd.checkpoint.torch_dist.iterations import read_of_latest
from megatron_erpd.data.batch import close_all
from megatron_erpd.errors import LayoutError
from megatron_erpd.manifest import Reads, begin_artifact
from megatron_erpd.model.arguments import parse_megatron_arguments, process_store, rank
from megatron_erpd.sampling.inputs import input_digests
from megatron_erpd.settings import Layout
from megatron_erpd.vocab_parallel.shard import set_chunk_bytes
from megatron_erpd.vocab_parallel.token_terms import kernels_for, set_kernels


def prepare_output(
    output: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    verify: bool = False,
    reads: Reads | None = read_of_latest,
) -> None:
    """Takes the output folder for a stage (`manifest.begin_artifact`), on the one rank that decides, for which the
    others wait.

    Args:
        verify: also compare what of the inputs is read with their manifests, each rank a share of the files.
        reads: which files of an input are read.

    Raises:
        StageError: the folder holds a finished artifact, an unfinished one of another request, or foreign files; or a
            file of an input is not the one that its manifest recorded.
    """
    meeting.first(lambda: _begin(output, stage, settings, inputs))
    if verify:
        meeting.verify_inputs_together(inputs.values(), reads)


def check_same_layout(layout: Layout) -> None:
    """Refuses processes whose layouts differ: each may have chosen its token budget by the memory of its own GPU.

    Raises:
        LayoutError: at the first process, `StageError` at the others.
    """
    layouts = meeting.gather(layout.model_dump(mode="json"))
    meeting.first(lambda: _refuse_others(layouts))


def _refuse_others(layouts: list[dict[str, Any]]) -> None:
    for number, layout in enumerate(layouts):
        differing = [
            f"{name} {layout[name]} and not {value}" for name, value in layouts[0].items() if layout[name] != value
        ]
        if differing:
            raise LayoutError(
                f"rank {number} has {', '.join(differing)}, as rank 0 has: their GPUs differ in memory, or their "
                "commands do; give micro_batch_tokens, and the same command to all"
            )


def _begin(output: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> None:
    begin_artifact(output, stage, settings, input_digests(stage, inputs))


def initialize(
    hf_folder: Path,
    layout: Layout,
    run_flags: Mapping[str, object],
    pass_through: list[str],
    max_length: int,
    store: torch.distributed.Store | None,
) -> argparse.Namespace:
    """Megatron's global state for a stage that does not train: arguments, process groups, seeds."""
    args = parse_megatron_arguments(hf_folder, layout, untrained_flags(run_flags), pass_through, max_length)
    configure_head(layout)
    from megatron.training.initialize import initialize_megatron

    initialize_megatron(allow_no_cuda=platform.is_cpu(), store=store)
    return args


PRECOMPUTE_FLAGS: dict[str, object] = {"no_load_optim": True, "train_iters": 0}
"""What scoring tells Megatron."""


def untrained_flags(run_flags: Mapping[str, object]) -> dict[str, object]:
    """Megatron flags of a stage that does not train."""
    return {**common_flags(), "eval_interval": 1, "eval_iters": 0, "save_interval": 1, "lr": 1.0, **run_flags}


def configure_head(layout: Layout) -> None:
    """Chooses the kernels and the chunks of the output layer for this process, and says so."""
    set_kernels(layout.kernels)
    set_chunk_bytes(layout.head_chunk_mib * 2**20)
    if rank() == 0:
        kernels = kernels_for(torch.device(platform.device()))
        print(f"output layer: {kernels} kernels, logits in chunks of {layout.head_chunk_mib} MiB", flush=True)


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


_FORMER_NAMES = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
"""What PyTorch 2.14 says in every process of names that Megatron calls, and we, as older versions have no others."""


@contextmanager
def stage_process() -> Iterator[torch.distributed.Store | None]:
    """A stage's use of this process: gives the store to meet in, and clears Megatron's global state afterwards.

    A process group that the caller made before the stage is used and stays, and so do Megatron's groups in it: further
    stages of the same layout take them over (gloo keeps the threads of a group that is dropped). Otherwise all groups
    are left. After an error no group is: the process is about to end, and leaving could wait for ranks that are gone.
    Threads are ended however the stage ends, and PyTorch's deterministic mode, which `--deterministic-mode` begins.
    """
    warnings.filterwarnings("ignore", _FORMER_NAMES, FutureWarning)
    inherited = torch.distributed.is_initialized()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        store = process_store()
        with meeting.meeting(store):
            yield store
    finally:
        torch.use_deterministic_algorithms(deterministic)
        close_all()
        _close_tensorboard()
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


def _close_tensorboard() -> None:
    """Ends the thread that writes for TensorBoard, which Megatron leaves to itself."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    writer = global_vars and global_vars.get_tensorboard_writer()
    if writer:
        with suppress(OSError):  # a full disk, which has ended the thread; whoever writes what counts says so
            writer.close()
