"""How fast are the divergences, how much memory do they take, how often do ranks talk?

    python benchmarks/divergences.py --quick                  two minutes on two CPU cores
    python benchmarks/divergences.py --quick --docs docs      the same, and docs/performance.md with its plots
    python benchmarks/divergences.py --desk --docs docs       what fits two CPU cores and 24 GiB, within an hour
    python benchmarks/divergences.py --json figures.json      the whole grid, for a GPU (on a CPU: hours)
    python benchmarks/divergences.py --vocab 151936 --tokens 2048 --tp 1 --dtype bf16 --target full

Ours (plain PyTorch, Triton, fused with the output layer), a straightforward `log_softmax` implementation, Megatron-LM's
`topk_kl_div` and Liger's kernels are measured side by side, in turns, on the same inputs, beside the matrix products
alone and the floor that bandwidth and matrix products set. What can't run here is named with its reason. Every
implementation must give the same divergence and gradient, or the run ends with an error.

Tensor-parallel ranks are processes on this machine: over gloo with one thread each on a CPU, over NCCL where there are
as many GPUs. Only a quiet machine gives figures that can be trusted; the run says so where it isn't one.
docs/performance.md explains the columns.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

import psutil  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from benchmarks import cases as grids  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.page import QUIET, Run, write_page  # noqa: E402
from benchmarks.ranks import Job, Measured, run_ranks  # noqa: E402
from benchmarks.records import Figures, Record, read_json  # noqa: E402
from benchmarks.tables import print_tables  # noqa: E402
from benchmarks.targets import TARGETS  # noqa: E402

MEMORY_SHARE = 0.9
"""How much of the memory that is free may be used: an estimate is an estimate."""
REPEATS, QUICK_REPEATS = 7, 3


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    run = _describe(options, arguments)
    chosen, left_out = _choose(options)
    run.skipped.extend(left_out)
    console.print(
        f"{run.device_name}, {run.threads} threads, PyTorch {run.torch_version}: {len(chosen)} cases, "
        f"{run.repeats} runs of each implementation"
    )
    if run.device == "cpu" and run.busy > QUIET:
        console.print(
            f"[yellow]This machine is busy ({run.busy:.1f} processes per core): the figures will be noisy.[/yellow]"
        )
    for line in left_out:
        console.print(f"skipped: {line}", highlight=False, soft_wrap=True)
    earlier = _earlier(options.add, run, chosen)
    figures = Figures()
    try:
        _measure(run, chosen, figures, console)
        figures.add(earlier)
    finally:  # also of a run that was stopped
        if options.json and figures.records:
            figures.write_json(options.json)
            console.print(f"wrote {options.json}", highlight=False, soft_wrap=True)
    print_tables(console, figures)
    for target in TARGETS:
        if target.concerns(run.device, run.device_name):
            console.print(
                f"{target.text}: {target.verdict(figures).replace('**', '')}", highlight=False, soft_wrap=True
            )
    if options.docs:
        console.print(f"wrote {write_page(options.docs, run, figures)}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/divergences.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fewer = parser.add_mutually_exclusive_group()
    fewer.add_argument("--quick", action="store_true", help="a few cases; the filters below choose among them")
    fewer.add_argument(
        "--desk", action="store_true", help="the cases for a computer without a GPU; the filters choose among them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure, a list of records")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write DIR/performance.md and DIR/images/")
    parser.add_argument(
        "--add",
        type=Path,
        metavar="FILE",
        help="what --json wrote in an earlier run on this device: its cases that this run doesn't measure",
    )
    sizes = parser.add_argument_group("filters (each takes several values)")
    sizes.add_argument("--vocab", type=int, nargs="+", help=f"columns in all; default: {_listed(grids.VOCABS)}")
    sizes.add_argument("--tokens", type=int, nargs="+", help=f"default: {_listed(grids.TOKENS)}")
    sizes.add_argument("--tp", type=int, nargs="+", help=f"tensor-parallel ranks; default: {_listed(grids.TPS)}")
    sizes.add_argument("--dtype", nargs="+", choices=list(grids.DTYPES), help="default: both")
    sizes.add_argument("--kind", nargs="+", choices=grids.KINDS, help="the divergence; default: all")
    sizes.add_argument(
        "--policy", nargs="+", choices=["logits", "hidden"], help="what the policy is given as; default: both"
    )
    sizes.add_argument(
        "--target", nargs="+", choices=["full", "topk", "hidden"], help="what the target is given as; default: all"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--hidden", type=int, default=grids.HIDDEN, help="width of hidden states; default: %(default)s")
    how.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    how.add_argument("--threads", type=int, help="of a CPU with TP 1; default: what PyTorch takes")
    how.add_argument(
        "--repeats", type=int, help=f"runs that are timed; default: {REPEATS}, quick and desk {QUICK_REPEATS}"
    )
    return parser


def _listed(values: Sequence[int]) -> str:
    return " ".join(str(value) for value in values)


def _describe(options: argparse.Namespace, arguments: list[str]) -> Run:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Run(
        device=device,
        device_name=torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        threads=options.threads or torch.get_num_threads(),
        torch_version=torch.__version__,
        date=datetime.date.today().isoformat(),
        command=shlex.join(["python", "benchmarks/divergences.py", *arguments]),
        busy=os.getloadavg()[0] / (os.cpu_count() or 1),
        repeats=options.repeats or (QUICK_REPEATS if options.quick or options.desk else REPEATS),
        unavailable={},
        skipped=[],
    )


def cpu_name() -> str:
    """The processor and the number of its cores."""
    found = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        found = match[1].strip() if match else found
    return f"{found}, {os.cpu_count()} cores"


def _choose(options: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """The cases, and lines about those that can't be."""
    if options.quick:
        found = grids.quick(options.hidden)
    elif options.desk:
        found = grids.desk(options.hidden)
    else:
        found = grids.grid(
            options.vocab or grids.VOCABS,
            options.tokens or grids.TOKENS,
            options.tp or grids.TPS,
            options.dtype or list(grids.DTYPES),
            options.hidden,
        )
    for name in ("vocab", "tokens", "tp", "dtype", "kind", "policy", "target"):
        wanted = getattr(options, name)
        found = [case for case in found if not wanted or getattr(case, name) in wanted]
    if not found:
        raise SystemExit("no case is left; see --help for what the filters choose from")
    uneven = [case for case in found if case.vocab % case.tp]
    lines = [f"V={case.vocab:,} isn't a multiple of TP {case.tp}" for case in uneven]
    return [case for case in found if case not in uneven], list(dict.fromkeys(lines))


