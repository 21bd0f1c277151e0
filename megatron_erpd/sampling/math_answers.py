"""Mathematical answers: a prompt's `answer` as LaTeX, the answer that a response ends with, and whether they are equal.

The comparison itself is math-verify's. What stands here is what it leaves open: answers that JSON holds as numbers,
dollar signs that are money, which of several boxes counts, the base of a numeral, and numbers too small for its
rounding to six decimals.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

MATH_VERIFY = "math-verify"

_MONEY = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{\s*\\\$\s*\}|(?<!\\)\\\$|\\textdollar(?![A-Za-z])")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
_BETWEEN_PARTS = re.compile(r"(?:\s|[,;.]|\b(?:and|or)\b)*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;:> ]|\\q?quad(?![A-Za-z])|\\(?:left|right|displaystyle)(?![A-Za-z])|~|\{(?=,\})|(?<=,)\}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_BASE = re.compile(r"[0-9A-Za-z]+_\{?(\d+|\\text\{\w+\})\}?")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_UNBRACED = re.compile(r"[^\s$\\{}]*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}")
_ANNOUNCED = re.compile(
    r"final\s+answer(?:\s+to\s+[^.\n]{0,80}?)?\s+is:?\s*"
    r"(\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]|[-+]?(?:\\?\$)?\d(?:[\d,./]*\d)?)",
    re.IGNORECASE,
)

_SMALL = 1e-3
"""Numbers below it are compared by their significant digits: math-verify rounds to six decimals."""
_SMALL_TOLERANCE = 1e-3
_FLOAT_TOLERANCE = 1e-12
"""Of their size, how far equal numbers may be apart when one has a decimal point: rounding says nothing of 6.02e23."""


def answer_text(answer: Any) -> str:
    """A prompt's answer as LaTeX without delimiters around it, except where text stands between several formulas.

    A number is written out without an exponent; `\\$36`, `36\\$` and `$36` are 36; of `#### 18` at the end of a
    solution, as GSM8K has it, the 18 remains.

    Raises:
        ValueError: it is nothing that a response can be compared with; the message says what to write instead.
    """
    if answer is None:
        raise ValueError('there is no answer to compare with; write it as text, as "answer": "42"')
    if isinstance(answer, list | tuple):
        parts = [part for part in answer if isinstance(part, str | int | float) and not isinstance(part, bool)]
        example = ",".join(map(str, parts)) if parts and len(parts) == len(answer) else "2,3"
        raise ValueError(f'the answer is a list; write one text, as "answer": "{example}"')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        raise ValueError(
            f'the answer is {_kind(answer)}, not mathematics; write it as text, as "answer": "42" or '
            '"answer": "\\\\text{Yes}"'
        )
    text = answer if isinstance(answer, str) else _decimal(answer)
    box = _last_box(text)
    found = _without_dollars(box.content if box else text.rpartition("####")[2])
    if not found.strip(" .,;{}"):
        raise ValueError(f"the answer {text!r} can't be read as mathematics")
    return found


def math_scorer() -> Callable[[Any, str], float]:
    """A function from a prompt's answer and a response to 1.0 or 0.0; `ImportError` without math-verify."""
    from math_verify import parse, verify

    def read(latex: str) -> Any:
        # Bare LaTeX is only found inside a delimiter. Its own time limits use SIGALRM, which doesn't reach into C code.
        marked = latex if "$" in latex else f"\\boxed{{{latex}}}"
        return parse(marked, parsing_timeout=None, raise_on_error=True)

    def score(answer: Any, response: str) -> float:
        gold = answer_text(answer)
        given = response_answer(response)
        if given is not None and _plain(gold) == _plain(given):
            return 1.0
        expected = read(gold)
        if not expected:
            raise ValueError(f"the answer {answer!r} can't be read as mathematics")
        if given is not None and _other_base(gold, given):
            return 0.0
        text = _MONEY.sub("", response)
        found = read(given) if given is not None else parse(text, parsing_timeout=None, raise_on_error=True)
        # The gold answer first: the comparison isn't symmetric.
        equal = bool(found) and verify(expected, found, timeout_seconds=None, raise_on_error=True)
        return float(_numbers_agree(expected[0], found[0] if found else None, equal))

    return score


def response_answer(response: str) -> str | None:
    """The content of the last `\\boxed{}` (or `\\fbox{}`) of a response that isn't empty, or a "final answer is" behind
    it; None where there is neither. A box that was cut off is none."""
    box = _last_box(response)
    if box is None:
        return None
    announced = _ANNOUNCED.findall(response, box.end)
    return _without_dollars(announced[-1] if announced else box.content)


def _decimal(number: int | float | Decimal) -> str:
    value = Decimal(float.__repr__(number) if isinstance(number, float) else number)
    if not value.is_finite():
        raise ValueError(f'the answer is {value}, not a number; write it as text, as "answer": "\\\\infty"')
    text = format(value, "f")
    return text.removesuffix(".0")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


class _Box(NamedTuple):
    content: str
    end: int


def _last_box(text: str) -> _Box | None:
    for match in reversed(list(_BOX.finditer(text))):
        if text.startswith("{", match.end()):
            content = _braced(text, match.end())
        else:
            content = _UNBRACED.match(text, match.end())[0]  # type: ignore[index]  # it matches the empty text too
        if content is not None and content.strip():
            return _Box(content, match.end() + len(content))
    return None


def _braced(text: str, start: int) -> str | None:
    """What stands in the braces that open at `start`; None where they don't close."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return None


def _without_dollars(latex: str) -> str:
    """Without money signs, and without math delimiters where nothing but formulas and their separators stands."""
    text = _DELIMITER.sub("$", _MONEY.sub("", latex)).replace("$$", "$").strip()
    outside = text.split("$")[::2]
    alone = text.count("$") == 1
    text = text.replace("$", "") if alone or all(map(_BETWEEN_PARTS.fullmatch, outside)) else text
    # As programs write numbers: LaTeX would read the e as Euler's.
    return format(Decimal(text), "f") if _EXPONENT.fullmatch(text) else text


def _plain(latex: str) -> str:
    """As it is compared by its letters: without what only changes how it looks."""
    text = _TEXT.sub(r"\1", latex).replace("$", "")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _SPACING.sub("", text))
    return _SPACE.sub("", text.strip().removesuffix("."))


def _other_base(gold: str, given: str) -> bool:
    """Whether both are numerals with a base and the bases differ: math-verify doesn't read it."""
    bases = [match[1] if match else None for match in (_BASE.fullmatch(_plain(text)) for text in (gold, given))]
    return None not in bases and bases[0] != bases[1]


def _numbers_agree(gold: Any, given: Any, equal: bool) -> bool:
    """math-verify's verdict, corrected for numbers whose size makes six decimals too few or too many."""
    from sympy import Basic, Float

    try:
        expected, found = complex(gold), complex(given)
        distance = abs(found - expected)
    except (TypeError, ValueError, OverflowError):
        return equal  # not both are numbers that a float can hold
    if 0 < abs(expected) < _SMALL:
        return equal and distance <= _SMALL_TOLERANCE * abs(expected)
    inexact = any(value.has(Float) for value in (gold, given) if isinstance(value, Basic))
    return equal or (inexact and distance <= _FLOAT_TOLERANCE * abs(expected))
