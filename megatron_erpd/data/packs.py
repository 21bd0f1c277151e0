"""Rollouts dealt to packs: micro-batches that hold a budget of tokens, with about the same work on every rank.

The rollouts of an optimizer step are those of `BatchOrder`, whoever deals them: with sums-and-counts losses neither the
loss nor its gradient depends on how they are packed.
"""

from __future__ import annotations

import heapq
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
        """The fewest packs per rank that were found to hold these rollouts."""
        count = -(-int(np.minimum(self.tokens[rows], self.max_tokens).sum()) // (self.max_tokens * ranks))
        while self._dealt(rows, count * ranks) is None:
            count += 1
        return count

    def deal(self, rows: np.ndarray, ranks: int, count: int) -> list[list[np.ndarray]]:
        """For each micro-step a pack for each rank; a pack may be empty.

        The heaviest rollout goes first, each to the pack with the least work that has room for it (longest processing
        time first: Graham, 1969, Bounds on Multiprocessing Timing Anomalies, section 3). The packs of a micro-step are
        neighbours by their work, the heaviest first, as ranks may wait for each other there; from one micro-step to the
        next the order of the ranks turns round, which levels their sums.

        Args:
            count: packs of a rank, at least `packs_per_rank(rows, ranks)`.
        """
        packs = self._dealt(rows, count * ranks)
        assert packs is not None, "too few packs"
        packs.sort(key=lambda pack: -float(self.work[pack].sum()))
        steps = [packs[at : at + ranks] for at in range(0, len(packs), ranks)]
        return [step if number % 2 == 0 else step[::-1] for number, step in enumerate(steps)]

    def _dealt(self, rows: np.ndarray, count: int) -> list[np.ndarray] | None:
        """The rollouts in `count` packs; None where they found no room."""
        packs: list[list[int]] = [[] for _ in range(count)]
        least = int(self.tokens[rows].min())
        # Work so far, number, tokens so far.
        open_packs = [(0.0, number, 0) for number in range(count)]
        for row in rows[np.argsort(-self.work[rows], kind="stable")].tolist():
            tokens, aside = int(self.tokens[row]), []
            while open_packs:
                work, number, held = heapq.heappop(open_packs)
                if not held or held + tokens <= self.max_tokens:
                    break
                aside.append((work, number, held))
            else:
                return None
            packs[number].append(row)
            aside.append((work + float(self.work[row]), number, held + tokens))
            for pack in aside:
                if pack[2] + least <= self.max_tokens:
                    heapq.heappush(open_packs, pack)
        return [np.array(pack, dtype=np.int64) for pack in packs]
