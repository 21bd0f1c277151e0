"""Other people's divergences, called as their projects call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs


def why_no_megatron(device: torch.device) -> str | None:
    """Why `topk_kl_div` can't be used, or None. It is plain PyTorch: any device and backend will do."""
    try:
        import benchmarks.quiet_megatron  # noqa: F401
    except ImportError as error:
        return f"megatron.training.distillation can't be imported: {error}"
    return None


def why_no_liger(device: torch.device) -> str | None:
    """Why Liger's kernels can't be used, or None."""
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError:
        return "liger_kernel is not installed"
    return None if device.type == "cuda" else "its Triton kernels need a CUDA device"


def megatron_topk(inputs: Inputs, logits: Tensor) -> Tensor:
    """Megatron-LM's forward KL of logits `[n, 1, v/tp]` against a cached top-k, with the rest as one more outcome, as
    `CachedLogitsKDLoss` calls it; `[n]`. The result is this rank's part."""
    from benchmarks.quiet_megatron import topk_kl_div

    assert inputs.topk is not None
    shard = inputs.shard
    if inputs.logits is not None and logits.dtype == torch.float32:
        logits = _SameMemory.apply(logits)
    result = topk_kl_div(
        logits,
        inputs.topk.log_probs.unsqueeze(1),
        inputs.topk.indices.unsqueeze(1),
        shard.size,
        shard.start // shard.width,
        shard.group,
        add_ghost_token=True,
    )
    return result.reshape(-1)


class _SameMemory(torch.autograd.Function):
    """The logits as a tensor that isn't a leaf, nor a view of one: `topk_kl_div` subtracts the maximum from float32
    logits in place, which autograd allows for what a layer made (as in training). A copy would be charged to it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        same = torch.empty(0, dtype=logits.dtype, device=logits.device)
        return same.set_(logits.untyped_storage(), logits.storage_offset(), logits.shape, logits.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def liger_jsd(inputs: Inputs) -> Tensor:
    """Liger's Jensen-Shannon divergence of log-probs; the mean over the tokens."""
    from liger_kernel.transformers import LigerJSD

    assert inputs.logits is not None and inputs.target is not None
    policy, target = (torch.log_softmax(x.float(), dim=-1) for x in (inputs.logits, inputs.target))
    return LigerJSD(beta=0.5)(policy, target)


def liger_fused_jsd(inputs: Inputs) -> Tensor:
    """Liger's Jensen-Shannon divergence with the output layers of policy and target; the mean over the tokens."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5)(
        inputs.hidden, inputs.weight, inputs.target_hidden, inputs.target_weight, None
    )
