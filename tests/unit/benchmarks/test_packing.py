"""The benchmark of packs: what it counts, by hand, and a tiny run from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing
from benchmarks.page import write_section
from megatron_erpd.data.batch import packer
from megatron_erpd.data.pack_figures import training_packs
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.settings import Layout
from tests.distributed.harness import run_ranks


def test_what_is_read_and_what_ranks_wait_for(tmp_path: Path) -> None:
    # The model reads 8, 4, 2 and 2 tokens, in one step of two ranks.
    rollouts = packing.make_rollouts(tmp_path / "four.parquet", np.array([9, 5, 3, 3]))

    def counted(name: str, **split: int | bool) -> packing.Counted:
        layout = Layout(data_parallel=2, **split)  # type: ignore[arg-type]
        return packing.count(packing.Arrangement(name, rollouts, layout, 16, 4, np.inf))

    packed, padded = counted("packed"), counted("padded")
    layout = Layout(data_parallel=2, micro_batch_tokens=16)
    order = BatchOrder(rollouts.lengths, 4, 0)
    said = training_packs(order, packer(layout, rollouts.lengths, np.inf), layout, 1, 1)  # as a training says it
    assert (packed.micro_batches, packed.padding, packed.spread, packed.worst) == (1, 0, 1, 1)  # 8 and 4 + 2 + 2
    assert packed.fullness == 0.5
    assert (said.filled, said.padding, said.spread) == (packed.fullness, packed.padding, packed.spread)
    # Two rows each: 8 and 4 as 8 + 8, beside 2 + 2.
    assert (padded.micro_batches, padded.padding, padded.spread) == (1, pytest.approx(1 - 16 / 20), 1.6)
    # Each of the twos is read as 4 by the two context-parallel ranks, and packs are multiples of 8.
    split = counted("packed", context_parallel=2, tensor_parallel=2, sequence_parallel=True)
    assert split.padding == pytest.approx(1 - 16 / 24)


def test_a_step_waits_for_its_slowest_rank() -> None:
    two_ranks = [[4.0, 1.0], [2.0, 0.5]]  # of each its micro-batches
    assert packing.slowest(two_ranks, 2) == 5
    assert packing.slowest(two_ranks, 1) == 7.5
    assert packing.slowest(two_ranks, 4) == 4  # 4, 2, 1 and 0.5 at one micro-step


def test_a_section_takes_the_place_of_its_former_one(tmp_path: Path) -> None:
    write_section(tmp_path, "packing", "packs, a CPU", "## Packs\n\nfirst")
    write_section(tmp_path, "cpu", "a CPU", "## Divergences")
    page = write_section(tmp_path, "packing", "packs, a CPU", "## Packs\n\nsecond").read_text()
    assert page == (
        "<!-- begin: packing, packs, a CPU -->\n## Packs\n\nsecond\n<!-- end: packs, a CPU -->\n\n"
        "<!-- begin: cpu, a CPU -->\n## Divergences\n<!-- end: a CPU -->\n"
    )


def tiny_run(rank: int, world_size: int, folder: Path) -> None:
    packing.QUICK = packing.Sizes(hidden=64, layers=1, part=128, global_batch=32)  # type: ignore[misc]
    packing.NUM_ROLLOUTS, packing.GLOBAL_BATCHES, packing.RANKS = 64, (32,), (4,)  # type: ignore[misc]
    packing.dealing_table.__defaults__ = (1000, 1, 128, 8)
    packing.main(["--quick", "--repeats", "1", "--docs", str(folder)])


def test_a_tiny_run_writes_its_section(tmp_path: Path) -> None:
    run_ranks(tiny_run, 1, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    device = packing.cpu_name()
    assert page.startswith(f"<!-- begin: packing, packs, {device} -->\n## Packs of rollouts, {device}\n")
    assert page.count("\n| a step: at most 0.6x the time of ") == 4
    assert page.count("\n| 32 | 4 | ") == 3 and page.count(" MiB | ") >= 6
    assert "| padding in packs: at most 3% of the tokens | **met**" in page
