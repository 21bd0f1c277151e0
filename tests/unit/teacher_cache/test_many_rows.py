"""Ten million rollouts: opened in a moment, and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_erpd.teacher_cache import CacheMeta, CacheWriter
from megatron_erpd.teacher_cache.finalize import write_cache_file
from megatron_erpd.teacher_cache.format import INDEX_FILE, CacheIndex, TableIndex
from megatron_erpd.teacher_cache.index import hashes

NUM_ROWS, ROWS_OF_A_PART = 10_000_000, 2000
REPOSITORY = Path(__file__).parents[3]
OPEN = """
import json, sys, time
from megatron_erpd.teacher_cache.reader import CacheReader

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith("VmRSS"))

before, start = resident(), time.process_time()
cache = CacheReader(sys.argv[1])
opened = time.process_time()
row = cache.token_row("base", "the one")
found = time.process_time()
print(json.dumps({
    "rows": cache.num_rows, "row": row.tolist(), "opening": opened - start, "finding": found - opened,
    "before": before, "resident": resident(), "torch": "torch" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of its real size, 5,000 parts that are listed, and one that is there."""
    root = tmp_path_factory.mktemp("many")
    meta = CacheMeta("token", ("base",), {"base": "synthetic"}, 151_936)
    with CacheWriter(root, meta) as writer:
        writer.write_log_probs("base", "the one", 0, np.array([-0.5, -0.25]))
    parts = [
        {
            "name": f"log_probs.base/part-00001-{i:05d}.arrow",
            "num_rows": ROWS_OF_A_PART,
            "num_tokens": 1000 * ROWS_OF_A_PART,
            "bytes": 4096 * ROWS_OF_A_PART,
            "sha256": "0" * 64,
        }
        for i in range(NUM_ROWS // ROWS_OF_A_PART)
    ]
    name, digest = next(iter(writer.checksums.items()))
    parts[2500] |= {"name": name, "num_rows": 1, "bytes": (root / name).stat().st_size, "sha256": digest}

    spread = np.arange(NUM_ROWS, dtype=np.uint64) * np.uint64(2**64 // NUM_ROWS)
    one = hashes(["the one"])[0]
    place = int(np.searchsorted(spread, one))
    spread[place] = one
    number = np.arange(NUM_ROWS, dtype=np.uint32)
    part, row = number // ROWS_OF_A_PART, number % ROWS_OF_A_PART
    part[place], row[place] = 2500, 0
    columns = {"hash": spread, "part": part, "row": row}
    schema = pa.schema(
        [pa.field(n, pa.from_numpy_dtype(v.dtype), nullable=False) for n, v in columns.items()], {b"salt": b"0"}
    )
    with pa.OSFile(str(root / "log_probs.base" / INDEX_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        file.write_batch(pa.RecordBatch.from_arrays([pa.array(v) for v in columns.values()], schema=schema))
    write_cache_file(root, CacheIndex(meta, {"log_probs.base": TableIndex(parts, NUM_ROWS, 1000 * NUM_ROWS)}))
    return root


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_ten_million_rows(folder: Path) -> None:
    command = [sys.executable, "-c", OPEN, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["rows"] == NUM_ROWS and found["row"] == [-0.5, -0.25]
    assert found["opening"] + found["finding"] < 1, "seconds of CPU, which a busy machine does not change"
    assert found["resident"] < 200, "megabytes, of the whole process"
    assert found["resident"] - found["before"] < 100, "a scan of the index would be 160"
    assert not found["torch"], "only targets and hidden states need it"
