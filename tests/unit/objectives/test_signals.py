"""The signal's little language, its values at the edges of a vocabulary, and token advantages."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.signals import (
    ONE_SIDED_SIGNAL,
    SignalTerm,
    combine,
    parse_signal,
    policies_of,
    token_advantages,
)
from tests.tolerances import FLOAT64

INF = math.inf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("strong", [(1.0, "teacher", "base")]),
        ("unlearned", [(1.0, "teacher", "unlearned")]),
        ("contrast", [(1.0, "base", "unlearned")]),
        (" teacher / base ", [(1.0, "teacher", "base")]),
        ("0.7*teacher/base + 0.3*base/unlearned", [(0.7, "teacher", "base"), (0.3, "base", "unlearned")]),
        ("strong - .5 * contrast", [(1.0, "teacher", "base"), (-0.5, "base", "unlearned")]),
        ("-2*teacher_2/base+1e-1*strong", [(-2.0, "teacher_2", "base"), (0.1, "teacher", "base")]),
        ("3.*a.b/c", [(3.0, "a.b", "c")]),
        ("strong - 1e-6*contrast", [(1.0, "teacher", "base"), (-1e-6, "base", "unlearned")]),
    ],
)
def test_parse(text: str, expected: list[tuple[float, str, str]]) -> None:
    assert parse_signal(text) == tuple(SignalTerm(*term) for term in expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("weak", "'weak' is neither"),
        ("teacher/", "'teacher' is neither"),
        ("strong strong", "column 8"),
        ("strong +", "column 8"),
        ("2 teacher/base", "column 1"),
        ("0.5*", "column 1"),
        ("teacher/base)", "column 13"),
        ("base/base", "with itself"),
        ("0*strong", "weight of teacher/base is 0"),
        ("teacher/base - teacher/base", "weights of base, teacher each add up to 0"),
        ("0.1*strong + 0.2*strong - 0.3*strong", "0 everywhere"),
        ("strong - unlearned - unlearned/base", "0 everywhere"),
    ],
)
def test_parse_errors_name_the_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_signal(text)


def test_policies_of() -> None:
    assert policies_of(parse_signal("strong - contrast")) == {"teacher", "base", "unlearned"}


def test_combine_is_the_weighted_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("teacher", "base", "unlearned")
    log_probs = {k: torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).log_softmax(-1) for k in names}
    signal = combine(parse_signal("0.7*strong - 0.3*base/unlearned"), log_probs)
    teacher, base, unlearned = (log_probs[name] for name in names)
    FLOAT64.assert_close(signal, 0.7 * teacher - 1.0 * base + 0.3 * unlearned)


def test_infinities() -> None:
    log_probs = {
        "teacher": torch.tensor([-INF, -INF, -1.0, -2.0, -INF]),
        "base": torch.tensor([-INF, -2.0, -INF, -3.0, -1.0]),
        "unlearned": torch.tensor([-INF, -2.0, -INF, -INF, -1.0]),
    }
    limit = ONE_SIDED_SIGNAL
    assert combine(parse_signal("strong"), log_probs).tolist() == [0, -limit, limit, 1, -limit]
    assert combine(parse_signal("0.5*contrast"), log_probs).tolist() == [0, 0, 0, 0.5 * limit, 0]
    # Two one-sided terms of opposite sign cancel instead of giving inf - inf.
    assert combine(parse_signal("strong - unlearned"), log_probs)[:3].tolist() == [0, 0, 0]


def test_nan_is_not_hidden() -> None:
    log_probs = {"teacher": torch.tensor([math.nan, -1.0]), "base": torch.tensor([-1.0, math.nan])}
    assert bool(combine(parse_signal("strong"), log_probs).isnan().all())


def test_combine_errors() -> None:
    with pytest.raises(ErpdError, match="needs log-probs of unlearned; there are base, teacher"):
        combine(parse_signal("unlearned"), {"teacher": torch.zeros(1), "base": torch.zeros(1)})
    with pytest.raises(ErpdError, match="at least one term"):
        combine([], {})


SIGNAL = torch.tensor([[3.0, -1.0, 0.2], [-8.0, 0.5, 0.0], [1.0, -1.0, 2.0]])
OUTCOME = torch.tensor([1.0, -0.5, 0.0])


def test_token_advantages_are_scaled_then_clipped() -> None:
    assert token_advantages(SIGNAL, scale=2.0, clip=1.0).tolist() == [
        [1.0, -0.5, pytest.approx(0.1)],
        [-1.0, 0.25, 0.0],
        [0.5, -0.5, 1.0],
    ]


def test_sign_agreement_keeps_what_agrees_with_the_outcome() -> None:
    kept = token_advantages(SIGNAL, clip=5.0, sequence_advantages=OUTCOME, sign_agreement=True)
    FLOAT64.assert_close(kept, torch.tensor([[3.0, 0, 0.2], [-5.0, 0, 0], [0, 0, 0]]))
    # The sign is that of the sum: -1 + 2 agrees with an outcome of 1.
    kept = token_advantages(SIGNAL, 1.0, 5.0, 2.0, OUTCOME, True)
    FLOAT64.assert_close(kept, torch.tensor([[5.0, 1.0, 2.2], [-6.0, -0.5, -1.0], [0, 0, 0]]))


def test_token_advantages_errors() -> None:
    with pytest.raises(RecipeError, match="above 0"):
        token_advantages(SIGNAL, scale=0.0)
    with pytest.raises(RecipeError, match="above 0"):
        token_advantages(SIGNAL, clip=-1.0)
    for settings in ({"alpha": 1.0}, {"sign_agreement": True}):
        with pytest.raises(RecipeError, match="need sequence advantages"):
            token_advantages(SIGNAL, **settings)  # type: ignore[arg-type]
