"""Do verifiers side by side score as fast as their number says?

    .venv/bin/python benchmarks/scoring.py

Times a verifier that takes 100 ms with one worker and with two, and `math-verify` in two workers against math-verify's
own calls in two processes, which keep no time and no order. Workers are started before the clock is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_erpd.sampling.prompts import PromptRecord  # noqa: E402
from megatron_erpd.sampling.verifiers import QUESTIONS_PER_WORKER, Question, Verifier  # noqa: E402

_SLOW = "import time\ndef score(record, response):\n    time.sleep(0.1)\n    return 1.0\n"
_BARE = """
import json, sys, time
from math_verify import parse, verify
questions = json.load(sys.stdin)
options = {"parsing_timeout": None}
verify(parse("1", **options), parse("1", **options), timeout_seconds=None)
started = time.monotonic()
for answer, response in questions:
    verify(parse(answer, **options), parse(response, **options), timeout_seconds=None)
print(time.monotonic() - started)
"""


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=int, default=200, help="responses for the slow verifier (default: 200)")
    parser.add_argument("--math", type=int, default=1000, help="responses for math-verify (default: 1000)")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many is told (default: 3)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slow.py"
        file.write_text(_SLOW)
        slow = [(_record("1"), "1")] * given.slow
        one, two = (seconds(Verifier(f"python:{file}:score", n), slow, given.repeats) for n in (1, 2))
    questions = math_questions(given.math)
    ours = seconds(Verifier("math-verify", 2), questions, given.repeats)
    bare = statistics.median(bare_math(questions) for _ in range(given.repeats))
    print("| responses | verifier | | seconds | ratio |\n|---|---|---|---|---|")
    print(f"| {given.slow} | 100 ms each | one worker | {one:.2f} | |")
    print(f"| {given.slow} | 100 ms each | two workers | {two:.2f} | {one / two:.2f} x as fast |")
    print(f"| {given.math} | math-verify | its own calls, two processes | {bare:.2f} | |")
    print(f"| {given.math} | math-verify | two workers | {ours:.2f} | {ours / bare:.2f} x the time |")


def _record(answer: str) -> PromptRecord:
    return PromptRecord(prompt="?", answer=answer, metadata={})


def math_questions(count: int) -> list[Question]:
    """Answers and responses with something to compare."""
    return [
        (
            _record(rf"\frac{{{n}}}{{{n + 3}}}"),
            rf"Thus $x = {n} / {n + 3}$, so it is \boxed{{\frac{{{2 * n}}}{{{2 * n + 6}}}}}",
        )
        for n in range(1, count + 1)
    ]


def seconds(verifier: Verifier, questions: list[Question], repeats: int) -> float:
    verifier.scores(questions[: 2 * QUESTIONS_PER_WORKER])
    found = []
    for _ in range(repeats):
        started = time.monotonic()
        verifier.scores(questions)
        found.append(time.monotonic() - started)
    return statistics.median(found)


def bare_math(questions: list[Question]) -> float:
    """The slower of two processes with half of the questions each."""
    pairs = [(f"${record['answer']}$", response) for record, response in questions]
    processes = [
        subprocess.Popen([sys.executable, "-c", _BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for place, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(json.dumps(pairs[place::2]))
        process.stdin.close()
    times = []
    for process in processes:
        assert process.stdout is not None
        times.append(float(process.stdout.read().split()[-1]))
        process.wait()
    return max(times)


if __name__ == "__main__":
    main()
