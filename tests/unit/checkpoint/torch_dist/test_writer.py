"""Tensors that are saved without being in memory."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from megatron_erpd.checkpoint.mapping.param_map import Segment, Split, Unit
from megatron_erpd.checkpoint.torch_dist.writer import Block, CheckpointFile, CheckpointFileWriter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(7, None), (3, 5), (300, 4096)])
def test_a_block_is_stored_as_torch_saves_its_tensor(
    tmp_path: Path, dtype: torch.dtype, rows: int, columns: int | None
) -> None:
    """... bit for bit, though its rows are made some at a time."""
    unit = Unit("key", (1,), (2,), ("name",), (Segment(0, 0, rows),), columns, False, Split.REPLICATED)
    block = Block(unit, 0, rows)
    tensor = torch.randn(1, *block.size).to(dtype)
    planned = CheckpointFile("file", (block, block))

    def fill(target: torch.Tensor, start: int) -> None:
        target.copy_(tensor[0, start : start + len(target)])

    with CheckpointFileWriter(tmp_path, planned) as writer:
        for each in planned.blocks:
            writer.add(each, dtype, fill)
    saved = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, saved)
    finally:
        torch.serialization.set_crc32_options(True)
    assert (tmp_path / "file").read_bytes() == 2 * saved.getvalue()
