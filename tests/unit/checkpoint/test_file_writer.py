"""Files that are written past the system's memory, with what they hold and what they refuse."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_erpd.checkpoint import file_writer
from megatron_erpd.checkpoint.file_writer import FileWriter
from megatron_erpd.errors import CheckpointError

STAGE = file_writer._STAGE_BYTES


@pytest.mark.parametrize("size", [0, 1, 4096, STAGE - 1, STAGE, STAGE + 4096, 6 * STAGE + 17])
def test_bytes_and_checksum(tmp_path: Path, size: int) -> None:
    """... in parts of any size, which may change once they were given."""
    data = np.random.default_rng(0).integers(0, 255, size=size, dtype=np.uint8)
    with FileWriter(tmp_path / "file") as file:
        at = 0
        for step in [1, 100, 5000, 3 * STAGE, size]:
            part = data[at : at + step].copy()
            file.write(part)
            part[:] = 0
            at += len(part)
    assert file.size == size and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert file.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2**12, 2**9 + 1), (2, 2**21)])
def test_a_tensor_is_asked_for_by_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(torch.bfloat16)
    asked = []

    def fill(rows: torch.Tensor, start: int) -> None:
        asked.append((start, len(rows)))
        assert rows.nbytes <= file_writer.PIECE_BYTES or len(rows) == 1
        rows.copy_(tensor[start : start + len(rows)])

    with FileWriter(tmp_path / "file") as file:
        file.write(b"odd")
        file.append_tensor(shape, torch.bfloat16, fill)
    assert (tmp_path / "file").read_bytes() == b"odd" + tensor.view(torch.uint8).numpy().tobytes()
    assert [start for start, _ in asked] == [0, *np.cumsum([count for _, count in asked])[:-1]]
    assert sum(count for _, count in asked) == shape[0]


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_without_direct_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """Some refuse the flag, and some refuse what is written with it."""
    real: dict[str, Any] = {"open": os.open, "write": os.write}

    def open_without(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return int(real["open"](path, flags, *mode))

    def write_without(descriptor: int, data: memoryview) -> int:
        if file_writer.fcntl.fcntl(descriptor, file_writer.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return int(real["write"](descriptor, data))

    monkeypatch.setattr(file_writer.os, refused, {"open": open_without, "write": write_without}[refused])
    data = os.urandom(2 * STAGE + 5)
    with FileWriter(tmp_path / "file") as file:
        file.write(data)
    assert (tmp_path / "file").read_bytes() == data and file.sha256 == hashlib.sha256(data).hexdigest()


def test_an_error_of_the_disk_is_told_though_a_thread_meets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(file_writer.os, "write", broken)
    with (
        pytest.raises(CheckpointError, match=r"file: can't be written \(Input/output error\)"),
        FileWriter(tmp_path / "file") as file,
    ):
        for _ in range(9):
            file.write(bytes(STAGE))
    assert not list(tmp_path.iterdir())
