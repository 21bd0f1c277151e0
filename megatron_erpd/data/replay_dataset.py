"""The order in which fixed rollouts are replayed: many epochs, any layout, resumable from one number.

The *stream* is the concatenation of one permutation per epoch; a global batch is the next `global_batch_size` rows of
it. Only then are its rows assigned to micro-steps and data-parallel ranks. So the rows of an optimizer step, and with
sums-and-counts losses its gradient, don't depend on the micro-batch size nor on DP, TP, PP or CP.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_erpd.data.packs import Packer
from megatron_erpd.errors import LayoutError, RolloutError


class BatchOrder:
    """Which rows each rank sees at each micro-step.

    Memory is one permutation of the rows per epoch in use (at most two are kept), however long the training.

    Args:
        lengths: int `[N]`, tokens per rollout; rows of similar length share a micro-batch.
        global_batch_size: rows per optimizer step, over all ranks.
        seed: non-negative; with the epoch's number it fixes that epoch's permutation.
        trained: bool `[N]`, whether a row takes part in the loss; default: all do. A global batch in which none does is
            passed over: no step is made of it, and the other batches are those that they would be.
    """

    def __init__(
        self,
        lengths: np.ndarray | Sequence[int],
        global_batch_size: int,
        seed: int,
        trained: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or self.lengths.size == 0:
            raise RolloutError(f"lengths must be a non-empty flat array, got shape {self.lengths.shape}")
        if global_batch_size < 1:
            raise LayoutError(f"global_batch_size is {global_batch_size}; it must be at least 1")
        if seed < 0:
            raise LayoutError(f"seed is {seed}; it must not be negative")
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.trained = None if trained is None or trained.all() else trained
        if self.trained is not None and not self.trained.any():
            raise RolloutError(f"none of the {self.lengths.size} rollouts takes part in the loss")
        self._permutations: dict[int, np.ndarray] = {}
        self._starts: list[int] = []

    @property
    def samples_per_epoch(self) -> int:
        """N, the rows of one epoch."""
        return int(self.lengths.size)

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 `[N]`: the order of epoch `epoch` (from 0), a function of the seed and the epoch only."""
        if epoch not in self._permutations:
            # Sorting raw PCG64 output rather than Generator.permutation: numpy promises the bit stream for ever but
            # may change what Generator makes of it, and a run must resume identically under a newer numpy.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(self.samples_per_epoch)
            self._permutations[epoch] = np.argsort(keys, kind="stable")
            for old in [e for e in self._permutations if e < epoch - 1]:
                del self._permutations[old]
        return self._permutations[epoch]

    def stream(self, start: int, count: int) -> np.ndarray:
        """int64 `[count]`: the rows at positions start..start+count of the endless stream."""
        assert start >= 0 and count >= 0
        pieces, position, end = [], start, start + count
        while position < end:
            epoch, offset = divmod(position, self.samples_per_epoch)
            piece = self.permutation(epoch)[offset : offset + end - position]
            pieces.append(piece)
            position += piece.size
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def global_batch(self, consumed_samples: int) -> np.ndarray:
        """int64 `[global_batch_size]`: the rows of the step that begins after `consumed_samples` rows, longest first.

        Longest first, so that the micro-batch that needs the most memory is the first of every step.
        """
        rows = self.stream(self._start(consumed_samples), self.global_batch_size)
        return rows[np.argsort(-self.lengths[rows], kind="stable")]

    def num_batches(self, of: int) -> int:
        """Among the first `of` global batches of the stream, those that are not passed over."""
        if self.trained is None:
            return of
        return sum(self._is_trained(number * self.global_batch_size) for number in range(of))

    def _start(self, consumed: int) -> int:
        """Where in the stream the step begins that follows `consumed` rows of steps."""
        if self.trained is None:
            return consumed
        step, rest = divmod(consumed, self.global_batch_size)
        while len(self._starts) <= step:
            start = self._starts[-1] + self.global_batch_size if self._starts else 0
            while not self._is_trained(start):
                start += self.global_batch_size
            self._starts.append(start)
        return self._starts[step] + rest

    def _is_trained(self, start: int) -> bool:
        assert self.trained is not None
        return bool(self.trained[self.stream(start, self.global_batch_size)].any())

    def micro_batches(
        self, consumed_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> Iterator[np.ndarray]:
        """The micro-batches of one data-parallel rank, without end, from any point of the stream.

        Inside a global batch the rows are sorted by length, and micro-step k on rank r takes
        `sorted[(k * dp_size + r) * mbs :][:mbs]`: similar lengths in a micro-batch and across the ranks of a
        micro-step, so little padding and little waiting.

        Args:
            consumed_samples: rows consumed so far by all ranks together (as Megatron counts and saves them). A run
                resumed under another global batch size neither skips nor repeats a row.
            micro_batch_size: rows per micro-batch.
            dp_rank, dp_size: this rank's place in the data-parallel group (context parallelism excluded).

        Yields:
            int64 `[micro_batch_size]` row numbers; `global_batch_size / (micro_batch_size * dp_size)` of them make
            one step.

        Raises:
            LayoutError: the sizes don't divide, or the rank is outside the group (at the call, not later).
        """
        if micro_batch_size < 1 or dp_size < 1 or not 0 <= dp_rank < dp_size:
            layout = f"micro_batch_size={micro_batch_size}, dp_rank={dp_rank}, dp_size={dp_size}"
            raise LayoutError(f"{layout}: sizes must be at least 1 and 0 <= dp_rank < dp_size")
        if consumed_samples < 0:
            raise LayoutError(f"consumed_samples is {consumed_samples}; it counts rows and can't be negative")
        rows_per_micro_step = micro_batch_size * dp_size
        if self.global_batch_size % rows_per_micro_step:
            raise LayoutError(
                f"global batch size {self.global_batch_size} isn't a multiple of micro-batch size {micro_batch_size} "
                f"x data-parallel size {dp_size}; change one of the three"
            )
        return self._generate(consumed_samples, micro_batch_size, dp_rank, dp_size)

    def _generate(self, consumed: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[np.ndarray]:
        while True:
            rows = self.global_batch(consumed).reshape(-1, dp_size, micro_batch_size)
            yield from rows[:, dp_rank]
            consumed += self.global_batch_size

    def packs(
        self, consumed_samples: int, packer: Packer, count: int, dp_rank: int, dp_size: int
    ) -> Iterator[np.ndarray]:
        """The same in packs: the rows of each step dealt anew over ranks and micro-steps.

        Args:
            count: packs of a rank in every optimizer step; see `most_packs`.

        Yields:
            int64 arrays of row numbers, some of them empty; `count` of them make one step.
        """
        for step in self.dealt(consumed_samples, packer, count, dp_size):
            yield from (ranks[dp_rank] for ranks in step)

    def dealt(
        self, consumed_samples: int, packer: Packer, count: int, dp_size: int
    ) -> Iterator[list[list[np.ndarray]]]:
        """The packs of all ranks: of each step, without end, for each micro-step a pack for each rank."""
        while True:
            yield packer.deal(self.global_batch(consumed_samples), dp_size, count)
            consumed_samples += self.global_batch_size

    def most_packs(self, packer: Packer, num_steps: int, dp_size: int) -> int:
        """Packs per rank that hold the rows of every one of the first `num_steps` steps."""
        steps = (self.global_batch(number * self.global_batch_size) for number in range(num_steps))
        return max(packer.packs_per_rank(rows, dp_size) for rows in steps)
