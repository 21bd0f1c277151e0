"""`--policy NAME=DIR`: names become folders of a cache, so they are names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.teacher_cache.rows import parse_policies


def test_names_and_folders() -> None:
    found = parse_policies(["teacher=runs/a", "third-1.5=runs/b=c"])
    assert found == {"teacher": Path("runs/a"), "third-1.5": Path("runs/b=c")}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["teacher"], "--policy teacher: write NAME=DIR"),
        (["=runs/a"], "write NAME=DIR"),
        (["base=runs/a"], "'base' is given twice"),
        (["t=runs/a", "t=runs/b"], "--policy t=runs/b: 't' is given twice"),
        (["../t=runs/a"], r"--policy \.\./t=runs/a: a name may hold letters, digits"),
        (["a/b=runs/a"], "a name may hold letters"),
    ],
)
def test_what_is_no_policy(items: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_policies(items)
