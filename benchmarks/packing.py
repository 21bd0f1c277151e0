"""What packs of rollouts save against padded micro-batches: padding, ranks that wait, and the time of a step.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --quick --docs docs     four minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/packing.py --docs docs             half an hour: a larger model, longer rollouts

Lengths are spread as those of reasoning are: log-normal with a median of 1,000 tokens and a sigma of 1, cut at 16,384,
512 rollouts, the same in every run. The same rollouts are arranged in three ways, each within one budget of tokens:

- packed: `micro_batch_tokens`, as `data.packs` deals them;
- padded: `micro_batch_size`, as `data.replay_dataset` deals them: as many rows as the budget holds of the longest, and
  rows of similar length in a micro-batch and on the ranks of a micro-step;
- unsorted: the same without the sorting, rows in the order in which they are drawn.

Counted are the tokens that a model reads and the work of each rank, with the micro-batches that a training collates.
Timed are forward and backward of every micro-batch of an optimizer step on a small model, through Megatron, in one
process and on one thread; a step of several data-parallel ranks takes what the micro-batches of its slowest rank take
together (communication is the same for all and left out). Lengths and budgets are a part of the above there, as the
model is small. Every arrangement must give the same gradient, or the run ends with an error. Arrangements are timed in
turns, and of each micro-batch the fastest run counts, in seconds of CPU. Memory is that of the arrangement's largest
micro-batch, at the most, beyond weights and gradients.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the memory meter's profiler would write to the terminal

from megatron_erpd import platform  # noqa: E402

platform.enable_cpu()  # where there is no GPU; must come before Megatron

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.divergences import cpu_name  # noqa: E402
from benchmarks.measure import MemoryMeter  # noqa: E402
from benchmarks.page import QUIET, write_section  # noqa: E402
from benchmarks.records import bytes_text, seconds_text  # noqa: E402
from benchmarks.tables import markdown_table  # noqa: E402
from benchmarks.teacher_cache import quiet  # noqa: E402
from megatron_erpd.checkpoint.mapping.config import read_model_shape  # noqa: E402
from megatron_erpd.checkpoint.mapping.parameter_count import attention_length  # noqa: E402
from megatron_erpd.data.batch import Batch, BatchSource, packer  # noqa: E402
from megatron_erpd.data.packs import Packer  # noqa: E402
from megatron_erpd.data.replay_dataset import BatchOrder  # noqa: E402
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts  # noqa: E402
from megatron_erpd.data.schema import Rollout  # noqa: E402
from megatron_erpd.settings import Layout  # noqa: E402

MEDIAN, SIGMA, LONGEST, NUM_ROLLOUTS = 1000, 1.0, 16_384, 512
BUDGETS = (16_384, 32_768, 65_536)
VOCAB = 2048
ATTENTION_LENGTH = 10_000
"""Of what is counted: tokens of a sequence whose attention costs what the rest of the model does, as in a model of 0.6
billion parameters (Qwen3). In larger ones it is longer, and work follows the tokens more closely."""
PADDING, SPREAD, STEP, DEALING = 0.03, 1.05, 0.6, 10.0
"""The targets: share of the tokens, longest over mean, of the padded step's time, seconds."""
AGREEMENT = 1e-4

ARRANGEMENTS = ("packed", "padded", "unsorted")
GLOBAL_BATCHES, RANKS, TIMED_RANKS = (128, 512), (4, 8), (1, 8)

Case = tuple[str, int, int]
"""An arrangement, its budget, and the ranks; 0 for any number of them."""
Cases = dict[Case, list[list[Batch]]]


@dataclass(frozen=True)
class Table:
    """Figures, and the targets that they are held against."""

    columns: list[str]
    lines: list[list[str]]
    verdicts: list[list[str]]

    @property
    def text(self) -> str:
        return markdown_table(tuple(self.columns), self.lines)


@dataclass(frozen=True)
class Sizes:
    """Of what is timed.

    Attributes:
        part: what lengths and budgets are divided by.
        global_batch: rollouts of the one step.
    """

    hidden: int
    layers: int
    part: int
    global_batch: int


QUICK = Sizes(hidden=128, layers=4, part=8, global_batch=128)
WHOLE = Sizes(hidden=256, layers=4, part=4, global_batch=128)


