"""What does a teacher cache cost to make, to keep and to read?

    python benchmarks/teacher_cache.py --quick              five minutes on two CPU cores
    python benchmarks/teacher_cache.py --json figures.json  larger models and more rollouts

Measured in one run, on random models that are made for it:

- precompute: all of its work (loading, forward passes, scores, target, packing, writing to disk) against the bare
  forward passes of the same policies over the same batches, with the logits of every token as Megatron computes them;
  on a CPU in seconds of CPU, all threads together.
  What it does besides costs per entry of the vocabulary, so it weighs as much as the model is small beside its
  vocabulary. The first model has the proportions of one of 4 billion parameters with 152k entries (26,000
  multiplications of a forward pass for each entry); the second is small, so that the cost of the target shows;
- target: signal, projection and top-k of a token alone, from two policies' logits;
- reading: rollouts per second out of the cache, checked and collated, against those that stage 2 trains on, by the
  same clock;
- disk: bytes read from it in an epoch by two processes of a node, from a cold page cache, against the size of the files
  (Linux; 0 where the file system doesn't say);
- rows: how often each row is fetched in an epoch by all data-parallel ranks together;
- size: bytes per token of each table's files, rows' keys and indices included;
- opening: seconds and resident memory for a cache of 10 million rows.

Only a quiet machine gives figures that can be trusted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from megatron_erpd import platform  # noqa: E402

platform.enable_cpu()  # where there is no GPU; must come before Megatron

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.cache_workload import Sizes, make_caches, make_policies, open_many_rows  # noqa: E402
from megatron_erpd.data.batch import BatchSource  # noqa: E402
from megatron_erpd.data.replay_dataset import BatchOrder  # noqa: E402
from megatron_erpd.data.rollouts import Rollouts, read_rollouts  # noqa: E402
from megatron_erpd.model.forward import HiddenStates  # noqa: E402
from megatron_erpd.settings import Layout  # noqa: E402
from megatron_erpd.teacher_cache.parts import Part  # noqa: E402
from megatron_erpd.teacher_cache.reader import CacheReader  # noqa: E402
from megatron_erpd.teacher_cache.rows import token_row, topk_rows  # noqa: E402

QUICK = Sizes(hidden=256, layers=4, vocab=4096, num_rollouts=96, prompt=16, response=192)
WHOLE = Sizes(hidden=512, layers=8, vocab=16384, num_rollouts=256, prompt=32, response=480)
PROPORTIONATE_QUICK = Sizes(hidden=1024, layers=8, vocab=4096, num_rollouts=24, prompt=16, response=128)
PROPORTIONATE_WHOLE = Sizes(hidden=1536, layers=14, vocab=16384, num_rollouts=40, prompt=32, response=224)
MICRO_BATCH = 8


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it is compared with."""

    name: str
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/teacher_cache.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rollouts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure, a list of records")
    parser.add_argument("--repeats", type=int, default=3, help="runs of what is timed; the median counts (default: 3)")
    options = parser.parse_args(argv)
    large, small = (PROPORTIONATE_QUICK, QUICK) if options.quick else (PROPORTIONATE_WHOLE, WHOLE)
    console = Console(width=None if sys.stdout.isatty() else 160)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    console.print(f"{device}, {torch.get_num_threads()} threads, {busy:.1f} busy processes per core")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="teacher-cache-") as folder:
        for sizes in (large, small):
            ratio = f"{sizes.multiplications_per_entry:,} multiplications per vocabulary entry in a forward pass"
            console.print(f"{sizes}: {ratio}", highlight=False)
            root = Path(folder) / f"hidden-{sizes.hidden}"
            root.mkdir()
            with quiet(root):
                make_policies(root, sizes)
                if sizes is small:
                    make_caches(root, MICRO_BATCH)
            measures = [precompute_against_forward]
            if sizes is small:
                measures += [cost_of_target, reading_against_training, disk_and_rows, bytes_per_token, opening]
            for measure in measures:
                found = measure(root, sizes, options.repeats)
                figures += found
                for figure in found:
                    console.print(f"{figure.name}: {figure.value:,.4g} {figure.unit}", highlight=False)
    console.print(table_of(figures))
    if options.json:
        options.json.write_text(json.dumps([vars(figure) | {"device": device} for figure in figures], indent=1) + "\n")


