"""The size of a cache against numbers worked out by hand, and against files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache import CacheMeta, CacheWriter, finalize
from megatron_erpd.teacher_cache.sizes import cache_size

QWEN, LLAMA2, GEMMA = 151_936, 32_000, 262_208


@pytest.mark.parametrize(
    ("vocab_size", "k", "dtype", "expected"),
    [
        (QWEN, 64, "float16", 277),  # 64 x 2 + 64 x 2 + 13 + 8
        (QWEN, 64, "float32", 405),  # 64 x 4 + 64 x 2 + 13 + 8
        (QWEN, 1, "float16", 13),  # the digit of one id takes a whole byte
        (QWEN, 5, "float16", 29),  # and those of five ids no more
        (QWEN, 6, "float16", 34),
        (LLAMA2, 64, "float16", 264),
        (2**16, 64, "float16", 264),
        (2**16 + 1, 64, "float16", 272),  # 64 x 2 + 64 x 2 + 8 + 8
        (2**18, 64, "float16", 280),
        (GEMMA, 64, "float16", 286),  # 64 x 2 + 64 x 2 + 22 + 8
        (17, 64, "float32", 110),  # 17 entries are the whole vocabulary
    ],
)
def test_a_target(vocab_size: int, k: int, dtype: str, expected: int) -> None:
    size = cache_size(["base"], "topk", vocab_size=vocab_size, k=k, topk_dtype=dtype)
    assert size.token_bytes == {"log_probs.base": 4, "topk": expected}
    assert size.bytes_per_token == expected + 4


def test_log_probs_of_three_policies() -> None:
    size = cache_size(["base", "teacher", "unlearned"], "token", vocab_size=QWEN)
    assert size.bytes_per_token == 12
    assert size.row_bytes == dict.fromkeys(("log_probs.base", "log_probs.teacher", "log_probs.unlearned"), 52 + 16)
    assert size.total(num_rows=1000, num_tokens=500_000) == 6_000_000 + 204_000


def test_hidden_states_of_two_policies() -> None:
    size = cache_size(["base", "teacher"], "topk", vocab_size=QWEN, keep_hidden=True, hidden_size=4096)
    assert size.token_bytes["hidden.base"] == size.token_bytes["hidden.teacher"] == 8192
    assert size.bytes_per_token == 8 + 277 + 16_384
    # Keys of 48, an offset of 4 in each of the columns (5 of a target with high bits), 16 of the index.
    assert size.row_bytes["topk"] == 48 + 20 + 16
    assert size.bytes_per_row == 4 * 68 + 84


def test_what_no_cache_can_be() -> None:
    cases: dict[str, dict[str, Any]] = {
        "kind: 'topq'": {"kind": "topq"},
        "policies": {"policies": []},
        "vocab_size: 16777217": {"vocab_size": 2**24 + 1},
        "topk_dtype: 'bfloat16'": {"topk_dtype": "bfloat16"},
        "k: 0": {"k": 0},
        "hidden_size": {"keep_hidden": True},
    }
    for match, values in cases.items():
        with pytest.raises(CacheError, match=match):
            cache_size(**{"policies": ["base"], "kind": "topk", "vocab_size": QWEN, **values})


NUM_ROWS, NUM_TOKENS, WIDTH = 300, 1024, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 300 rollouts of 1,024 response tokens, V = 151,936, K = 64, in parts of 32 MiB."""
    meta = CacheMeta(
        "topk", ("base",), {"base": "b" * 64}, QWEN, signal="strong", projection={"delta": 0.5}, k=64,
        tokenizer_digest="t" * 64, chat_template_digest="c" * 64, hidden_size=WIDTH, hidden_dtype="bfloat16",
    )  # fmt: skip
    root = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    log_probs = -np.sort(rng.exponential(size=(NUM_TOKENS, 64)))
    log_probs += np.log(0.9) - np.log(np.exp(log_probs).sum(-1, keepdims=True))
    indices = np.argsort(rng.random((NUM_TOKENS, 2374)), axis=-1)[:, :64] * 64
    target = {"indices": indices, "log_probs": log_probs, "tail_log_prob": np.full(NUM_TOKENS, np.log(0.1))}
    described = {"eta": np.ones(NUM_TOKENS), "target_kl": np.ones(NUM_TOKENS)}
    hidden = torch.from_numpy(rng.normal(size=(NUM_TOKENS, WIDTH)))
    with CacheWriter(root, meta, part_bytes=32 * 2**20) as writer:
        for i in range(NUM_ROWS):
            key = f"{i:032x}", i
            writer.write_log_probs("base", *key, log_probs[:, 0])
            writer.write_topk(*key, **target, **described)
            writer.write_hidden("base", *key, hidden, "d" * 64)
    finalize(root, meta)
    return root


@pytest.mark.parametrize(("table", "payload"), [("log_probs.base", 4), ("topk", 277), ("hidden.base", 2 * WIDTH)])
def test_files_are_as_large_as_predicted(table: str, payload: int, folder: Path) -> None:
    """Everything in a table's folder: the payload is as it should be, and all else is little."""
    files = sum(path.stat().st_size for path in (folder / table).iterdir())
    size = cache_size(["base"], "topk", vocab_size=QWEN, keep_hidden=True, hidden_size=WIDTH)
    predicted = size.row_bytes[table] * NUM_ROWS + size.token_bytes[table] * NUM_ROWS * NUM_TOKENS
    assert size.token_bytes[table] == payload
    assert files == pytest.approx(predicted, rel=0.01)
    per_token = files / (NUM_ROWS * NUM_TOKENS)
    print(f"{table}: {per_token:.4f} bytes per token, {per_token / payload - 1:.3%} more than the payload")
    assert per_token < payload * (1.02 if payload == 4 else 1.002)
