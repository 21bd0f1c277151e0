"""The size of a cache against numbers worked out by hand."""

from __future__ import annotations

import pytest

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.sizes import cache_size

QWEN, LLAMA2, GEMMA = 151_936, 32_000, 262_208


@pytest.mark.parametrize(
    ("vocab_size", "k", "dtype", "expected"),
    [
        (QWEN, 64, "float16", 280),  # 64 x 2 + 64 x 2 + 16 + 8
        (QWEN, 64, "float32", 408),  # 64 x 4 + 64 x 2 + 16 + 8
        (QWEN, 1, "float16", 13),  # the high bits of one id take a whole byte
        (QWEN, 5, "float16", 30),  # and those of five ids take two
        (LLAMA2, 64, "float16", 264),
        (2**16, 64, "float16", 264),
        (2**16 + 1, 64, "float16", 280),
        (2**18, 64, "float16", 280),
        (GEMMA, 64, "float16", 328),  # 64 x 2 + 64 x 3 + 8
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
    assert size.bytes_per_token == 8 + 280 + 16_384
    # Keys of 48, an offset of 4 in each of the columns (5 of a target with high bits), 16 of the index.
    assert size.row_bytes["topk"] == 48 + 20 + 16
    assert size.bytes_per_row == 4 * 68 + 84


def test_what_no_cache_can_be() -> None:
    for match, values in {
        "kind: 'topq'": {"kind": "topq"},
        "policies": {"policies": []},
        "vocab_size: 16777217": {"vocab_size": 2**24 + 1},
        "topk_dtype: 'bfloat16'": {"topk_dtype": "bfloat16"},
        "k: 0": {"k": 0},
        "hidden_size": {"keep_hidden": True},
    }.items():
        with pytest.raises(CacheError, match=match):
            cache_size(**{"policies": ["base"], "kind": "topk", "vocab_size": QWEN, **values})  # type: ignore[arg-type]