def table_of(figures: Sequence[Figure]) -> Table:
    table = Table("figure", "value", "against", "ratio", "target", "result")
    for f in figures:
        result = "" if f.met is None else "met" if f.met else "missed"
        ratio = "" if f.ratio is None else f"{f.ratio:.3g}x"
        table.add_row(f.name, f"{f.value:,.4g} {f.unit}", f.reference, ratio, f.target, result)
    return table


@contextlib.contextmanager
def quiet(root: Path) -> Iterator[None]:
    """Stages talk a lot; what they say is shown only where one fails."""
    log = root / "log.txt"
    sys.stdout.flush()
    with open(log, "ab") as file:
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        except BaseException:
            os.write(saved[1], log.read_bytes()[-4000:])
            raise
        finally:
            sys.stdout.flush()
            for target, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, target)
                os.close(copy)


def clock() -> float:
    """Seconds of this process on all cores, where the model runs there: what else a machine does counts for little, and
    a writer's thread counts in full although nobody waits for it. Seconds by the wall where it runs on a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def precompute_against_forward(root: Path, sizes: Sizes, repeats: int) -> list[Figure]:
    """Each kind of cache against the bare forward passes of its policies, in turns."""
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "token": (["base"], {"kind": "token"}),
        "topk": (["base", "teacher"], {"delta": 0.05}),
        "topk + hidden states": (["base", "teacher"], {"delta": 0.05, "keep_hidden": True}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", *kinds)}
    with quiet(root):
        for repeat in range(repeats + 1):
            found = {"forward": time_forward(root)}
            found |= {n: time_precompute(root, p, s, root / f"timed-{n[-6:]}-{repeat}") for n, (p, s) in kinds.items()}
            if repeat:  # the first time pays for what is done once in a process
                for name, value in found.items():
                    seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    model, unit = f"hidden {sizes.hidden}", "s" if torch.cuda.is_available() else "s of CPU"
    figures = [Figure(f"forward pass of a policy, {model}", medians["forward"], unit)]
    for name, (policies, _) in kinds.items():
        bare = medians["forward"] * len(policies)
        ratio = medians[name] / bare
        what = f"{len(policies)} bare forward passes"
        aim = ("at most 1.1x", ratio <= 1.1) if sizes in (PROPORTIONATE_QUICK, PROPORTIONATE_WHOLE) else ("", None)
        figures.append(Figure(f"precompute {name}, {model}", medians[name], unit, what, ratio, *aim))
    return figures


def cost_of_target(root: Path, sizes: Sizes, repeats: int) -> list[Figure]:
    """Signal, projection and top-k from the logits of two policies."""
    from megatron_erpd.precompute.scores import Scores
    from megatron_erpd.settings import PrecomputeSettings
    from megatron_erpd.vocab_parallel import VocabShard

    scores = Scores(PrecomputeSettings(delta=0.05), ["base", "teacher"], VocabShard.dense(sizes.vocab))
    torch.manual_seed(0)
    base = 2 * torch.randn(512, sizes.vocab, device=platform.device())
    teacher = base + 0.3 * torch.randn_like(base)
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        scores._target([base, teacher])["eta"].cpu()
        seconds.append(clock() - start)
    per_token = statistics.median(seconds[1:]) / len(base)
    per_entry = f"{1e9 * per_token / sizes.vocab:.1f} ns per entry"
    return [Figure(f"target of a token, vocabulary {sizes.vocab:,}", 1e3 * per_token, "ms", per_entry)]


def time_forward(root: Path) -> float:
    """Seconds for one policy over all rollouts, with the logits of all tokens."""
    from megatron_erpd.model.model import load_weights
    from megatron_erpd.precompute.forward import batch_groups, run_forward

    layout, rollouts = Layout(micro_batch_size=MICRO_BATCH), read_rollouts(root / "rollouts.parquet")

    def logits(batch: Any, hidden: HiddenStates) -> None:
        hidden.rows @ hidden.weight.t()

    def run(model: Any) -> None:
        load_weights([model], root / "base")
        run_forward(model, rollouts, batch_groups(layout, rollouts, root / "base" / "hf"), layout, logits, "forward")

    return in_stage(root, rollouts, layout, run)


def time_precompute(root: Path, policies: Sequence[str], settings: dict[str, Any], output: Path) -> float:
    """Seconds for everything after the model's construction, until all rows are on disk."""
    from megatron_erpd.commands.precompute import _cache_meta
    from megatron_erpd.precompute import passes
    from megatron_erpd.settings import PrecomputeSettings

    layout, rollouts = Layout(micro_batch_size=MICRO_BATCH), read_rollouts(root / "rollouts.parquet")
    folders = {name: root / name for name in policies}
    chosen = PrecomputeSettings(**settings)
    meta = _cache_meta(chosen, chosen.signal, layout, folders, rollouts)

    def run(model: Any) -> None:
        with mock.patch.object(passes, "_build_model", lambda: model):
            passes.CachePasses(chosen, layout, meta, folders, rollouts, output).run()

    return in_stage(root, rollouts, layout, run)


