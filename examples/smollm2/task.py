"""Sums and differences of two digits, written as text to go on with: after a few solved ones, `7 + 5 =`.

The problems are reasoning-gym's `chain_sum`. The model sees no chat here: asked in one, a model of this size answers at
length and seldom to the point, while in a list of solved problems it knows what comes next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SOLVED = "3 + 4 = 7\n9 + 6 = 15\n2 - 5 = -3\n"
"""What every prompt begins with."""

NUM_PROBLEMS = 200
"""Ten digits, twice, and two signs."""

_FIRST_NUMBER = re.compile(r"\s*(-?\d+)")
_CHUNK = 512


def problems(seed: int) -> Iterator[dict[str, Any]]:
    """Records of all problems, in an order that the seed decides."""
    import reasoning_gym

    seen: set[str] = set()
    while len(seen) < NUM_PROBLEMS:
        options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        for entry in reasoning_gym.create_dataset("chain_sum", size=_CHUNK, seed=seed, **options):
            expression = entry["metadata"]["expression"]
            if expression not in seen:
                seen.add(expression)
                yield {
                    "prompt": f"{SOLVED}{expression} =",
                    "answer": entry["answer"],
                    "metadata": {"expression": expression},
                }
        seed += 1


def score(record: dict[str, Any], response: str) -> float:
    """1.0 if the response begins with the answer, else 0.0; what comes after the number does not count."""
    found = _FIRST_NUMBER.match(response)
    return float(found is not None and found[1] == record["answer"])
