"""What every test runs under: one thread per process, no network, no display, no GPU test without a GPU."""

from __future__ import annotations

import os

# Before torch, transformers and matplotlib are imported: they read these at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_erpd import launcher
from tests.disk import Disk

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Before Triton is imported, which torch leaves to those who need it: without a GPU its kernels can only be interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


TIERS = ("slurm", "integration", "distributed", "gpu", "unit")
"""Folders of tests, those first whose files take longest: `make test` deals files to its workers in this order."""
LONG_UNITS = (
    *("report/test_render.py", "launch/test_preflight.py", "vocab_parallel/test_triton_passes.py"),
    *("sampling/test_verifiers.py", "sampling/test_parts.py", "launch/test_local.py", "teacher_cache/test_faults.py"),
)
"""Of the unit tests, the files of ten seconds and more, which come first, so that no worker ends with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/gpu is a GPU test; without a CUDA device the GPU tests are skipped."""
    tests = Path(__file__).parent
    early = {item.path for item in items if item.get_closest_marker("slow")} | {tests / "unit" / f for f in LONG_UNITS}
    items.sort(key=lambda item: (TIERS.index(item.path.relative_to(tests).parts[0]), item.path not in early))
    has_gpu = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.path.parent.parts:
            item.add_marker(pytest.mark.gpu)
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """No test inherits what another has left in the environment: a stage that works alone says so to all libraries."""
    launcher.forget_launcher(os.environ)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()
