"""Processes that wait for one another outside of collectives, and share the reading of files."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_erpd import meeting
from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST, begin_artifact, read_manifest, verify_manifest
from tests.distributed.harness import run_ranks

SIZES = [50_000, 40_000, 30_000, 20_000, 10_000, 10, 0]


def write_artifact(folder: Path) -> None:
    begin_artifact(folder, "sample", {"seed": 1}, {})
    for number, size in enumerate(SIZES):
        (folder / f"part-{number}").write_bytes(bytes([number]) * size)


def share_work(rank: int, world_size: int, root: str, by_store: bool) -> dict[str, object]:
    """Everything that processes do together; what this one saw of it."""
    store = dist.FileStore(f"{root}/meeting", world_size) if by_store else None
    read: list[str] = []
    hash_one = meeting.file_digest

    def counting(path: Path) -> str:
        read.append(path.name)
        return hash_one(path)

    meeting.file_digest = counting
    found: dict[str, object] = {}
    with meeting.meeting(store):
        assert (meeting.rank(), meeting.num_processes()) == (rank, world_size)
        own = meeting.scatter([{"for": other} for other in range(world_size)] if rank == 0 else None)
        found["scattered"] = own["for"]
        found["gathered"] = meeting.gather(rank * 10)
        began = time.monotonic()
        meeting.first(lambda: time.sleep(0.5))
        found["waited"] = time.monotonic() - began > 0.4
        meeting.finish_together(Path(root) / "artifact", {"rows": 3}, {"part-0": "0" * 64})
        found["read"], found["finished"] = list(read), (Path(root) / "artifact" / MANIFEST).is_file()
        for what, work in {
            "first": lambda: meeting.first(lambda: _refuse("no such thing")),
            "finish": lambda: meeting.finish_together(Path(root) / "artifact"),
            "verify": lambda: meeting.verify_inputs_together([Path(root) / "artifact"]),
        }.items():
            try:
                work()
            except StageError as error:
                found[what] = str(error)
    return found


def _refuse(text: str) -> None:
    raise StageError(text)


@pytest.mark.parametrize("by_store", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_what_processes_do_together(world_size: int, by_store: bool, tmp_path: Path) -> None:
    write_artifact(tmp_path / "artifact")
    seen = run_ranks(share_work, world_size, str(tmp_path), by_store)
    assert [found["scattered"] for found in seen] == list(range(world_size))
    assert [found["gathered"] for found in seen] == [[10 * r for r in range(world_size)], *[[]] * (world_size - 1)]
    assert all(found["waited"] and found["finished"] for found in seen)
    # Each file is read once, and the largest share is no more than a half above the mean.
    assert sorted(name for found in seen for name in found["read"]) == [f"part-{i}" for i in range(1, len(SIZES))]
    largest = max(sum(SIZES[int(name[5:])] for name in found["read"]) for found in seen)
    assert largest <= 1.5 * sum(SIZES[1:]) / world_size
    files = read_manifest(tmp_path / "artifact").files
    for number, size in enumerate(SIZES[1:], start=1):
        assert files[f"part-{number}"] == {"size": size, "sha256": hashlib.sha256(bytes([number]) * size).hexdigest()}
    assert files["part-0"]["sha256"] == "0" * 64  # as it was known
    for found in seen:
        assert found["first"] == "no such thing"
        assert found["finish"].endswith("so no stage has begun it")
        assert (
            found["verify"] == f"{tmp_path}/artifact/part-0: differs from what {MANIFEST} recorded; run the stage again"
        )


def unreadable(rank: int, world_size: int, root: str) -> str:
    def gone(path: Path) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    if rank == 1:
        meeting.file_digest = gone
    with meeting.meeting(dist.FileStore(f"{root}/meeting", world_size)), pytest.raises(StageError) as caught:
        meeting.finish_together(Path(root) / "artifact")
    return str(caught.value)


def test_a_share_that_can_not_be_read_ends_all(tmp_path: Path) -> None:
    write_artifact(tmp_path / "artifact")
    for said in run_ranks(unreadable, 2, str(tmp_path)):
        assert "part-1: can't be read (No such file or directory)" in said
    with pytest.raises(StageError, match="has not finished"):
        verify_manifest(tmp_path / "artifact")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_of_about_equal_size(count):
    sizes = {f"file-{i}": size for i, size in enumerate([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0])}
    dealt = meeting.shares_by_size(sizes, count)
    assert sorted(name for share in dealt for name in share) == sorted(sizes) and len(dealt) == count
    totals = [sum(sizes[name] for name in share) for share in dealt]
    assert max(totals) <= sum(sizes.values()) / count + max(sizes.values()) / 2
