"""The process behind the `math-verify` verifier: JSON lines in, JSON lines out.

In:  `{"gold": "\\\\frac{1}{2}", "response": "... \\\\boxed{0.5}"}`
Out: `{"score": 1.0}`, or `{"error": "..."}` where no verdict could be reached; `{"ready": true}` once at the start.

It has no time limits of its own: whoever started it keeps them. It imports nothing of the project, so it starts fast.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any


def judge(gold: str, response: str) -> float:
    """1.0 if the response's last answer equals `gold`, 0.0 if it differs or there is none.

    Raises:
        ValueError: `gold` can't be parsed.
        Exception: whatever the parsers and sympy raise.
    """
    from math_verify import parse, verify

    # Bare LaTeX is only found inside a delimiter; a gold answer that brings its own keeps it.
    marked = gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}"
    expected = parse(marked, parsing_timeout=None, raise_on_error=True)
    if not expected:
        raise ValueError(f"the answer {gold!r} can't be read as mathematics")
    found = parse(response, parsing_timeout=None, raise_on_error=True)
    if not found:
        return 0.0
    # The gold answer first: the comparison isn't symmetric.
    return float(verify(expected, found, timeout_seconds=None, raise_on_error=True))


def answer(line: str) -> dict[str, Any]:
    """The reply to one line."""
    try:
        question = json.loads(line)
        return {"score": judge(question["gold"], question["response"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # Replies get a descriptor of their own: a library that prints must not garble them.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.WARNING)
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
