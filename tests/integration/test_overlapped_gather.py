"""With `--overlap-param-gather`, weights that arrive late from the other data-parallel ranks are waited for.

Megatron's distributed optimizer updates a share of the weights on each rank. The gather of the rest goes on beside the
next forward pass, bucket by bucket, and each layer's hook waits for its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.tiny import write_model, write_random_rollouts
from tests.tolerances import LAYOUT

OPTIMIZER = ["--use-distributed-optimizer"]
# The whole model is in one bucket otherwise, for which the embedding waits.
OVERLAPPED = [*OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1000"]


class Late:
    """The handle of a gather whose results arrive when they are waited for."""

    def __init__(self, buckets: list[Any], gathered: list[torch.Tensor]) -> None:
        self.buckets, self.gathered = buckets, gathered

    def wait(self) -> None:
        for bucket, values in zip(self.buckets, self.gathered, strict=True):
            bucket.param_data.copy_(values)


def run_with_late_gathers(rank: int, world_size: int, stages: Stages) -> int:
    """Runs stages; returns how many gathers were late."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    start, late = _ParamAndGradBucketGroup.start_param_sync, []

    def start_late(self: Any, force_sync: bool = False) -> None:
        before = [bucket.param_data.clone() for bucket in self.buckets]  # this rank's share is new, the others' are old
        start(self, force_sync)
        if self.param_gather_handle is not None:
            self.param_gather_handle.wait()
            self.param_gather_handle = Late(self.buckets, [bucket.param_data.clone() for bucket in self.buckets])
            for bucket, values in zip(self.buckets, before, strict=True):
                bucket.param_data.copy_(values)
            late.append(self)

    _ParamAndGradBucketGroup.start_param_sync = start_late
    run_stages(rank, world_size, stages)
    return len(late)


def trained(folder: Path, name: str, layout: list[str], megatron: list[str]) -> tuple[str, list[str]]:
    """A stage 1 of five steps."""
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet", "--output", f"{folder}/{name}"]
    settings = ["--loss", "sft", "--learning-rate", "1e-2", "--epochs", "1", "--global-batch-size", "8"]
    return ("train", [*data, *settings, "--micro-batch-size", "2", *layout, "--", *megatron])


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("world_size", "layout", "model", "schedule"),
    [
        pytest.param(2, ["--data-parallel", "2"], {"tied": False}, [], id="dp2", marks=pytest.mark.long),
        # The last stage has a copy of the embedding's weight, and no embedding that waits for it.
        pytest.param(4, ["--data-parallel", "2", "--pipeline-parallel", "2"], {}, [], id="dp2-pp2-tied"),
        # The schedule starts the gathers of all chunks but the first two ahead of them.
        pytest.param(
            *(4, ["--data-parallel", "2", "--pipeline-parallel", "2"], {"num_layers": 6}),
            ["--num-virtual-stages-per-pipeline-rank", "3"],
            id="dp2-pp2-virtual",
            marks=pytest.mark.long,
        ),
    ],
)
def test_late_weights_are_waited_for(
    world_size: int, layout: list[str], model: dict[str, Any], schedule: list[str], tmp_path: Path
) -> None:
    write_model(tmp_path / "hf", **model)
    write_random_rollouts(tmp_path / "rollouts.parquet")
    stages = [
        ("import", ["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/base"]),
        trained(tmp_path, "expected", layout, [*OPTIMIZER, *schedule]),
        trained(tmp_path, "overlapped", layout, [*OVERLAPPED, *schedule]),
    ]
    late = run_ranks(run_with_late_gathers, world_size, stages, timeout=240)
    assert min(late) > 4  # several buckets in each step
    expected, found = metrics(tmp_path / "expected"), metrics(tmp_path / "overlapped")
    assert len(expected) >= 4
    for row, other in zip(found, expected, strict=True):
        for name in ("stage1/loss", "grad-norm"):
            LAYOUT.assert_close(row[name], other[name], f"{name} of step {row['iteration']}")
