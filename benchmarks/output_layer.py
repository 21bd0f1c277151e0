"""What rounding the logits of a 16-bit output layer to bf16 costs in precision, and float32 logits in time.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/output_layer.py

Hidden states and weight are made-up and bf16; they are the same for all, float64 included. Three ways to logits:

    bf16 logits       `rows @ weight.t()`, rounded to bf16
    float32 logits    the product of operands widened to float32 whole: what can be had from bf16 hidden states
    ours              `vocab_parallel.passes.logits_of`

Of each: the mean and largest |error| of log-prob, entropy and KL(policy || another) against float64, and the CPU
seconds for the logits of both policies and these three numbers. Then the times of single products, for fewer columns
(`--columns`, `--backward-columns`): on a CPU without bf16 arithmetic PyTorch takes minutes for all. Times are the least
of several runs, on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_erpd.vocab_parallel import LiveTarget, VocabShard, logits_of, token_terms
from megatron_erpd.vocab_parallel.passes import add_product, hidden_gradient

LOGITS_STD = 4.0
"""Then the largest of 152k logits is about 18, and the entropy a few nats."""
STEP_STD = 0.05
"""How far apart the policies' hidden states are, relative to their size: a KL of some hundredths of a nat."""

Logits = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--columns", type=int, default=8192, help="of the timed products")
    parser.add_argument("--backward-columns", type=int, default=1024)
    parser.add_argument("--only-products", action="store_true", help="times of products alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    if options.only_products:
        weight = torch.randn(options.columns, options.hidden, generator=draw).bfloat16()
        return products(weight, options.backward_columns, options.repeats)
    scale = LOGITS_STD / options.hidden**0.5
    weight = torch.empty(options.vocab, options.hidden, dtype=torch.bfloat16)
    for rows in weight.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=draw) * scale)
    hidden = torch.randn(options.tokens, options.hidden, generator=draw)
    other = (hidden + STEP_STD * torch.randn(hidden.shape, generator=draw)).bfloat16()
    hidden = hidden.bfloat16()
    tokens = torch.multinomial(in_float64(hidden, weight).softmax(-1), 1, generator=draw).squeeze(-1)
    precision(hidden, other, weight, tokens, options.repeats)
    products(weight[: options.columns], options.backward_columns, options.repeats)


def precision(hidden: Tensor, other: Tensor, weight: Tensor, tokens: Tensor, repeats: int) -> None:
    shard = VocabShard.dense(len(weight))

    def terms(logits: Logits) -> list[Tensor]:
        target = LiveTarget(logits(other, weight))
        return list(token_terms(logits(hidden, weight), shard, tokens, "reverse_kl", target))

    exact = terms(in_float64)
    means = ", ".join(
        f"{name} {value.mean():.3f}" for name, value in zip(("log-prob", "entropy", "KL"), exact, strict=True)
    )
    print(f"V = {len(weight):,}, h = {weight.shape[1]:,}, {len(hidden)} tokens; means in float64: {means}")
    print(f"{'':16}{'|log-prob error|':>22}{'|entropy error|':>22}{'|KL error|':>22}{'CPU s':>9}")
    for name, logits in {"bf16 logits": in_bf16, "float32 logits": in_float32, "ours": logits_of}.items():
        errors = [(found.double() - value).abs() for found, value in zip(terms(logits), exact, strict=True)]
        seconds = fastest(lambda logits=logits: terms(logits), repeats)  # type: ignore[misc]
        columns = "".join(f"{f'{error.mean():.1e} ({error.max():.1e})':>22}" for error in errors)
        print(f"{name:16}{columns}{seconds:9.2f}", flush=True)


def products(weight: Tensor, backward_columns: int, repeats: int) -> None:
    """Prints the times of single products: what widening the weight costs doesn't grow with the tokens."""
    draw = torch.Generator().manual_seed(1)
    print(f"logits of {len(weight):,} columns, CPU s" + f"{'bf16':>10}{'ours':>10}")
    for num_tokens in (16, 64, 256):
        hidden = torch.randn(num_tokens, weight.shape[1], generator=draw).bfloat16()
        times = [fastest(lambda f=f, x=hidden: f(x, weight), repeats) for f in (in_bf16, logits_of)]  # type: ignore[misc]
        print(f"{num_tokens:>5} tokens" + "".join(f"{seconds:10.3f}" for seconds in times), flush=True)
    weight = weight[:backward_columns]
    hidden = torch.randn(64, weight.shape[1], generator=draw).bfloat16()
    on_logits = torch.randn(len(hidden), len(weight), generator=draw).bfloat16()
    total = torch.zeros(weight.shape)
    pairs = {
        "hidden states' gradient": (lambda: on_logits @ weight, lambda: hidden_gradient(on_logits, weight)),
        "weight's gradient": (
            lambda: total.add_(on_logits.t() @ hidden),
            lambda: add_product(total, on_logits, hidden),
        ),
    }
    for name, (plain, ours) in pairs.items():
        seconds = f"bf16 {fastest(plain, 1):.3f}, ours {fastest(ours, repeats):.3f}"  # type: ignore[arg-type]
        print(f"{name}, {len(weight):,} columns, 64 tokens, CPU s: {seconds}", flush=True)


def in_bf16(rows: Tensor, weight: Tensor) -> Tensor:
    return rows @ weight.t()


def in_float32(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.float() @ weight.float().t()


def in_float64(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([rows.double() @ part.double().t() for part in weight.split(4096)], dim=-1)


def fastest(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
