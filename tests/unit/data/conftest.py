"""Small random rollouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts


def random_rows(num_rows: int, seed: int = 0, vocab_size: int = 50) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        response = rng.integers(0, vocab_size, rng.integers(1, 12))
        rows.append(
            {
                "prompt_token_ids": rng.integers(0, vocab_size, rng.integers(1, 6)),
                "response_token_ids": response,
                "group_id": i // 4,
                "reward": None if i % 7 == 0 else float(i % 2),
                "behavior_log_probs": -rng.random(response.size) if i % 3 else None,
                "finish_reason": "stop" if i % 2 else None,
                "prompt": f"prompt {i}",
                "response": f"response {i}",
                "metadata": {"answer": i} if i % 2 else {},
            }
        )
    return rows


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    return random_rows


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    write_rollouts(tmp_path / "fixture.parquet", random_rows(30), {"tokenizer_digest": "tok"}, row_group_rows=7)
    return read_rollouts(tmp_path / "fixture.parquet")