def in_stage(root: Path, rollouts: Rollouts, layout: Layout, run: Callable[[Any], None]) -> float:
    """Seconds of `run` with a model, in a stage's process."""
    from megatron.training import get_args

    from megatron_erpd.model.model import build_frozen_model, model_config
    from megatron_erpd.model.runtime import initialize, stage_process

    flags: dict[str, object] = {"no_load_optim": True, "train_iters": 0}
    with stage_process() as store:
        initialize(root / "base" / "hf", layout, flags, [], int(rollouts.lengths.max()), store)
        (model,) = build_frozen_model(model_config(get_args()))
        start = clock()
        run(model)
        return clock() - start


def reading_against_training(root: Path, sizes: Sizes, repeats: int) -> list[Figure]:
    """Rollouts per second, read and collated, against those that stage 2 trains on."""
    rates = [read_epoch(root) for _ in range(repeats)]
    reading = statistics.median(rates)
    with quiet(root):
        training = training_rate(root, sizes)
    ratio = reading / training
    return [
        Figure("stage 2 trains on", training, "rollouts/s"),
        Figure("reading top-k rows", reading, "rollouts/s", "stage 2", ratio, "at least 10x", ratio >= 10),
    ]


def source_of(root: Path) -> tuple[BatchSource, Rollouts]:
    rollouts = read_rollouts(root / "rollouts.parquet")
    cache, base = CacheReader(root / "cache"), CacheReader(root / "base-log-probs")
    log_probs = {"old_log_probs": token_row(base, "base", rollouts)}
    return BatchSource(rollouts, Layout(), token_rows=log_probs, target_rows=topk_rows(cache, rollouts)), rollouts


def read_epoch(root: Path, rank: int = 0, size: int = 1) -> float:
    """Rollouts per second over an epoch of a data-parallel rank."""
    source, rollouts = source_of(root)
    order = BatchOrder(rollouts.lengths, MICRO_BATCH * size, seed=1)
    endless, count = order.micro_batches(0, MICRO_BATCH, rank, size), len(rollouts) // (MICRO_BATCH * size)
    start = clock()
    seen = sum(len(batch.row_indices) for batch in source.replay(itertools.islice(endless, count)))
    return seen / (clock() - start)


