"""Which implementation of the passes over the logits is used: plain PyTorch, or Triton's kernels.

By default the device decides: Triton on CUDA devices, PyTorch on CPUs. `set_kernels` (a stage's `--kernels`), and
`ERPD_KERNELS=torch` or `triton` in the environment where that says `auto`, decide otherwise. Under Triton's interpreter
(`TRITON_INTERPRET=1`) its kernels run on a CPU too.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal, get_args

import torch

from megatron_erpd.errors import RecipeError
from megatron_erpd.vocab_parallel import passes

Kernels = Literal["auto", "torch", "triton"]

ENVIRONMENT = "ERPD_KERNELS"
_chosen: Kernels = "auto"


def set_kernels(kernels: Kernels) -> None:
    """Chooses for this process; `auto` leaves it to the environment, and without that to the device.

    Raises:
        RecipeError: no such kernels.
    """
    global _chosen
    _chosen = _known(kernels, "kernels")


def kernels_for(device: torch.device) -> Literal["torch", "triton"]:
    """What tensors on `device` are computed with."""
    choice = _known(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT) if _chosen == "auto" else _chosen
    if choice == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return choice


def passes_for(device: torch.device) -> ModuleType:
    """The module whose `statistics`, `js_terms` and `gradient` are used on `device`."""
    if kernels_for(device) == "torch":
        return passes
    from megatron_erpd.vocab_parallel import triton_passes  # importing Triton takes a while

    return triton_passes


def _known(value: str, source: str) -> Kernels:
    if value not in get_args(Kernels):
        raise RecipeError(f"{source} {value!r} is unknown; choose one of {', '.join(get_args(Kernels))}")
    return value  # type: ignore[return-value]
