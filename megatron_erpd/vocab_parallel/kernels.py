"""Which implementation of the passes over the logits is used: plain PyTorch, or Triton's kernels.

By default the device decides: Triton on CUDA devices, PyTorch on CPUs. `ERPD_KERNELS=torch` or `triton` in the
environment, or `set_kernels`, decides otherwise; under Triton's interpreter (`TRITON_INTERPRET=1`) its kernels run on a
CPU too.
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
_chosen: Kernels | None = None


def set_kernels(kernels: Kernels | None) -> None:
    """Chooses for this process; None leaves it to the environment, and without that to the device.

    Raises:
        RecipeError: no such kernels.
    """
    global _chosen
    _chosen = None if kernels is None else _known(kernels, "kernels")


def kernels_for(device: torch.device) -> Literal["torch", "triton"]:
    """What tensors on `device` are computed with."""
    choice = _chosen or _known(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
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
