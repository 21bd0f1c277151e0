"""What does it save to hash an artifact's files with several processes?

    .venv/bin/python benchmarks/hashing.py                 2 GiB, one process and two
    .venv/bin/python benchmarks/hashing.py --gib 16 --processes 1 2 4 8

Writes files as large as a rank of a checkpoint does, reads them once so that they are in memory, and has the processes
of a launcher finish the artifact (`meeting.finish_together`), which a training does at its end: deal the
files, hash shares, gather, publish the manifest. Times are of the slowest process, without its start; the best of some
rounds in turns. SHA-256 takes a processor, not the disk, so there is nothing to gain beyond the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_erpd.manifest import MANIFEST, begin_artifact, file_digest  # noqa: E402

_FILE_BYTES = 128 * 2**20
GIB = 2**30


def main() -> None:
    """Measures, and prints a table; or, started by itself, is one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the artifact (default: 2)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many, in turns (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured (default: 3)")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of is not None:
        _finish(given.rank_of)
        return
    with tempfile.TemporaryDirectory(prefix="hashing-", dir=given.folder) as name:
        folder = Path(name) / "artifact"
        size = _write(folder, int(given.gib * GIB))
        best: dict[int, float] = {}
        for _ in range(given.rounds):
            for count in given.processes:
                best[count] = min(best.get(count, float("inf")), _measure(folder, count))
    print("| processes | seconds | GB/s | times as fast |")
    print("|---|---|---|---|")
    slowest = best[given.processes[0]]
    for count, seconds in best.items():
        print(f"| {count} | {seconds:.2f} | {size / 1e9 / seconds:.2f} | {slowest / seconds:.2f} |")


def _write(folder: Path, size: int) -> int:
    begin_artifact(folder, "train-teacher", {}, {})
    (folder / "megatron").mkdir()
    for number in range(max(1, size // _FILE_BYTES)):
        path = folder / "megatron" / f"__{number}_0.distcp"
        path.write_bytes(os.urandom(_FILE_BYTES))
        file_digest(path)
    shutil.copy(folder / "request.json", folder.parent)
    return sum(path.stat().st_size for path in (folder / "megatron").iterdir())


def _measure(folder: Path, count: int) -> float:
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.copy(folder.parent / "request.json", folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, __file__, "--rank-of", str(folder)], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    assert len(json.loads((folder / MANIFEST).read_text())["files"]) > 0
    return max(float(line) for line in done.stdout.split())


def _finish(folder: Path) -> None:
    from megatron_erpd import meeting
    from megatron_erpd.model.arguments import process_store

    with meeting.meeting(process_store()):
        meeting.first(lambda: None)  # all are here
        began = time.perf_counter()
        meeting.finish_together(folder)
        print(f"{time.perf_counter() - began}\n", end="", flush=True)


if __name__ == "__main__":
    main()
