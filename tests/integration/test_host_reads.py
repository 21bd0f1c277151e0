"""What a training step reads back from the device, for which the host waits: what docs/architecture.md lists, no more.

There is no device here. Recorded is what would be such a copy on a GPU: a value or a list of a tensor, and operations
whose result has as many elements as the values say. Looks that only a CPU takes (`cpu_sees`) are left out of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, make_round, run_stages

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/architecture.md").read_text().split("## What the host waits for")[1].split("\n## ")[0]
LISTED = set(re.findall(r"^\| `([\w/.]+): ([\w.]+)` \|", SECTION, re.MULTILINE))
"""File (of Megatron: module) and function of each read that the page gives a reason for."""

METHODS = {"tolist", "numpy", "cpu"}
"""Functions of PyTorch's that move values to the host, and aren't seen as operations."""
OPERATIONS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "repeat_interleave", "_linalg_eigh", "linalg_eig"),
}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""With a bool index they look for its true entries."""


class _Functions(TorchFunctionMode):
    def __init__(self, sites: set[tuple[str, str]]) -> None:
        super().__init__()
        self.sites = sites

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Values of the host's go to a device from pageable memory, which waits for it as well.
        if name in METHODS or (name in ("tensor", "as_tensor") and "device" in (kwargs or {})):
            _add_site(self.sites)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, sites: set[tuple[str, str]]) -> None:
        super().__init__()
        self.sites = sites

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        masks = name in MASKED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if masks or name in OPERATIONS:
            _add_site(self.sites)
        return func(*args, **(kwargs or {}))


def _add_site(sites: set[tuple[str, str]]) -> None:
    """Adds file and function of the package, or of Megatron, that runs; nothing of what stands in for CUDA."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        found = re.search(r"/(megatron_erpd|site-packages/megatron)/(.*\.py)$", frame.f_code.co_filename)
        name = frame.f_code.co_qualname.partition(".<locals>")[0]
        if found and found[2] != "platform.py":
            inside = found[1] == "megatron_erpd"
            sites.add((found[2] if inside else f"megatron.{found[2].removesuffix('.py').replace('/', '.')}", name))
            return
        if found and name != "_CpuInsteadOfCuda.__torch_function__":
            return
        frame = frame.f_back


@contextmanager
def recorded(sites: set[tuple[str, str]]) -> Iterator[None]:
    with _Functions(sites), _Operations(sites):
        yield


def reads_of_steps(rank: int, world_size: int, stages: Stages) -> set[tuple[str, str]]:
    """Where the steps of these trainings read from the device; on a GPU's branches."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron.training import training

    from megatron_erpd.objectives import signals
    from megatron_erpd.vocab_parallel import passes

    sites: set[tuple[str, str]] = set()
    train_step, steps = training.train_step, []
    signals.cpu_sees = passes.cpu_sees = lambda values, condition: False  # type: ignore[attr-defined]

    def watched(*args: Any, **kwargs: Any) -> Any:
        steps.append(rank)
        with recorded(sites):
            return train_step(*args, **kwargs)

    training.train_step = watched
    run_stages(rank, world_size, stages)
    assert len(steps) >= 2 * len([name for name, _ in stages if name in ("train", "distill")])
    return sites


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    make_round(folder, num_prompts=4)
    return folder


def test_steps_read_what_is_listed(made: Path) -> None:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    train = [*data, "--base-log-probs", f"{made}/base-log-probs", "--global-batch-size", "8", "--micro-batch-size", "4"]
    train += ["--epochs", "1"]
    packed = [*train[:-4], "--micro-batch-tokens", "60", "--epochs", "1"]
    stopping = ["--max-kl", "100", "--min-entropy", "1e-9"]
    teacher = ["--policy", f"teacher={made}/teacher"]
    budget = ["--form", "policy_gradient", "--signal-weight", "0", "--advantage-weight", "1", "--kl-budget", "0.1"]
    stages: Stages = [
        ("train", [*train, "--loss", "ce", "--kl-coefficient", "0.1", *stopping, "--output", f"{made}/teacher"]),
        ("precompute", [*data, *teacher, "--k", "4", "--delta", "0.05", "--output", f"{made}/cache"]),
        ("distill", [*packed, "--cache", f"{made}/cache", "--output", f"{made}/student"]),
        ("distill", [*train, *budget, "--output", f"{made}/surrogate"]),
        ("distill", [*train, "--teacher", "live", *teacher, "--delta", "0.05", "--output", f"{made}/live"]),
    ]
    (found,) = run_ranks(reads_of_steps, 1, stages, timeout=300)
    assert found == LISTED
