"""From a Hugging Face folder, a layout and a stage's own flags to Megatron's parsed and validated arguments."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_erpd import platform
from megatron_erpd.checkpoint.mapping.config import flags_to_argv, model_flags, read_model_shape
from megatron_erpd.checkpoint.mapping.parallel_layout import check_expert_groups, check_schedule, read_schedule
from megatron_erpd.errors import LayoutError, RecipeError
from megatron_erpd.launcher import check_meeting, launch, work_alone
from megatron_erpd.meeting import meeting_store
from megatron_erpd.settings import Layout
from megatron_erpd.settings.megatron_flags import refused_values

MEGATRON_DEFAULTS = {"tokenizer_type": "NullTokenizer"}


def launched_layout(layout: Layout) -> Layout:
    """The layout as it was launched: data parallelism that is not given is what the processes leave over.

    Raises:
        LayoutError: the number of processes is not the product of the layout's sizes, or the launcher's variables are
            wrong.
    """
    launched = launch()
    world_size = launched.world_size
    if "data_parallel" not in layout.model_fields_set:
        model_size = layout.num_processes
        layout = layout.model_copy(update={"data_parallel": max(1, world_size // model_size)})
    if layout.num_processes != world_size:
        raise LayoutError(
            f"TP {layout.tensor_parallel} x PP {layout.pipeline_parallel} x CP {layout.context_parallel} x DP "
            f"{layout.data_parallel} needs {layout.num_processes} processes, {world_size} were started; start with "
            f"`torchrun --nproc-per-node {layout.num_processes}` or change the layout's flags"
        )
    if not torch.distributed.is_initialized():
        check_meeting(launched, needs_device=not platform.is_cpu())
    return layout


def rank() -> int:
    return launch().rank


def process_store() -> torch.distributed.Store | None:
    """Where the processes of a stage meet; that of a process alone is in memory, so that no port is needed. None where
    they have met."""
    if torch.distributed.is_initialized():
        return None
    launched = launch()
    if launched.world_size > 1:
        return meeting_store(launched)
    work_alone()
    return torch.distributed.HashStore()


def parse_megatron_arguments(
    hf_folder: Path, layout: Layout, run_flags: Mapping[str, object], pass_through: list[str], max_length: int
) -> argparse.Namespace:
    """Megatron's arguments, validated and set globally.

    Args:
        hf_folder: folder with the model's `config.json`; all architecture flags are derived from it.
        layout: parallel sizes, micro-batch size and precision.
        run_flags: what the stage itself decides, as Megatron's argument names.
        pass_through: the user's own Megatron flags; they win over the platform's defaults.
        max_length: longest sequence in the data, in tokens.

    Raises:
        RecipeError: a flag of the user's is unknown, or contradicts the checkpoint or the stage's settings.
        CheckpointError, LayoutError: from `own_flags`.
    """
    fixed = own_flags(hf_folder, layout, run_flags, pass_through, max_length)
    platform.enable_cpu()
    # Megatron asks for it with TP or CP, so that communication kernels start in program order; harmless without.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron.training.arguments import parse_and_validate_args

    platform.skip_compiling_helpers()
    platform.fuse_gradient_accumulation_without_apex()
    saved, sys.argv = sys.argv, [sys.argv[0], *megatron_argv(fixed, pass_through, layout)]
    try:
        args = parse_and_validate_args(args_defaults=MEGATRON_DEFAULTS)
    except AssertionError as error:  # how Megatron says that settings don't go together
        raise RecipeError(f"Megatron refuses these settings: {error}") from error
    finally:
        sys.argv = saved
    # Micro-batches are padded to their own longest rollout; pipeline stages tell each other the shape.
    args.variable_seq_lengths = True
    return args


def own_flags(
    hf_folder: Path, layout: Layout, run_flags: Mapping[str, object], pass_through: list[str], max_length: int
) -> dict[str, object]:
    """The flags that follow from a checkpoint, a layout and a stage; arguments as in `parse_megatron_arguments`.

    Raises:
        RecipeError: a flag of the user's contradicts the checkpoint or the stage's settings, or doesn't go with the
            layout.
        CheckpointError: from `model_flags`.
        LayoutError: from `model_flags`, or the layout doesn't fit the model or the batch.
    """
    shape, batch = read_model_shape(hf_folder), run_flags.get("global_batch_size")
    check_expert_groups(shape, layout, trains=bool(run_flags.get("train_iters")))
    schedule = read_schedule(pass_through, shape.num_layers, layout.pipeline_parallel)
    if isinstance(batch, int):
        if batch % layout.batch_unit:
            raise LayoutError(
                f"global batch size {batch} isn't a multiple of {layout.batch_unit_words}; change one of them"
            )
        # Packs are made as many as a schedule wants.
        count = batch // layout.batch_unit if layout.pack_tokens is None else schedule.group
        check_schedule(schedule, layout.pipeline_parallel, count)
    fixed = {
        **model_flags(
            hf_folder,
            layout.tensor_parallel,
            layout.pipeline_parallel,
            layout.expert_parallel,
            virtual_stages=schedule.virtual_stages,
            max_length=max_length,
            # Matrix units want a multiple of 128 columns; on a CPU padding only costs time.
            make_vocab_size_divisible_by=1 if platform.is_cpu() else 128,
        ),
        **_layout_flags(layout, max_length),
        **run_flags,
    }
    # Megatron wants the padded length within them. They size nothing: positions are rotary.
    names = ("max_position_embeddings", "seq_length")
    fixed[names[0]] = max(int(fixed[name]) for name in names)  # type: ignore[call-overload]
    _refuse_contradictions(fixed, pass_through)
    if problems := refused_values(pass_through, layout, shape.num_heads, shape.num_query_groups):
        raise RecipeError("\n  ".join(problems))
    return fixed


def check_arguments(
    hf_folder: Path, layout: Layout, run_flags: Mapping[str, object], pass_through: list[str], max_length: int
) -> None:
    """Raises what `parse_megatron_arguments` would, as far as it can be told before a stage has written anything or
    waited for other ranks."""
    megatron_argv(own_flags(hf_folder, layout, run_flags, pass_through, max_length), pass_through, layout)


def megatron_argv(fixed: Mapping[str, object], pass_through: list[str], layout: Layout) -> list[str]:
    """Megatron's command line: what this machine can run, what follows from the stage, and the user's own flags.

    Raises:
        RecipeError: Megatron has no such flag, or the flag takes no such value.
    """
    from megatron_erpd.model.megatron_flags import flag_problems

    if problems := flag_problems(pass_through):
        raise RecipeError("\n  ".join(problems))
    here = _platform_flags(layout)
    if "num_experts" in fixed and here["transformer_impl"] == "transformer_engine":
        # All experts of a rank in one kernel; elsewhere one after another.
        here["moe_grouped_gemm"] = True
    return [*flags_to_argv(here), *flags_to_argv(fixed), *pass_through]


def _platform_flags(layout: Layout) -> dict[str, object]:
    """What this machine can run: Transformer Engine's layers and fused kernels where they are installed, but for fp32
    with packs or context parallelism, for which it has no attention."""
    if platform.is_cpu():
        return dict(platform.CPU_MEGATRON_FLAGS)
    flags: dict[str, object] = {"distributed_backend": "nccl"}
    has_attention = layout.precision == "bf16" or (layout.pack_tokens is None and layout.context_parallel == 1)
    if _installed("transformer_engine") and has_attention:
        # Its layers add their weights' gradients to the buffer themselves.
        return {**flags, "transformer_impl": "transformer_engine"}
    needless = {"use_cpu_initialization"}
    if _installed("fused_weight_gradient_mlp_cuda"):  # built with Apex; the local layers' own way to the same
        needless.add("no_gradient_accumulation_fusion")
    local = {name: value for name, value in platform.CPU_MEGATRON_FLAGS.items() if name not in needless}
    return {**local, **flags}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _layout_flags(layout: Layout, max_length: int) -> dict[str, object]:
    unit = layout.tensor_parallel * layout.context_parallel * 2
    length = -(-max_length // unit) * unit
    return {
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "context_parallel_size": layout.context_parallel,
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": layout.sequence_parallel and layout.tensor_parallel > 1,
        "micro_batch_size": layout.rows,
        "bf16": layout.precision == "bf16",
        "seq_length": length,
    }


def _refuse_contradictions(fixed: Mapping[str, object], pass_through: list[str]) -> None:
    ours = {"--" + name.replace("_", "-"): value for name, value in fixed.items()}
    for item in pass_through:
        flag = item.split("=", 1)[0]
        if flag.startswith("--wandb-"):
            raise RecipeError(
                f"{flag}: Megatron's flags count as settings of the result, which monitoring is not; give "
                "monitoring.wandb_project in the recipe, or --wandb-project before the `--` of a training"
            )
        if flag in ours:
            raise RecipeError(
                f"{flag}: follows from the checkpoint, the layout or the stage's settings (it is {ours[flag]}) and "
                "can't be given again; change it there"
            )
