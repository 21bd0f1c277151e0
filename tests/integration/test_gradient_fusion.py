"""With gradient accumulation fusion the head adds the output weight's gradient to `main_grad`: it is the unfused one.

With Transformer Engine, or Apex, all layers do so. Here is neither, and of the model the output layer alone does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_erpd import platform
from megatron_erpd.model import arguments
from megatron_erpd.settings import Layout
from tests.distributed.harness import run_ranks
from tests.integration.stages import run_stages
from tests.integration.tiny import write_model, write_random_rollouts
from tests.tolerances import BF16_GRADIENT, FP32

CASES = {
    "fp32": (False, [], []),
    "fp32-tied": (True, [], []),
    "bf16-tied": (True, ["--precision", "bf16"], ["--use-distributed-optimizer", "--overlap-grad-reduce"]),
}


def first_gradient(rank: int, world_size: int, folder: str, case: str, fused: bool) -> tuple[torch.Tensor, bool]:
    """The output weight's `main_grad` after the two micro-batches of a first step, and whether the head added to it."""
    platform.enable_cpu()
    from megatron_erpd.model.forward import unwrap
    from megatron_erpd.training.step import StepHooks

    forward, finalize, found = StepHooks.forward, StepHooks.finalize, []

    def weight_of(model: Any) -> Any:
        core = unwrap(model)
        return core.embedding.word_embeddings.weight if CASES[case][0] else core.output_layer.weight

    def forward_fused(self: Any, data: Any, model: Any) -> Any:
        unwrap(model).output_layer.gradient_accumulation_fusion = fused
        return forward(self, data, model)

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        (model,) = self.models.values()
        weight = weight_of(model)
        found.append((weight.main_grad.clone(), weight.grad_added_to_main_grad))
        finalize(self, *args, **kwargs)

    StepHooks.forward, StepHooks.finalize = forward_fused, keep  # type: ignore[method-assign]
    _, layout, megatron = CASES[case]
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet", "--loss", "sft", *layout]
    sizes = ["--global-batch-size", "16", "--micro-batch-size", "8", "--epochs", "1"]
    run_stages(rank, world_size, [("train", [*data, *sizes, "--output", f"{folder}/{fused}", "--", *megatron])])
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_the_head_adds_to_main_grad(case: str, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", tied=CASES[case][0])
    write_random_rollouts(tmp_path / "rollouts.parquet", 4)
    run_ranks(run_stages, 1, [("import", ["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"])])
    gradients = {}
    for fused in (False, True):
        ((gradients[fused], added),) = run_ranks(first_gradient, 1, str(tmp_path), case, fused)
        assert added == fused and gradients[fused].dtype == torch.float32 and gradients[fused].any()
    tolerance = BF16_GRADIENT if "bf16" in case else FP32
    tolerance.assert_close(gradients[True], gradients[False])


@pytest.mark.parametrize(
    ("installed", "fuses"),
    [((), False), (("transformer_engine",), True), (("fused_weight_gradient_mlp_cuda",), True)],
)
def test_it_is_on_where_the_layers_can(
    installed: tuple[str, ...], fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    flags = arguments._platform_flags(Layout())
    assert ("no_gradient_accumulation_fusion" not in flags) == fuses
    assert flags["distributed_backend"] == "nccl"
    assert flags["transformer_impl"] == ("transformer_engine" if "transformer_engine" in installed else "local")
