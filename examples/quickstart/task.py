"""The quickstart's task: chain sums with written running sums, and its verifier.

A problem is a list of two-digit numbers. The response writes the running sum after every addition, so the last one
is the answer. All numbers are written with the least significant digit first, which lets a causal model carry:

    prompt    54+78+63=          (45 + 87 + 36)
    response  231 861            (132, then 168)

Demonstrations are wrong on purpose: in each addition all carries are dropped with probability `carry_drop`. A base
model trained on them errs systematically, in a way that a policy can unlearn from rewards alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

CHARACTERS = "0123456789+= "
"""Every character of a prompt or a response; the tokenizer knows no other."""

SMALLEST, LARGEST = 10, 99


@dataclass(frozen=True)
class Problem:
    """The summands of one chain sum, in the order in which they are added."""

    summands: tuple[int, ...]
    aligned: bool = False
    """Whether summands are written as wide as the sums, so that every addition reads its summand at the same distance.

    Without it the distance grows with every addition, which a small model hardly learns beyond a few of them.
    """

    @property
    def width(self) -> int:
        """Digits of every running sum: enough for the largest sum of this many summands."""
        return len(str(LARGEST * len(self.summands)))

    @property
    def prompt(self) -> str:
        width = self.width if self.aligned else 1
        return "+".join(_digits(number, width) for number in self.summands) + "="

    @property
    def answer(self) -> str:
        """The sum, least significant digit first, filled with zeros to `width`."""
        return _digits(sum(self.summands), self.width)

    def record(self) -> dict[str, object]:
        """The problem as a line of a prompts file."""
        return {"prompt": self.prompt, "answer": self.answer, "metadata": {"summands": list(self.summands)}}


def solve(problem: Problem, carry_drop: float = 0.0, rng: random.Random | None = None) -> str:
    """The response to a problem; each addition drops all of its carries with probability `carry_drop`."""
    total, sums = problem.summands[0], []
    for number in problem.summands[1:]:
        dropped = rng is not None and rng.random() < carry_drop
        total = _add_without_carry(total, number, problem.width) if dropped else total + number
        sums.append(_digits(total, problem.width))
    return " ".join(sums)


def score(record: dict[str, object], response: str) -> float:
    """1.0 if the response's last number is the record's `answer`, digit by digit, else 0.0."""
    numbers = response.split(" ")
    return float(numbers[-1] == record["answer"])


def distinct_problems(rng: random.Random, num_summands: int, aligned: bool = False) -> Iterator[Problem]:
    """Random problems, none of them twice.

    Raises `ValueError` for fewer than two summands. It never ends: take no more than the 90 ** num_summands there are.
    """
    if num_summands < 2:
        raise ValueError(f"a chain sum needs at least 2 summands, got {num_summands}")
    seen: set[tuple[int, ...]] = set()
    while True:
        summands = tuple(rng.randint(SMALLEST, LARGEST) for _ in range(num_summands))
        if summands not in seen:
            seen.add(summands)
            yield Problem(summands, aligned)


def _digits(number: int, width: int) -> str:
    return str(number).zfill(width)[::-1]


def _add_without_carry(left: int, right: int, width: int) -> int:
    return sum((left // 10**place + right // 10**place) % 10 * 10**place for place in range(width))
