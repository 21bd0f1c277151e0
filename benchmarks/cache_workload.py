"""Models, rollouts and caches for `teacher_cache.py`, made for it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from megatron_erpd.data.rollouts import write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.teacher_cache.finalize import write_cache_file
from megatron_erpd.teacher_cache.format import INDEX_FILE, CacheIndex, CacheMeta, TableIndex

ROWS_OF_A_PART = 2000


@dataclass(frozen=True)
class Sizes:
    """Of the model and of the rollouts; `response` is the longest, lengths are spread evenly below it."""

    hidden: int
    layers: int
    vocab: int
    num_rollouts: int
    prompt: int
    response: int

    @property
    def multiplications_per_entry(self) -> int:
        """Of a token's forward pass, attention's scores apart, for each entry of the vocabulary. What a target costs
        beyond the forward passes goes with the entries, so this says how much it weighs beside them."""
        return round(12 * self.layers * self.hidden**2 / self.vocab + self.hidden)

    def __str__(self) -> str:
        model = f"{self.layers} layers of {self.hidden}, vocabulary {self.vocab:,}"
        return f"{model}; {self.num_rollouts} rollouts of up to {self.prompt} + {self.response} tokens"


def make_policies(root: Path, sizes: Sizes) -> None:
    """`base`, `teacher` and `rollouts.parquet` in a folder."""
    from megatron_erpd.commands.import_checkpoint import import_checkpoint

    for name, noise in (("base", 0.0), ("teacher", 0.002)):
        _write_model(root / f"hf-{name}", sizes, noise)
        import_checkpoint(["--hf", f"{root}/hf-{name}", "--output", f"{root}/{name}"])
    generator = np.random.default_rng(0)
    write_rollouts(
        root / "rollouts.parquet",
        (
            Rollout(
                prompt_token_ids=generator.integers(0, sizes.vocab, sizes.prompt),
                response_token_ids=generator.integers(
                    0, sizes.vocab, generator.integers(sizes.response // 4, sizes.response + 1)
                ),
                group_id=i // 4,
                reward=float(i % 2),
            )
            for i in range(sizes.num_rollouts)
        ),
    )


def make_caches(root: Path, micro_batch_size: int) -> None:
    """`base-log-probs` and `cache` of what `make_policies` made."""
    from megatron_erpd.commands.precompute import precompute

    data = ["--base", f"{root}/base", "--rollouts", f"{root}/rollouts.parquet"]
    data += ["--micro-batch-size", str(micro_batch_size)]
    precompute([*data, "--kind", "token", "--output", f"{root}/base-log-probs"])
    target = ["--policy", f"teacher={root}/teacher", "--delta", "0.05", "--keep-hidden"]
    precompute([*data, *target, "--output", f"{root}/cache"])


def _write_model(folder: Path, sizes: Sizes, noise: float) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=3 * sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // 64,
            num_key_value_heads=max(1, sizes.hidden // 128),
            head_dim=64,
            max_position_embeddings=sizes.prompt + sizes.response,
            initializer_range=0.05,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    model.save_pretrained(folder)


def open_many_rows(folder: Path, num_rows: int) -> tuple[float, float, float]:
    """Seconds, growth of the resident memory and all of it, in bytes, for opening a cache of so many rows and looking
    for one; in a process of its own.

    The rows are synthetic: an index of the real size, and parts that are listed and would be opened when one of their
    rows is found.
    """
    meta = CacheMeta("token", ("base",), {"base": "synthetic"}, 151_936)
    table = folder / "log_probs.base"
    table.mkdir(parents=True)
    hashes = np.sort(np.random.default_rng(0).integers(0, 2**64, num_rows, dtype=np.uint64))
    number = np.arange(num_rows)
    part, row = (number // ROWS_OF_A_PART).astype(np.uint32), (number % ROWS_OF_A_PART).astype(np.uint32)
    fields = (("hash", pa.uint64()), ("part", pa.uint32()), ("row", pa.uint32()))
    schema = pa.schema([pa.field(n, t, nullable=False) for n, t in fields], {b"salt": b"0"})
    with pa.OSFile(str(table / INDEX_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        arrays = [pa.array(values) for values in (hashes, part, row)]
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    parts = [
        {
            "name": f"log_probs.base/part-00000-{i:05d}.arrow",
            "num_rows": ROWS_OF_A_PART,
            "num_tokens": 1000 * ROWS_OF_A_PART,
            "bytes": 4096 * ROWS_OF_A_PART,
            "sha256": "0" * 64,
        }
        for i in range(-(-num_rows // ROWS_OF_A_PART))
    ]
    index = CacheIndex(meta, {"log_probs.base": TableIndex(parts, num_rows, 1000 * num_rows)})
    write_cache_file(folder, index)
    done = subprocess.run([sys.executable, "-c", _OPEN, str(folder)], capture_output=True, text=True, check=True)
    seconds, before, after = json.loads(done.stdout)
    return seconds, after - before, after


_OPEN = """
import json, os, sys, time
from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.reader import CacheReader

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before, start = resident(), time.perf_counter()
cache = CacheReader(sys.argv[1])
try:
    cache.token_row("base", "a sample that isn't there")
except CacheError:
    pass
print(json.dumps([time.perf_counter() - start, before, resident()]))
"""
