"""What attention costs in time and memory without Transformer Engine: ours against Megatron's `DotProductAttention`.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/attention.py

One layer's attention of one causal sequence, forward and backward, on one thread of a CPU. Each length and each way
runs in a process of its own, whose memory is the largest it had above that before the first call; times are the least
of several runs. A last line has a pack of short sequences of the same number of tokens, which ours takes as segments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_erpd import platform

HEADS, GROUPS, HEAD_DIM = 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{HEADS} heads, {GROUPS} groups, {HEAD_DIM} wide, fp32, forward and backward")
    print(f"{'tokens':>8}{'Megatron s':>12}{'ours s':>9}{'ratio':>7}{'Megatron MiB':>14}{'ours MiB':>10}{'ratio':>7}")
    for length in options.lengths:
        found = [measured(ours, (length,), options.repeats) for ours in (False, True)]
        (their_seconds, their_bytes), (seconds, most) = found
        print(
            f"{length:>8}{their_seconds:12.3f}{seconds:9.3f}{seconds / their_seconds:7.2f}"
            f"{their_bytes / 2**20:14.0f}{most / 2**20:10.0f}{most / their_bytes:7.3f}",
            flush=True,
        )
    length = options.lengths[-1]
    seconds, most = measured(True, (length // 16,) * 16, options.repeats)
    print(f"{length:>8} in 16 segments{seconds:14.3f}{'':21}{most / 2**20:10.0f}")


def measured(ours: bool, lengths: tuple[int, ...], repeats: int) -> tuple[float, int]:
    """Seconds and bytes, of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (ours, lengths, repeats))


def measure(ours: bool, lengths: tuple[int, ...], repeats: int) -> tuple[float, int]:
    platform.enable_cpu()
    torch.set_num_threads(1)
    attention = causal(lengths) if ours else megatrons()
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), 1, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    upstream = torch.randn(sum(lengths), 1, HEADS * HEAD_DIM, generator=draw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        attention(*inputs).backward(upstream)
        times.append(time.perf_counter() - start)
    return min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def causal(lengths: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from megatron_erpd.model.attention import causal_attention

    return lambda query, key, value: causal_attention(query, key, value, lengths, HEAD_DIM**-0.5)


def megatrons():  # type: ignore[no-untyped-def]
    import os

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=False,
    )
    core = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    return lambda query, key, value: core(query, key, value, None)


if __name__ == "__main__":
    main()