def lengths_of_reasoning(count: int, part: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), SIGMA, count)
    return np.maximum(2, drawn.clip(max=LONGEST) / part).astype(np.int64)


def make_rollouts(path: Path, lengths: np.ndarray) -> Rollouts:
    """Random tokens, an eighth of each rollout as its prompt."""
    draw = np.random.default_rng(1)

    def rollout(number: int, length: int) -> Rollout:
        tokens, prompt = draw.integers(0, VOCAB, length), max(1, length // 8)
        return Rollout(tokens[:prompt], tokens[prompt:], group_id=number // 8, reward=float(number % 2))

    write_rollouts(path, (rollout(number, length) for number, length in enumerate(lengths.tolist())))
    return read_rollouts(path)


@dataclass(frozen=True)
class Arrangement:
    """Rollouts in micro-batches of at most `budget` tokens.

    Attributes:
        name: packed, padded or unsorted.
        split: the layout but for the size of its micro-batches.
        attention_length: as in `data.batch.packer`.
    """

    name: str
    rollouts: Rollouts
    split: Layout
    budget: int
    global_batch: int
    attention_length: float

    @property
    def rows(self) -> int:
        """Of a padded micro-batch: as many of the longest as the budget holds, among those that divide the batch."""
        most = max(1, self.budget // int(self.rollouts.lengths.max() - 1))
        return max(n for n in range(1, most + 1) if self.global_batch % (n * self.split.data_parallel) == 0)

    @property
    def layout(self) -> Layout:
        if self.name == "packed":
            return self.split.changed({"micro_batch_tokens": self.budget // self.split.context_parallel})
        return self.split.changed({"micro_batch_size": self.rows})

    def batches(self) -> list[list[list[Batch]]]:
        """The micro-batches of each step and rank, those of all rollouts once, as a training collates them."""
        size, ranks, batch = len(self.rollouts), self.split.data_parallel, self.global_batch
        num_steps, order = size // batch, BatchOrder(self.rollouts.lengths, batch, 0)
        count = batch // (self.rows * ranks)
        if self.name == "packed":
            dealing = packer(self.layout, self.rollouts.lengths, self.attention_length)
            count = order.most_packs(dealing, num_steps, ranks)
            own = [order.packs(0, dealing, count, rank, ranks) for rank in range(ranks)]
        elif self.name == "padded":
            own = [order.micro_batches(0, self.rows, rank, ranks) for rank in range(ranks)]
        else:
            drawn = order.stream(0, num_steps * batch).reshape(-1, ranks, self.rows)
            own = [iter(drawn[:, rank]) for rank in range(ranks)]
        source = BatchSource(
            self.rollouts,
            self.layout,
            (0, self.split.context_parallel),
            token_rows={"old_log_probs": lambda i: np.full(self.rollouts.response_lengths[i], -np.log(VOCAB))},
            sequence_rows={"rewards": np.arange(size) % 2.0, "advantages": np.arange(size) % 2 - 0.5},
        )
        return [[list(map(source.batch, islice(rows, count))) for rows in own] for _ in range(num_steps)]


@dataclass(frozen=True)
class Counted:
    """What a model reads of an arrangement, and how it is spread.

    Attributes:
        micro_batches: of a rank in a step.
        padding: share of the tokens that are of no rollout.
        fullness: tokens of rollouts over the budget of all micro-batches.
        spread: work of the rank with the most over the mean, each summed over the steps: what a training waits for.
        worst: the same in the worst step.
    """

    micro_batches: int
    padding: float
    fullness: float
    spread: float
    worst: float


def count(arrangement: Arrangement) -> Counted:
    cp, steps = arrangement.split.context_parallel, arrangement.batches()
    work = np.array(
        [[sum(work_of(batch, cp, arrangement.attention_length) for batch in own) for own in step] for step in steps]
    )
    longest, mean = work.max(axis=1), work.mean(axis=1)
    read = [batch.tokens.numel() * cp for batch in chain(*chain(*steps))]
    held = int((arrangement.rollouts.lengths - 1).sum())
    return Counted(
        micro_batches=len(steps[0][0]),
        padding=1 - held / sum(read),
        fullness=held / (len(read) * arrangement.budget),
        spread=float(longest.sum() / mean.sum()),
        worst=float((longest / mean).max()),
    )


def work_of(batch: Batch, cp: int, attention_length: float) -> float:
    """Of a micro-batch as it is read, with padding."""
    rows, length = batch.tokens.shape
    lengths = np.array([length * cp] * rows if batch.segments is None else batch.segments)
    return float((lengths * (1 + lengths / attention_length)).sum())


def counted_table(folder: Path) -> Table:
    rollouts = make_rollouts(folder / "counted.parquet", lengths_of_reasoning(NUM_ROLLOUTS))
    lines, padding, spreads = [], [], []
    for batch, ranks, budget in product(GLOBAL_BATCHES, RANKS, BUDGETS):
        split = Layout(data_parallel=ranks)
        found = {
            name: count(Arrangement(name, rollouts, split, budget, batch, ATTENTION_LENGTH)) for name in ARRANGEMENTS
        }
        split = split.changed({"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True})
        packed, padded, unsorted = found.values()
        parted = count(Arrangement("packed", rollouts, split, budget, batch, ATTENTION_LENGTH))
        padding += [packed.padding, parted.padding]
        spreads += [packed.spread, parted.spread]
        line = [f"{batch}", f"{ranks}", f"{budget:,}", f"{packed.micro_batches}", f"{packed.fullness:.0%}"]
        line += [f"{packed.padding:.2%}", f"{parted.padding:.2%}", f"{packed.spread:.3f}", f"{packed.worst:.3f}"]
        for other in (padded, unsorted):
            line += [f"{other.padding:.1%}", f"{other.spread:.2f}"]
        lines.append(line)
    columns = ["global batch", "DP", "budget", "packs of a rank", "full", "padding", "CP 2 x TP 2"]
    columns += ["spread", "worst step", "padded: padding", "spread", "unsorted: padding", "spread"]
    verdicts = [
        verdict(f"padding in packs: at most {PADDING:.0%} of the tokens", max(padding), PADDING, "{:.2%}"),
        verdict(f"work of the rank with the most: at most {SPREAD} of the mean", max(spreads), SPREAD, "{:.3f}"),
    ]
    return Table(columns, lines, verdicts)


def verdict(target: str, found: float, limit: float, text: str, rest: str = "") -> list[str]:
    return [target, f"**{'met' if found <= limit else 'missed'}**: {text.format(found)}{rest}"]


def dealing_table(num_rollouts: int = 100_000, epochs: int = 8, batch: int = 512, ranks: int = 8) -> Table:
    """Seconds of CPU that each rank takes before a training to count the packs, and in each step to deal them."""
    lengths = lengths_of_reasoning(num_rollouts)
    tokens, num_steps, dealt = lengths - 1, num_rollouts * epochs // batch, 20
    lines, most = [], 0.0
    for budget in BUDGETS:
        dealing = Packer(tokens, tokens * (1 + tokens / ATTENTION_LENGTH), budget)
        order = BatchOrder(lengths, batch, 0)
        start = time.process_time()
        packs = order.most_packs(dealing, num_steps, ranks)
        counted = time.process_time()
        for number in range(dealt):
            dealing.deal(order.global_batch(number * batch), ranks, packs)
        each = (time.process_time() - counted) / dealt
        most = max(most, counted - start)
        lines.append([f"{budget:,}", f"{packs}", seconds_text(counted - start), seconds_text(each)])
    columns = ["budget", "packs of a rank", f"counted for {num_steps:,} steps", "a step dealt"]
    target = f"packs of {num_rollouts:,} rollouts x {epochs} epochs, DP {ranks}: counted in at most {DEALING:.0f} s"
    return Table(columns, lines, [verdict(target, most, DEALING, "{:.1f} s")])


# Time and memory


def timed_table(folder: Path, sizes: Sizes, repeats: int) -> Table:
    from megatron.training import get_args
    from transformers import Qwen3Config

    from megatron_erpd.model.model import build_frozen_model, model_config
    from megatron_erpd.model.runtime import initialize, stage_process

    rollouts = make_rollouts(folder / "timed.parquet", lengths_of_reasoning(sizes.global_batch, sizes.part))
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 32,
        num_key_value_heads=sizes.hidden // 64,
        head_dim=32,
        max_position_embeddings=LONGEST,
    ).save_pretrained(folder / "hf")
    attention = attention_length(read_model_shape(folder / "hf"))
    batches: Cases = {}
    # Padded micro-batches are the same for any number of ranks.
    for name, budget, ranks in product(ARRANGEMENTS, BUDGETS, TIMED_RANKS):
        split = Layout(data_parallel=ranks)
        arrangement = Arrangement(name, rollouts, split, budget // sizes.part, sizes.global_batch, attention)
        if name == "packed":
            (batches[name, budget, ranks],) = arrangement.batches()
        elif ranks == max(TIMED_RANKS):
            (batches[name, budget, 0],) = arrangement.batches()
    layout = Layout(micro_batch_tokens=1, head_chunk_mib=16)
    with stage_process() as store:
        initialize(folder / "hf", layout, {"no_load_optim": True, "train_iters": 0}, [], LONGEST, store)
        (model,) = build_frozen_model(model_config(get_args()))
        trainer = Trainer(model.requires_grad_(True).train())
        seconds = trainer.time(batches, repeats)
        peaks = {case: trainer.peak(list(chain(*ranks))) for case, ranks in batches.items()}
    lines = []
    ratios: dict[tuple[str, int], list[float]] = {}
    for budget, ranks in product(BUDGETS, TIMED_RANKS):
        packed = slowest(seconds["packed", budget, ranks], ranks)
        line = [f"{budget // sizes.part:,}", f"{ranks}", seconds_text(packed)]
        for name in ARRANGEMENTS[1:]:
            other = slowest(seconds[name, budget, 0], ranks)
            ratios.setdefault((name, ranks), []).append(packed / other)
            line += [seconds_text(other), f"{packed / other:.2f}x"]
        memory = [peaks["packed", budget, ranks], *(peaks[name, budget, 0] for name in ARRANGEMENTS[1:])]
        lines.append([*line, *map(bytes_text, memory)])
    columns = ["budget", "DP", "packed", "padded", "packed / padded", "unsorted", "packed / unsorted"]
    columns += ["memory packed", "padded", "unsorted"]
    verdicts = []
    for (name, ranks), found in ratios.items():
        text = f"a step: at most {STEP}x the time of {name} micro-batches of the same memory, DP {ranks}"
        listed = ", ".join(f"{ratio:.2f}x" for ratio in found)
        verdicts.append(verdict(text, max(found), STEP, "{:.2f}x at the most", f" ({listed})"))
    return Table(columns, lines, verdicts)


def slowest(seconds: Sequence[Sequence[float]], ranks: int) -> float:
    """Of ranks that wait for each other at the end of a step alone.

    Args:
        seconds: of each micro-batch, in the order of the micro-steps, for each of any number of ranks.
        ranks: among which the micro-batches of a micro-step are dealt.
    """
    in_order = np.array(seconds).T.reshape(-1, ranks)
    return float(in_order.sum(axis=0).max())


class Trainer:
    """Forward and backward of a replay loss."""

    def __init__(self, model: Any) -> None:
        from megatron_erpd.objectives.replay import REPLAY_LOSSES
        from megatron_erpd.training.step import ReplayStep

        self.model = model
        self.step = ReplayStep(
            vocab_size=VOCAB,
            prefix="stage1",
            loss=REPLAY_LOSSES["ppo"],
            aggregation="token_mean",
            advantages=lambda batch: batch.seq_rows["advantages"],
            kl_coefficient=0.0,
            kl_estimator="k3",
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def run(self, batch: Batch) -> None:
        output, loss = self.step(iter([batch]), self.model)
        loss(output)[0].backward()
        if error := self.step.checks.first():
            raise error

    def time(self, cases: Cases, repeats: int) -> dict[Case, list[list[float]]]:
        """The least seconds of each micro-batch of each rank, all cases in turns.

        Raises:
            RuntimeError: an arrangement has another gradient than the others.
        """
        runs: dict[Case, list[Any]] = {case: [] for case in cases}
        norms: dict[Case, float] = {}
        for _ in range(repeats):
            for case, ranks in cases.items():
                self.model.zero_grad(set_to_none=False)
                runs[case].append([[self.seconds(batch) for batch in own] for own in ranks])
                norms[case] = float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))
        first = next(iter(norms.values()))
        for case, norm in norms.items():
            if not abs(norm - first) <= AGREEMENT * first:
                raise RuntimeError(f"{case}: a gradient of norm {norm:.7g}, where another arrangement has {first:.7g}")
        return {case: np.min(found, axis=0).tolist() for case, found in runs.items()}

    def seconds(self, batch: Batch) -> float:
        start = time.process_time()
        self.run(batch)
        return time.process_time() - start

    def peak(self, batches: Sequence[Batch]) -> int:
        """Bytes that the largest takes at the most, forward and backward."""
        meter = MemoryMeter(torch.device("cpu"))
        with meter.watch():
            self.run(max(batches, key=lambda batch: batch.tokens.numel()))
        return meter.peak


INTRODUCTION = """## Packs of rollouts, {name}

What packs (`layout.micro_batch_tokens`) save against padded micro-batches (`layout.micro_batch_size`), of rollouts
whose lengths are log-normal with a median of {median:,} tokens and a sigma of {sigma:.0f}, cut at {longest:,}.
**padded** micro-batches are those of this project, which deals a step's rollouts sorted by length; **unsorted** ones
hold them as they are drawn. Both have as many rows as the budget holds of the longest rollout.

{facts}"""
COUNTED = """Counted for {count} rollouts. **full** is what packs hold of their budget; their number is one for the
whole training, that of the step that needs the most. **CP 2 x TP 2** is the padding with sequence parallelism.
**spread** is the work of the rank with the most over the mean; attention of {attention:,} tokens counts as much as the
rest of the model, as in one of 0.6 billion parameters. In a step whose packs are nearly full, ranks without the longest
rollouts have no room for as much work as those with them; a larger budget levels it."""
TIMED = """A step of {sizes.global_batch} rollouts, forward and backward through Megatron in fp32 on one thread, in
seconds of CPU: {sizes.layers} layers of {sizes.hidden}, {vocab:,} entries in the vocabulary, and 1/{sizes.part} of the
lengths and budgets above. With DP {ranks} it is the time of the slowest rank, whose micro-batches were run one after
another here. Memory is the most that a micro-batch takes beyond weights and gradients, measured. One rank alone waits
for none, and reads little padding where rollouts are sorted: there, on a CPU, packs take as long as sorted
micro-batches."""
DEALT = "What each rank computes before a training, and for each step on the loader's thread, in seconds of CPU."


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="benchmarks/packing.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter rollouts where time is taken")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write a section of DIR/performance.md")
    parser.add_argument("--repeats", type=int, help="runs of what is timed; default: 3, quick 2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes, repeats = (QUICK if options.quick else WHOLE), options.repeats or (2 if options.quick else 3)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    noisy = ": **the machine was busy, times are noisy**" if busy > QUIET else ""
    facts = (
        f"PyTorch {torch.__version__}, one thread, {datetime.date.today().isoformat()}, the least of {repeats} runs of "
        "each micro-batch, all arrangements in turns",
        f"`{shlex.join(['python', 'benchmarks/packing.py', *arguments])}`",
        f"load before the run: {busy:.1f} busy processes per core{noisy}",
    )
    with tempfile.TemporaryDirectory(prefix="packing-") as name:
        folder = Path(name)
        tables = {"Padding and work": (COUNTED, counted_table(folder))}
        print(tables["Padding and work"][1].text, flush=True)
        with quiet(folder):
            tables["Time and memory of a step"] = TIMED, timed_table(folder, sizes, repeats)
        print(tables["Time and memory of a step"][1].text, flush=True)
        tables["Dealing"] = DEALT, dealing_table()
        print(tables["Dealing"][1].text, flush=True)
    verdicts = [line for _, table in tables.values() for line in table.verdicts]
    for line in verdicts:
        print(": ".join(line).replace("**", ""))
    if options.docs:
        told = {"count": NUM_ROLLOUTS, "attention": ATTENTION_LENGTH, "sizes": sizes, "vocab": VOCAB}
        told |= {"ranks": max(TIMED_RANKS), "name": cpu_name(), "median": MEDIAN, "sigma": SIGMA, "longest": LONGEST}
        told["facts"] = "\n".join(f"- {fact}" for fact in facts)
        parts = [INTRODUCTION.format(**told), markdown_table(("target", "result here"), verdicts, left=2)]
        parts += [f"### {title}\n\n{text.format(**told)}\n\n{table.text}" for title, (text, table) in tables.items()]
        path = write_section(options.docs, "packing", f"packs, {cpu_name()}", "\n\n".join(parts))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
