"""What does it cost to convert a checkpoint, in time and memory?

    python benchmarks/conversion.py                 8.5 GB: some minutes on two CPU cores, 35 GB of disk
    python benchmarks/conversion.py --quick         2 GB: about a minute
    python benchmarks/conversion.py --json FILE     every figure, a list of records

A Llama with random bf16 weights is written to disk. Then, in turns: an import and an export, with one process and with
several, each after a `cp -r` of what it reads. An import reads its source from memory, as the command computes its
checksum first; an export reads its checkpoint from the disk, as it was written past the memory. So does the `cp`
before each. All of them end when the bytes are on the disk (`fsync`). Measured are

- throughput: bytes of the model per second of reading and writing, against that `cp`. The whole command is
  shown beside it: the start of Python, the checksum of the source, an export's comparison with its checkpoint;
- memory: the largest resident memory of any process, against twice the largest tensor and 1 GiB.

Only a quiet machine gives figures that can be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_erpd.checkpoint.hugging_face.writer import ShardWriter, plan_files, write_index  # noqa: E402
from megatron_erpd.checkpoint.mapping.config import read_model_shape  # noqa: E402
from megatron_erpd.checkpoint.mapping.param_map import hf_shapes  # noqa: E402

WHOLE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 18, "vocab_size": 32768}
QUICK = {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 17, "vocab_size": 32768}
GIB = 2**30
TIME_TARGET = 0.7
"""Smallest throughput, as a fraction of that of `cp`."""

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/conversion.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure, a list of records")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="turns; the median counts (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work; it decides which disk is measured (default: /tmp)")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    console.print(f"CPU, {os.cpu_count()} cores, {busy:.1f} busy processes per core")
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=options.folder) as folder:
        records = measure(Path(folder), QUICK if options.quick else WHOLE, options.processes, options.repeats, console)
    console.print(table_of(records))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def measure(
    root: Path, sizes: dict[str, int], processes: Sequence[int], repeats: int, console: Console
) -> list[Record]:
    """One record for `cp` and for each conversion and number of processes."""
    source = root / "model"
    largest = write_model(source, sizes)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    limit = 2 * largest + GIB
    console.print(f"{total / 1e9:.2f} GB in bf16, largest tensor {largest / 1e6:.0f} MB")
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for count in processes:
            for verb in ("import", "export"):
                reads = {"import": source, "export": root / "base" / "megatron"}[verb]
                cache(reads, verb == "import")
                copied = copy_seconds(reads, root / "copy")
                cache(reads, verb == "import")
                found.setdefault((f"cp before {verb}", 1), []).append(
                    {"seconds": copied, "wall": copied, "ratio": 1.0, "peak": 0.0}
                )
                figures = convert(verb, root, source, count)
                figures["ratio"] = copied / figures["seconds"]
                found.setdefault((verb, count), []).append(figures)
                line = f"{verb}, {count} processes: {figures['seconds']:.1f} s, cp {copied:.1f} s"
                console.print(line, highlight=False)
            shutil.rmtree(root / "base")
            shutil.rmtree(root / "export")
    records = []
    for (what, count), runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        peak = max(run["peak"] for run in runs)
        records.append(
            {
                "what": what,
                "processes": count,
                "bytes": total,
                "seconds": middle["seconds"],
                "wall_seconds": middle["wall"],
                "bytes_per_second": total / middle["seconds"],
                "of_cp": middle["ratio"],
                "peak_bytes": peak,
                "peak_limit": limit,
                "met": what.startswith("cp") or (middle["ratio"] >= TIME_TARGET and peak <= limit),
            }
        )
    return records


def write_model(folder: Path, sizes: dict[str, int]) -> int:
    """A Hugging Face folder with random weights; returns the bytes of its largest tensor."""
    heads = sizes["hidden_size"] // 128
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads // 4, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(read_model_shape(folder))
    files = plan_files(shapes, dict.fromkeys(shapes, torch.bfloat16), 2 * 10**9)
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    noise = torch.randint(-(2**15), 2**15, (max(counts.values()) + len(shapes),), dtype=torch.int16)
    number = 0
    for planned in files:
        with ShardWriter(folder, planned) as writer:
            for name, shape in planned.shapes.items():
                number += 1  # every tensor has other bits than the others
                writer.add(name, noise[number : number + counts[name]].clone().view(torch.bfloat16).view(shape))
    write_index(folder, files)
    return 2 * max(counts.values())


def cache(folder: Path, wanted: bool) -> None:
    """Has the system keep a folder's files in memory, or forget them."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                if not wanted:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while wanted and file.read(2**22):
                    pass


def copy_seconds(source: Path, copy: Path) -> float:
    os.sync()  # what was deleted before keeps the disk busy for a while
    begin = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    for path in copy.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    seconds = time.monotonic() - begin
    shutil.rmtree(copy)
    return seconds


def convert(verb: str, root: Path, source: Path, processes: int) -> dict[str, float]:
    """Runs the command as a user does and reads the figures that it leaves in the manifest."""
    output = root / {"import": "base", "export": "export"}[verb]
    flags = ["--hf", str(source)] if verb == "import" else ["--checkpoint", f"model={root / 'base'}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "megatron_erpd.commands.cli", verb, *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    os.sync()
    begin = time.monotonic()
    done = subprocess.run([*command, "--output", str(output)], env=environment, capture_output=True, text=True)
    wall = time.monotonic() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    summary = json.loads((output / "manifest.json").read_text())["summary"]
    return {"seconds": summary["write_seconds"], "wall": wall, "peak": summary["peak_memory_bytes"]}


def table_of(records: Sequence[Record]) -> Table:
    table = Table("", "processes", "time", "GB/s", "of cp", "whole command", "peak memory", "limit", "result")
    for r in records:
        is_copy = r["what"].startswith("cp")
        cells = [r["what"], str(r["processes"]), f"{r['seconds']:.1f} s", f"{r['bytes_per_second'] / 1e9:.2f}"]
        if not is_copy:
            cells += [f"{r['of_cp']:.2f}x", f"{r['wall_seconds']:.1f} s", f"{r['peak_bytes'] / GIB:.2f} GiB"]
            cells += [f"{r['peak_limit'] / GIB:.2f} GiB", "met" if r["met"] else "missed"]
        table.add_row(*cells)
    table.caption = f"targets: at least {TIME_TARGET} of cp's throughput; memory of twice the largest tensor and 1 GiB"
    return table


if __name__ == "__main__":
    main()
