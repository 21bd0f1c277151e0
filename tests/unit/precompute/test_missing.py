"""Which batches a policy must run again for what a cache lacks."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_erpd.precompute.missing import Missing, missing_rows, portions
from megatron_erpd.teacher_cache.format import TOPK, hidden_table, log_probs_table

GROUPS = [np.array([0, 1]), np.array([2, 3]), np.array([4])]
POLICIES = ("base", "teacher")


def lacks(*rows: int) -> np.ndarray:
    return missing_rows("abcde", frozenset(name for i, name in enumerate("abcde") if i not in rows))


def tables(kind: str, **rows: tuple[int, ...]) -> Missing:
    """A cache that lacks the given rows of `base`, `teacher` (log-probs), `base_hidden`, `teacher_hidden`, `topk`."""
    names = {"base": log_probs_table("base"), "teacher": log_probs_table("teacher"), "topk": TOPK}
    names |= {f"{policy}_hidden": hidden_table(policy) for policy in POLICIES}
    used = ["base", "teacher"]
    used += [] if kind == "token" else ["topk"]
    used += ["base_hidden", "teacher_hidden"] if kind in ("scratch", "global", "kept") else []
    found = {names[key]: lacks(*rows.get(key, ())) for key in used}
    return Missing(POLICIES, kind != "token", kind == "global", kind == "kept", kind in ("scratch", "global"), found)


@pytest.mark.parametrize(
    ("kind", "rows", "policy", "batches", "stores", "makes_target", "loads"),
    [
        # nothing is missing: no policy runs, none is loaded
        ("token", {}, "base", [], False, False, False),
        # log-probs alone: the batches of the missing rows
        ("token", {"base": (3,)}, "base", [1], False, False, True),
        ("token", {"base": (3,)}, "teacher", [], False, False, False),
        # a target that waits loads every policy, and the last one makes it
        ("scratch", {"topk": (0,), "base_hidden": (0, 1, 2)}, "base", [0], True, False, True),
        ("scratch", {"topk": (0,), "base_hidden": (0, 1, 2)}, "teacher", [0], False, True, True),
        # the last policy's pass reads the whole batch, also where it lacks only a log-prob
        ("scratch", {"teacher": (4,), "base_hidden": (2, 4)}, "base", [2], True, False, True),
        # hidden states that are kept are made wherever they are missing
        ("kept", {"teacher_hidden": (2,)}, "teacher", [1], True, True, True),
        ("kept", {"teacher_hidden": (2,)}, "base", [], True, False, False),
        # one eta for all rollouts: hidden states of all, and the target after the passes
        ("global", {"topk": (0,), "base_hidden": (0, 1, 2, 3, 4)}, "base", [0, 1, 2], True, False, True),
        ("global", {"topk": (0,), "teacher_hidden": ()}, "teacher", [], True, False, True),
    ],
)
def test_what_a_policy_runs_for(kind, rows, policy, batches, stores, makes_target, loads):
    made = tables(kind, **rows).policy_pass(policy, GROUPS)
    assert [g.tolist() for g in made.batches] == [GROUPS[i].tolist() for i in batches]
    assert (made.stores_hidden, made.makes_target, made.loads_weights) == (stores, makes_target, loads)


def test_after_both_passes_nothing_is_missing():
    missing = tables("scratch", base=(0,), teacher=(2,), topk=(1, 4), base_hidden=(0, 1, 2, 3, 4))
    for policy in POLICIES:
        missing.written(policy, missing.policy_pass(policy, GROUPS))
    assert not missing.target_batches(GROUPS)
    assert not any(missing.policy_pass(policy, GROUPS).loads_weights for policy in POLICIES)


def test_a_target_of_all_rollouts_takes_all_batches_once_any_is_missing():
    assert tables("global").batches(GROUPS) == []
    assert len(tables("global", topk=(4,)).batches(GROUPS)) == 3
    assert [g.tolist() for g in tables("scratch", topk=(4,)).batches(GROUPS)] == [[4]]


@pytest.mark.parametrize(
    ("needed", "room", "counts"), [(0, 0, [3]), (10, 10, [3]), (11, 10, [2, 1]), (30, 10, [1] * 3)]
)
def test_batches_are_dealt_to_as_few_passes_as_the_disk_asks_for(needed, room, counts):
    assert [len(part) for part in portions(GROUPS, needed, room) or ()] == counts


def test_a_batch_that_does_not_fit_is_no_pass():
    assert portions(GROUPS, 31, 10) is None