def training_rate(root: Path, sizes: Sizes) -> float:
    """Rollouts per second of stage 2: the time of more steps less that of fewer."""
    from megatron_erpd.commands.train import distill

    seconds, steps = [], (2, 6)
    for count in steps:
        output = root / f"student-{count}"
        argv = ["--base", f"{root}/base", "--rollouts", f"{root}/rollouts.parquet", "--output", str(output)]
        argv += ["--base-log-probs", f"{root}/base-log-probs", "--cache", f"{root}/cache"]
        argv += ["--global-batch-size", str(MICRO_BATCH), "--micro-batch-size", str(MICRO_BATCH)]
        argv += ["--epochs", str(count * MICRO_BATCH / sizes.num_rollouts)]
        start = clock()
        distill(argv)
        seconds.append(clock() - start)
    return (steps[1] - steps[0]) * MICRO_BATCH / (seconds[1] - seconds[0])


def disk_and_rows(root: Path, sizes: Sizes, repeats: int) -> list[Figure]:
    """An epoch of two data-parallel ranks, each a process of its own."""
    # Copies: what a process has mapped stays in the page cache, and this one has read the originals.
    cold = root / "cold"
    for name in ("cache", "base-log-probs"):
        shutil.copytree(root / name, cold / name)
    os.link(root / "rollouts.parquet", cold / "rollouts.parquet")
    tables = ("base-log-probs/log_probs.base", "cache/topk")
    files = [path for table in tables for path in (cold / table).iterdir()]
    total = sum(path.stat().st_size for path in files)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        found = pool.starmap(_epoch_of_rank, [(cold, rank, 2) for rank in range(2)], chunksize=1)
    loaded, fetched = sum(f[0] for f in found), sum(f[1] for f in found)
    rows = 2 * 2 * (sizes.num_rollouts // 2)  # of two tables
    return [
        Figure(
            "read from disk in an epoch",
            loaded / 1e6,
            "MB",
            "the files",
            loaded / total,
            "at most once",
            0.5 * total <= loaded <= 1.1 * total,
        ),
        Figure("rows fetched in an epoch", fetched, "rows", "rows there are", fetched / rows, "once", fetched == rows),
    ]


def _epoch_of_rank(root: Path, rank: int, size: int) -> tuple[int, int]:
    """Bytes that this process reads from the disk for its rows, and the rows that it fetches."""
    fetched, row = [], Part.row

    def counted(self: Part, i: int) -> dict[str, np.ndarray]:
        fetched.append(i)
        return row(self, i)

    Part.row = counted  # type: ignore[method-assign]
    before = _read_bytes()
    read_epoch(root, rank, size)
    return _read_bytes() - before, len(fetched)


def _read_bytes() -> int:
    path = Path("/proc/self/io")
    fields = dict(line.split(": ") for line in path.read_text().splitlines()) if path.is_file() else {}
    return int(fields.get("read_bytes", 0))


def bytes_per_token(root: Path, sizes: Sizes, repeats: int) -> list[Figure]:
    """Of the files of each table, everything included."""
    cache, figures = CacheReader(root / "cache"), []
    for name in cache.meta.tables:
        size = sum(path.stat().st_size for path in (root / "cache" / name).iterdir())
        payload = sum(column.bytes_per_token for column in cache.meta.columns(name).values())
        value = size / cache.num_tokens
        figures.append(Figure(f"size of {name}", value, "B/token", f"{payload} B of payload", value / payload))
    return figures


def opening(root: Path, sizes: Sizes, repeats: int) -> list[Figure]:
    """A cache of 10 million rows, in a process of its own."""
    with contextlib.redirect_stdout(io.StringIO()):
        seconds, grown, whole = open_many_rows(root / "many", 10_000_000)
    return [
        Figure("opening 10 million rows", seconds, "s", "", None, "below 1 s", seconds < 1),
        Figure("resident memory of the process", whole / 1e6, "MB", f"{grown / 1e6:.1f} MB of it by opening", None,
               "below 200 MB", whole < 200e6),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