def _earlier(path: Path | None, run: Run, chosen: list[Case]) -> list[Record]:
    """The records of an earlier run for cases that this one leaves out."""
    if path is None:
        return []
    try:
        found = read_json(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--add {path}: can't be read ({error!r}); give what --json wrote") from None
    foreign = {record.device_name for record in found} - {run.device_name}
    if foreign:
        raise SystemExit(f"--add {path}: was measured on {', '.join(sorted(foreign))}, this is {run.device_name}")
    return [record for record in found if record.case not in chosen]


def _measure(run: Run, chosen: list[Case], figures: Figures, console: Console) -> None:
    """Runs the ranks of each tensor-parallel size, adds to the figures, and prints a line for each case."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        for tp in dict.fromkeys(case.tp for case in chosen):
            own = [case for case in chosen if case.tp == tp]
            gpus = torch.cuda.device_count() if run.device == "cuda" else tp
            if tp > gpus:
                run.skipped.append(f"TP {tp}: needs {tp} GPUs, there {'is' if gpus == 1 else 'are'} {gpus}")
                console.print(f"skipped: {run.skipped[-1]}", highlight=False, soft_wrap=True)
                progress.advance(task, len(own))
                continue
            for message in run_ranks(Job(own, _template(run, own[0]), _memory(run, tp))):
                if not isinstance(message, Measured):
                    if message.name not in run.unavailable:
                        run.unavailable[message.name] = message.reason
                        console.print(
                            f"not measured: {message.name}: {message.reason}", highlight=False, soft_wrap=True
                        )
                    continue
                progress.advance(task)
                figures.add(message.records)
                if message.records:
                    console.print(
                        f"{message.case.title}: {figures.summary(message.case)}", highlight=False, soft_wrap=True
                    )
                for text in message.skipped:
                    run.skipped.append(f"{message.case.title}: {text}")
                    console.print(f"skipped: {run.skipped[-1]}", highlight=False, soft_wrap=True)


def _template(run: Run, case: Case) -> Record:
    threads = run.threads if case.tp == 1 else 1
    return Record("", case, "forward", run.device, run.device_name, threads, run.repeats, 0.0, 0.0, 0.0)


def _memory(run: Run, tp: int) -> int:
    """Bytes that each rank may use."""
    if run.device == "cuda":
        return int(MEMORY_SHARE * min(torch.cuda.mem_get_info(rank)[0] for rank in range(tp)))
    return int(MEMORY_SHARE * psutil.virtual_memory().available / tp)


if __name__ == "__main__":
    main()
