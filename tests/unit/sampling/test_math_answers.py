"""Answers as data sets publish them against responses as models write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.math_answers import answer_text, math_scorer
from megatron_erpd.sampling.prompts import load_prompts

Score = Callable[[Any, str], float]


@pytest.fixture(scope="module")
def score() -> Score:
    return math_scorer()


def boxed(answer: str) -> str:
    return f"So it is $\\boxed{{{answer}}}$."


# Answers as they stand in MATH-500 and OlympiadBench, or as others of their form do, each with a wrong one of the same
# form.
PUBLISHED = [
    (r"\left( 3, \frac{\pi}{2} \right)", r"\left( 3, \frac{\pi}{3} \right)"),
    (r"p - q", r"q - p"),
    (r"\frac{14}{3}", r"\frac{14}{5}"),
    (r"\frac34", r"\frac43"),
    (r"\frac 59", r"\frac 57"),
    (r"\dfrac{2}{21}", r"\dfrac{2}{19}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{271}7\text{ degrees}"),
    (r"137 \frac{1}{2}", r"137 \frac{1}{3}"),
    (r"9", r"8"),
    (r"-50", r"50"),
    (r"0", r"1"),
    (r"0.09", r"0.9"),
    (r".35", r".36"),
    (r"0.\overline{3}", r"0.3"),
    (r"\text{Evelyn}", r"\text{Carla}"),
    (r"\text{east}", r"\text{west}"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{(C)}", r"\text{(D)}"),
    (r"\text{no solution}", r"\text{one solution}"),
    (r"90^\circ", r"80^\circ"),
    (r"3\sqrt{13}", r"3\sqrt{11}"),
    (r"11\sqrt2", r"11\sqrt3"),
    (r"\sqrt[3]{2}", r"\sqrt[3]{3}"),
    (r"6 - 5i", r"6 + 5i"),
    (r"\pi", r"2\pi"),
    (r"x=5", r"x=6"),
    (r"y = 2x + 3", r"y = 2x + 4"),
    (r"1,-2", r"1,2"),
    (r"3, 5, 7", r"3, 5, 9"),
    (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{17}"),
    (r"\frac{1 \pm \sqrt{5}}{4}", r"\frac{1 \pm \sqrt{3}}{4}"),
    (r"4 \text{ and } 6", r"4 \text{ and } 7"),
    (r"52_8", r"52_7"),
    (r"4210_{5}", r"4211_{5}"),
    (r"(6,31,-1)", r"(6,31,1)"),
    (r"(15,-29)", r"(14,-29)"),
    (r"(2,1)", r"(5,3)"),
    (r"(1,8,19), (2,7,13), (4,5,7)", r"(1,8,19), (2,7,13), (4,5,8)"),
    (r"11,\! 111,\! 111,\! 100", r"11,\! 111,\! 111,\! 101"),
    (r"10,000", r"1,000"),
    (r"864 \mbox{ inches}^2", r"865 \mbox{ inches}^2"),
    (r"15\mbox{ cm}^2", r"16\mbox{ cm}^2"),
    (r"5.4 \text{ cents}", r"5.5 \text{ cents}"),
    (r"\$32,\!348", r"\$32,\!349"),
    (r"\$18.90", r"\$18.91"),
    (r"10\%", r"11\%"),
    (r"8 \%", r"80 \%"),
    (r"3R^2", r"3R^3"),
    (r"(3,4]", r"[3,4]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty, 2) \cup (4, \infty)"),
    (r"x \in [-2,7]", r"x \in (-2,7]"),
    (r"-1<k<0", r"-1<k<1"),
    (r"x \le -1 \text{ or } x \ge 3", r"x \le -1 \text{ or } x \ge 4"),
    (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{pmatrix} -2 \\ -14 \\ 7 \end{pmatrix}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -17/5 \end{pmatrix}"),
    (r"x^3+3x-6", r"x^3+3x+6"),
    (r"(x - 5)(x^2 - 4x + 7)", r"(x - 5)(x^2 - 4x + 8)"),
    (r"\tan x", r"\cot x"),
    (r"6:15", r"6:51"),
    (r"2^{1998}", r"2^{1999}"),
    (r"\log _{2} 3", r"\log _{3} 2"),
    (r"\infty", r"-\infty"),
    (r"\emptyset", r"(2,1)"),
    (r"\{1, 2, 3\}", r"\{1, 2, 4\}"),
    (r"f(x)=2x+1", r"f(x)=2x+2"),
    (r"\frac{1}{2 n+2}", r"\frac{1}{2 n+1}"),
    (r"\lfloor\frac{n}{2}\rfloor+1", r"\lfloor\frac{n}{2}\rfloor"),
    (r"\binom{2 n}{n}", r"\binom{2 n}{2}"),
    (r"$k\left(4 k^{2}+k-1\right) / 2$", r"k\left(4 k^{2}+k+1\right) / 2"),
    (r"$8 \%$", r"9 \%"),
    (r"$2$, $3$", r"2,4"),
    (r"$4.7 \times 10^{-7}$", r"4.8 \times 10^{-7}"),
    (r"10^{-20}", r"10^{-21}"),
]


@pytest.mark.parametrize(("answer", "wrong"), PUBLISHED)
def test_published_answers_verify_themselves_and_no_others(score: Score, answer: str, wrong: str) -> None:
    assert score(answer, boxed(answer)) == 1.0
    assert score(answer, boxed(wrong)) == 0.0


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        # money
        *((money, boxed("36"), 1.0) for money in (r"\$36", r"\text{\$}36", r"\mathrm{\$} 36", r"36\$", "$36", "$36$")),
        *((r"\$36", response, 1.0) for response in (boxed(r"\$36"), "It costs \\$36.", "It costs $36.")),
        (r"\$36", boxed("35"), 0.0),
        (r"-\$5", boxed("-5"), 1.0),
        (r"-\$5", boxed("5"), 0.0),
        ("36", boxed(r"\text{\$}36"), 1.0),
        (r"$36$ dollars", boxed("36"), 1.0),
        # numbers of JSON
        *((1e-5, boxed(text), 1.0) for text in ("0.00001", "10^{-5}", "1e-5", r"\frac{1}{100000}")),
        *((1e-5, boxed(text), 0.0) for text in ("e-5", "0", "0.000011", "-0.00001")),
        (2.5e-7, boxed(r"2.5 \times 10^{-7}"), 1.0),
        (2.5e-7, boxed(r"2.4 \times 10^{-7}"), 0.0),
        (1e16, boxed("10000000000000000"), 1.0),
        (6.02e23, boxed(r"6.02 \times 10^{23}"), 1.0),
        (6.02e23, boxed(r"6.03 \times 10^{23}"), 0.0),
        (2**53 + 1, boxed(str(2**53 + 1)), 1.0),
        (2**53 + 1, boxed(str(2**53)), 0.0),
        (-3, boxed("-3"), 1.0),
        (42.0, boxed("42"), 1.0),
        (-0.0, boxed("0"), 1.0),
        (0.1 + 0.2, boxed("0.3"), 1.0),
        (Decimal("1E-5"), boxed("0.00001"), 1.0),
        ("1e-05", boxed("0.00001"), 1.0),
        # the last box
        ("42", r"First I get \boxed{41}. No: 6*7 = 42, so the final answer is \boxed{42}", 1.0),
        ("41,42", r"First I get \boxed{41}. No: 6*7 = 42, so the final answer is \boxed{42}", 0.0),
        ("42", "I get \\boxed{41}.\n\n\\boxed{42}", 1.0),
        ("41", r"\boxed{41} and \boxed{42}", 0.0),
        ("42", r"\[\boxed{41}\] \[\boxed{42}\]", 1.0),
        ("42", r"\fbox{41}, no, \boxed{42}", 1.0),
        ("42", r"\boxed 41, no, \boxed 42.", 1.0),
        ("42", r"\boxed{42}, which goes into \boxed{}.", 1.0),
        ("42", r"\boxed{42}, or rather \boxed{43", 1.0),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}, no, \boxed{\frac{1}{3}}", 0.0),
        ("2,3", r"\boxed{2,3}", 1.0),
        ("42", r"\boxed{42}. Check: $6 \cdot 7 = 42$ and $1 + 1 = 2$.", 1.0),
        ("42", r"\boxed{42}. The final answer is correct, as $6 > 5$.", 1.0),
        ("43", r"\boxed{42}. Wait. The final answer is $43$, not 42.", 1.0),
        ("42", r"\boxed{42}. Wait. The final answer is 43, not 42.", 0.0),
        # the same answer written otherwise
        (r"\text{(C)}", boxed("C"), 1.0),
        ("C", boxed(r"\textbf{(C)}"), 1.0),
        (r"\text{Evelyn}", boxed("Evelyn"), 1.0),
        ("52_8", boxed("52"), 1.0),
        ("52_8", boxed("52_{8}"), 1.0),
        (r"137 \frac{1}{2}", boxed("137.5"), 1.0),
        ("1 1/2", boxed("11/2"), 0.0),
        (r"864 \mbox{ inches}^2", boxed(r"864 \text{ in}^2"), 1.0),
        (r"(3,\frac{1}{2})", boxed("(3,0.5)"), 1.0),
        ("1,3", boxed("3,1"), 1.0),
        ("9 * 2 = <<9*2=18>>18 a day.\n#### 18", "He makes 18 a day.\n#### 18", 1.0),
        (r"It is \boxed{\frac12}.", boxed("0.5"), 1.0),
    ],
)
def test_the_reward_of_a_response(score: Score, answer: Any, response: str, reward: float) -> None:
    assert score(answer, response) == reward


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "there is no answer"),
        (True, "the answer is true"),
        (["2"], r'the answer is a list; write one text, as "answer": "2"'),
        (["2", "3"], r'a list; write one text, as "answer": "2,3"'),
        ([], "the answer is a list"),
        ([{"value": 3}], "the answer is a list"),
        ({"value": 3}, "the answer is an object"),
        ("", "can't be read as mathematics"),
        ("$ $", "can't be read as mathematics"),
        (r"\$", "can't be read as mathematics"),
    ],
)
def test_what_is_no_answer_is_refused_where_prompts_are_read(tmp_path: Any, answer: Any, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": answer}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match=rf"(?s)prompts.jsonl.*2: .*{message}"):
        load_prompts(file, verifier="math-verify")
    assert len(load_prompts(file, verifier="python:a.py:f")) == len(load_prompts(file)) == 2


@pytest.mark.parametrize("answer", [float("nan"), float("-inf"), Decimal("NaN"), b"1"])
def test_what_no_file_gives_is_refused_too(answer: Any) -> None:
    with pytest.raises(ValueError, match="not a number|not mathematics"):
        answer_text(answer)
