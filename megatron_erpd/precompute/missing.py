"""What a teacher cache lacks, and which batches a policy must run for it. Arrays alone: no model, files or ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_erpd.teacher_cache.format import TOPK, hidden_table, log_probs_table


@dataclass(frozen=True)
class PolicyPass:
    """What a policy's forward pass is run for.

    Attributes:
        batches: rows of the rollouts, those of a micro-batch together.
        stores_hidden: its hidden states are written.
        makes_target: the top-k target is made in it, with the stored hidden states of the other policies.
        loads_weights: even where there is no batch, its output layer is needed.
    """

    batches: list[np.ndarray]
    stores_hidden: bool
    makes_target: bool
    loads_weights: bool


@dataclass
class Missing:
    """The rows that each table lacks.

    Attributes:
        policies: in the order of their passes; the last one's makes the target.
        has_target: the cache has a top-k target.
        needs_all: the target needs all rollouts, whatever is there already (the `global` projection).
        keep_hidden: hidden states are part of the cache; `scratch_hidden`: they are on disk only while it is made.
        rows: table to bool `[N]`, True where the rollout is missing.
    """

    policies: Sequence[str]
    has_target: bool
    needs_all: bool
    keep_hidden: bool
    scratch_hidden: bool
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def batches(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those in which any table lacks a row; all of them where the target needs all and any row is missing."""
        lacking = with_any(np.logical_or.reduce(list(self.rows.values())), groups)
        return list(groups) if lacking and self.needs_all else lacking

    def target_batches(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        return with_any(self.rows[TOPK], groups) if self.has_target else []

    def policy_pass(self, policy: str, groups: Sequence[np.ndarray]) -> PolicyPass:
        makes_target = self.has_target and not self.needs_all and policy == self.policies[-1]
        stores = hidden_table(policy) in self.rows and not (self.scratch_hidden and makes_target)
        needed = self.rows[log_probs_table(policy)].copy()
        if stores:
            lacks = self.rows[hidden_table(policy)]
            if not self.keep_hidden and not self.needs_all:
                lacks = lacks & self._read_by_last(groups)
            needed |= lacks
        if makes_target:
            needed |= self.rows[TOPK]
        batches = with_any(needed, groups)
        target_waits = self.has_target and (self.needs_all or bool(self.target_batches(groups)))
        return PolicyPass(batches, stores, makes_target, bool(batches) or target_waits)

    def written(self, policy: str, made: PolicyPass) -> None:
        """The rows of a pass are there now."""
        tables = [log_probs_table(policy), *([hidden_table(policy)] if made.stores_hidden else [])]
        for table in (*tables, *([TOPK] if made.makes_target else [])):
            for group in made.batches:
                self.rows[table][group] = False

    def _read_by_last(self, groups: Sequence[np.ndarray]) -> np.ndarray:
        """bool `[N]`: the rows of the last policy's batches, whose stored hidden states are read there."""
        last = self.rows[TOPK] | self.rows[log_probs_table(self.policies[-1])]
        read = np.zeros_like(last)
        for group in with_any(last, groups):
            read[group] = True
        return read


def missing_rows(sample_ids: Iterable[str], done: frozenset[str]) -> np.ndarray:
    """bool `[N]`: the rollouts that aren't among `done`."""
    return np.array([name not in done for name in sample_ids], dtype=bool)


def with_any(needed: np.ndarray, groups: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The groups in which any row is needed, `[N]`."""
    return [group for group in groups if needed[group].any()]


def portions(batches: list[np.ndarray], needed: int, room: int) -> list[list[np.ndarray]] | None:
    """The batches dealt to as few passes as `needed` bytes in `room` ask for; None where a batch alone doesn't fit."""
    count = max(1, -(-needed // max(1, room)))
    return None if count > len(batches) else [batches[number::count] for number in range(count)]
