"""Which checkpoints of a training stay, and one of them as a checkpoint folder of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_erpd.checkpoint.torch_dist.iterations import (
    TRACKER,
    find_iteration,
    latest_iteration,
    prune,
    save_intervals,
    saved_iterations,
    take_iteration,
)
from megatron_erpd.errors import CheckpointError


def checkpoint(folder: Path, latest: int, *others: int) -> Path:
    for iteration in (latest, *others):
        part = folder / f"iter_{iteration:07d}" / "parts" / "__0_0.distcp"
        part.parent.mkdir(parents=True)
        part.write_text(f"weights {iteration}")
    (folder / TRACKER).write_text(str(latest))
    return folder


@pytest.mark.parametrize(
    ("total", "checkpoints", "wanted", "expected"),
    [
        (100, 1, None, (100, 100)),
        (100, 4, None, (25, 25)),
        (10, 4, None, (3, 3)),
        (2, 5, None, (1, 1)),
        (100, 4, 25, (25, 25)),
        (100, 4, 1000, (25, 25)),
        (100, 4, 10, (9, 27)),
        (103, 1, 10, (10, 110)),
        (100, 4, 1, (1, 25)),
    ],
)
def test_save_intervals(total, checkpoints, wanted, expected):
    found = save_intervals(total, checkpoints, wanted)
    assert found == expected
    assert found.retain % found.save == 0, "Megatron's own condition"
    assert wanted is None or found.save <= wanted
    kept = len(range(found.retain, total, found.retain)) + 1  # the last step's besides
    assert kept <= checkpoints


def test_pruning_leaves_the_kept_and_the_last(tmp_path):
    folder = checkpoint(tmp_path, 57, 20, 25, 40, 50, 56, 60, 75)
    prune(folder, retain=20)
    assert saved_iterations(folder) == [20, 40, 57]
    prune(folder, retain=20)
    assert saved_iterations(folder) == [20, 40, 57]


def test_one_iteration_as_a_checkpoint(tmp_path):
    source = checkpoint(tmp_path / "source", 57, 20)
    take_iteration(source, 20, tmp_path / "taken")
    take_iteration(source, 20, tmp_path / "taken")
    assert latest_iteration(tmp_path / "taken") == 20 and saved_iterations(tmp_path / "taken") == [20]
    file = tmp_path / "taken" / "iter_0000020" / "parts" / "__0_0.distcp"
    assert file.read_text() == "weights 20" and file.stat().st_nlink == 2
    with pytest.raises(CheckpointError, match=r"no such iteration.*\[20, 57\]"):
        take_iteration(source, 30, tmp_path / "other")


def test_copies_where_links_fail(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    take_iteration(checkpoint(tmp_path / "source", 5), 5, tmp_path / "taken")
    file = tmp_path / "taken" / "iter_0000005" / "parts" / "__0_0.distcp"
    assert file.read_text() == "weights 5" and os.stat(file).st_nlink == 1


def distributed(folder: Path, backend: str = "torch_dist") -> Path:
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
    return folder


def test_a_checkpoint_of_megatron_bridge(tmp_path):
    """Its folder, with Megatron's tracker or with its own alone, or an iteration in it."""
    for number in (100, 200):
        distributed(tmp_path / f"iter_{number:07d}")
    torch.save({"step": torch.tensor(100), "consumed": torch.tensor(7)}, tmp_path / "latest_train_state.pt")
    assert find_iteration(tmp_path) == (tmp_path, 100)
    assert find_iteration(tmp_path / "iter_0000200") == (tmp_path, 200)
    (tmp_path / TRACKER).write_text("200")
    assert find_iteration(tmp_path) == (tmp_path, 200)


def test_a_state_of_megatron_bridge_is_not_executed(tmp_path):
    distributed(tmp_path / "iter_0000001")
    command = f"touch {tmp_path}/executed".encode()
    (tmp_path / "latest_train_state.pt").write_bytes(b"cos\nsystem\n(S'" + command + b"'\ntR.")
    with pytest.raises(CheckpointError, match=f"latest_train_state.pt: can't be read .* into {TRACKER}"):
        latest_iteration(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_other_formats_are_named(tmp_path):
    distributed(tmp_path / "iter_0000001", "zarr")
    (tmp_path / "iter_0000002" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "iter_0000003" / ".metadata").touch()
    (tmp_path / "iter_0000004").mkdir()
    distributed(tmp_path / "iter_0000005").joinpath("metadata.json").write_text("{")
    messages = ["in zarr", "old format, torch", "in fsdp_dtensor", "no whole checkpoint", "can't be read"]
    for number, message in enumerate(messages, start=1):
        with pytest.raises(CheckpointError, match=message):
            find_iteration(tmp_path / f"iter_000000{number}")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_iteration(tmp_path / "iter_0000099")
