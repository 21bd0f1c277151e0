"""Rollouts dealt to packs: micro-batches that hold a budget of tokens, with about the same work on every rank.

The rollouts of an optimizer step are those of `BatchOrder`, whoever deals them: with sums-and-counts losses neither the
loss nor its gradient depends on how they are packed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packer:
    """What each rollout takes of a pack.

    Attributes:
        tokens: int64 `[N]`, of what the model reads of it, with padding.
        work: float `[N]`, of its forward pass, in any unit.
        max_tokens: of a pack. A rollout with more has a pack of its own.
    """

    tokens: np.ndarray
    work: np.ndarray
    max_tokens: int

    def packs_per_rank(self, rows: np.ndarray, ranks: int) -> int:
        """Packs per rank that hold these rollouts: with those of `fill`, the fewest that are known."""
        return -(-len(self._best_fit(rows)) // ranks)

    def fill(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rollouts in as few packs as were found, the pack with the most work first."""
        return self._most_work_first(self._best_fit(rows))

    def deal(self, rows: np.ndarray, ranks: int, count: int) -> list[list[np.ndarray]]:
        """For each micro-step a pack for each rank; a pack may be empty.

        Ranks get about the same work, since they wait for each other at the end of the step; so do the packs of a rank,
        where the budget allows it. Each rank's packs come in the order of their work, the most first: a mixture's ranks
        wait for each other at every micro-step.

        Args:
            count: packs of a rank, at least `packs_per_rank(rows, ranks)`.
        """
        dealt = self._longest_processing_time(rows, ranks, count) or self._filled(rows, ranks, count)
        return [list(step) for step in zip(*map(self._most_work_first, dealt), strict=True)]

    def _longest_processing_time(self, rows: np.ndarray, ranks: int, count: int) -> list[list[list[int]]] | None:
        """The packs of each rank; None where a rollout found no room, as may be where packs must be nearly full.

        The rollout with the most work goes first, each to the rank with the least work, there to the pack with the
        least work, among those that have room (Graham, 1969, Bounds on Multiprocessing Timing Anomalies, section 3).
        """
        dealt: list[list[list[int]]] = [[[] for _ in range(count)] for _ in range(ranks)]
        least = int(self.tokens[rows].min())
        # Heaps of those with room: (work so far, number), of a pack with (..., tokens so far).
        open_ranks = [(0.0, rank) for rank in range(ranks)]
        open_packs = [[(0.0, number, 0) for number in range(count)] for _ in range(ranks)]
        for row in rows[np.argsort(-self.work[rows], kind="stable")].tolist():
            tokens, work = int(self.tokens[row]), float(self.work[row])
            aside, number = [], None
            while number is None and open_ranks:
                of_rank, rank = heapq.heappop(open_ranks)
                number = self._pack_with_room(open_packs[rank], tokens, work, least)
                aside.append((of_rank if number is None else of_rank + work, rank))
            if number is None:
                return None
            dealt[rank][number].append(row)
            for of_rank, rank in aside:
                if open_packs[rank]:
                    heapq.heappush(open_ranks, (of_rank, rank))
        return dealt

    def _pack_with_room(self, packs: list[tuple[float, int, int]], tokens: int, work: float, least: int) -> int | None:
        """The number of the pack with the least work that has room, with the rollout added to it.

        Args:
            packs: a heap; the pack leaves it where it has no room for `least` tokens more.
        """
        aside, found = [], None
        while found is None and packs:
            of_pack, number, held = heapq.heappop(packs)
            if not held or held + tokens <= self.max_tokens:
                of_pack, held, found = of_pack + work, held + tokens, number
            if held + least <= self.max_tokens:
                aside.append((of_pack, number, held))
        for pack in aside:
            heapq.heappush(packs, pack)
        return found

    def _filled(self, rows: np.ndarray, ranks: int, count: int) -> list[list[np.ndarray]]:
        """The same with packs filled first: the pack with the most work goes first, each to the rank with the least."""
        packs = self.fill(rows)
        assert len(packs) <= ranks * count, "too few packs"
        dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
        open_ranks = [(0.0, rank) for rank in range(ranks)]
        for pack in packs:
            of_rank, rank = heapq.heappop(open_ranks)
            dealt[rank].append(pack)
            if len(dealt[rank]) < count:
                heapq.heappush(open_ranks, (of_rank + float(self.work[pack].sum()), rank))
        return [own + [np.empty(0, np.int64)] * (count - len(own)) for own in dealt]

    def _best_fit(self, rows: np.ndarray) -> list[list[int]]:
        """The longest rollout goes first, each to the fullest pack that has room for it.

        Best fit decreasing takes at most 11/9 of the fewest packs that there can be, and 4 (Johnson et al., 1974,
        Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms).
        """
        packs: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # ascending, of packs with any: tokens that fit in, number of the pack
        for row in rows[np.argsort(-self.tokens[rows], kind="stable")].tolist():
            tokens = int(self.tokens[row])
            at = bisect_left(rooms, (tokens, 0))
            if at < len(rooms):
                room, number = rooms.pop(at)
            else:
                room, number = self.max_tokens, len(packs)
                packs.append([])
            packs[number].append(row)
            if room > tokens:
                insort(rooms, (room - tokens, number))
        return packs

    def _most_work_first(self, packs: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        arrays = [np.asarray(pack, dtype=np.int64) for pack in packs]
        return sorted(arrays, key=lambda pack: -float(self.work[pack].sum()))
