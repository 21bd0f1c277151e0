"""From rollouts and cached rows to the micro-batches of one rank: the one place where tokens are shifted and padded.

The grid is *label-aligned*. For a rollout of P prompt and R response tokens the model reads (prompt + response)[:-1]
and predicts (prompt + response)[1:]; `loss_mask[t] = 1` exactly where `labels[t]` is a response token, that is at
positions [P-1, P-1+R). A value per response token (a log-prob, a top-k row) lives at the position that predicts it.

`BatchSource` reads and collates on a thread of its own (`Prefetch`) and moves micro-batches to the device.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_erpd import platform
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollouts import Rollouts, read_rollouts, validate_against_vocabulary
from megatron_erpd.errors import RolloutError
from megatron_erpd.settings import Layout

_PACKED = (np.float16, np.int16, np.uint8)


class TokenSource(Protocol):
    """Where a batch's tokens are: `Rollouts`, or responses that were just sampled."""

    def __len__(self) -> int: ...

    @property
    def sample_ids(self) -> Sequence[str]: ...

    @property
    def prompt_lengths(self) -> np.ndarray: ...

    @property
    def response_lengths(self) -> np.ndarray: ...

    @property
    def lengths(self) -> np.ndarray: ...

    def prompt_tokens(self, i: int) -> np.ndarray: ...

    def response_tokens(self, i: int) -> np.ndarray: ...

    def location(self, i: int) -> str: ...


@dataclass
class Batch:
    """One micro-batch on the label-aligned grid, batch-first.

    Attributes:
        tokens, labels, position_ids: int64 `[b, s]`.
        loss_mask: float32 `[b, s]`, 1 where the label is a response token, 0 on prompts and padding.
        row_indices: int64 `[b]`, which rollouts these are.
        token_rows: values per response token, `[b, s]` or `[b, s, ...]`, 0 outside the response.
        seq_rows: values per rollout, `[b]`.
        response_positions: int64 `[n]`, ascending: where the labels are response tokens, as places in `[s, b]`, the
            order of Megatron's hidden states, laid flat. Under context parallelism `s` is that of this rank's slice
            (`model.forward.SequenceShard`), also in a batch that holds whole sequences. Found on the host: a device
            would have to be waited for to know how many there are. Of a batch made by hand: those of its `loss_mask`.
        packed_seq_params: None; packed (THD) batches will carry theirs here.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    row_indices: Tensor
    token_rows: dict[str, Tensor] = field(default_factory=dict)
    seq_rows: dict[str, Tensor] = field(default_factory=dict)
    packed_seq_params: Any = None
    response_positions: Tensor = None  # type: ignore[assignment]  # always there after __post_init__

    def __post_init__(self) -> None:
        if self.response_positions is None:
            self.response_positions = flat_positions(self.loss_mask)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = change(value)
            elif isinstance(value, dict):
                moved[item.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **moved)


def rank_positions(length: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    """The positions `[length / size]` of a sequence that a context-parallel rank holds, ascending.

    Args:
        length: a multiple of 2 * size.
    """
    pieces = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def flat_positions(loss_mask: Tensor) -> Tensor:
    """`Batch.response_positions` of a `loss_mask` `[b, s]`."""
    return (loss_mask.transpose(0, 1) > 0).flatten().nonzero().squeeze(-1)


def collate(
    rollouts: TokenSource,
    indices: np.ndarray | Sequence[int],
    *,
    pad_token_id: int,
    pad_multiple: int = 1,
    token_rows: Mapping[str, Sequence[np.ndarray]] | None = None,
    seq_rows: Mapping[str, np.ndarray | Sequence[float]] | None = None,
    trained: np.ndarray | None = None,
    context_parallel: tuple[int, int] = (0, 1),
) -> Batch:
    """Shifts, aligns and pads these rollouts.

    Args:
        rollouts: where the tokens are.
        indices: int `[b]`, rows of `rollouts`.
        pad_token_id: a valid token id; padded positions come after the row, so causal attention never sees them,
            and are masked.
        pad_multiple: the sequence length is rounded up to a multiple of it (sequence parallelism needs a multiple of
            the tensor-parallel size).
        token_rows: name -> one array per index, `[R]` or `[R, ...]`, response-aligned, already fetched for `indices`.
            float16, int16 and uint8 stay (what is packed is unpacked on the device); other floating types become
            float32, other integer types int64.
        seq_rows: name -> `[b]` values, by the same types.
        trained: bool `[b]`, rows whose responses the `loss_mask` holds; None for all.
        context_parallel: this process's rank and their number, of whose slice `response_positions` are.

    Returns:
        CPU tensors; `s` is max(P + R) - 1 rounded up.

    Raises:
        RolloutError: a row's values don't fit its response (names rollout and field).
    """
    rows = np.asarray(indices, dtype=np.int64)
    assert rows.ndim == 1 and rows.size, "a batch needs at least one row"
    prompt_lengths, response_lengths = rollouts.prompt_lengths[rows], rollouts.response_lengths[rows]
    input_lengths = prompt_lengths + response_lengths - 1
    length = -(-int(input_lengths.max()) // pad_multiple) * pad_multiple

    # One padded buffer of length s + 1 serves tokens and labels: they are its two shifts.
    padded = np.full((rows.size, length + 1), pad_token_id, dtype=np.int64)
    for b, row in enumerate(rows):
        middle, end = prompt_lengths[b], prompt_lengths[b] + response_lengths[b]
        padded[b, :middle] = rollouts.prompt_tokens(row)
        padded[b, middle:end] = rollouts.response_tokens(row)
    positions = np.arange(length)
    inside = positions < input_lengths[:, None]
    loss_mask = inside & (positions >= prompt_lengths[:, None] - 1)
    if trained is not None:
        loss_mask &= trained[:, None]
    # A shorter row's last token is a label only: it is no input of the model, even where there is room for it.
    tokens = np.where(inside, padded[:, :-1], pad_token_id)

    starts = prompt_lengths - 1
    grids = {}
    for name, values in (token_rows or {}).items():
        _check_rows(rollouts, rows, name, values, response_lengths)
        grids[name] = scatter_response_rows(values, starts, length)
    mask = torch.from_numpy(loss_mask.astype(np.float32))
    cp_rank, cp_size = context_parallel
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(padded[:, 1:].copy()),
        position_ids=torch.arange(length).expand(rows.size, length).contiguous(),
        loss_mask=mask,
        row_indices=torch.from_numpy(rows.copy()),
        token_rows=grids,
        seq_rows={name: _seq_tensor(name, values, rows.size) for name, values in (seq_rows or {}).items()},
        response_positions=flat_positions(mask if cp_size == 1 else mask[:, rank_positions(length, cp_rank, cp_size)]),
    )


def scatter_response_rows(rows: Sequence[np.ndarray], starts: np.ndarray | Sequence[int], length: int) -> Tensor:
    """Places response-aligned rows on the grid.

    Args:
        rows: b arrays `[R_i]` or `[R_i, ...]` with equal trailing shapes.
        starts: int `[b]`, the position predicting the first response token, P_i - 1.
        length: s.

    Returns:
        `[b, s]` or `[b, s, ...]`, of `collate`'s types, 0 outside the responses. `gather_response_rows` is the inverse.
    """
    first = np.asarray(rows[0])
    dtype = first.dtype if first.dtype in _PACKED else np.dtype(np.float32 if first.dtype.kind == "f" else np.int64)
    grid = np.zeros((len(rows), length, *first.shape[1:]), dtype=dtype)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        grid[b, start : start + len(row)] = row
    return torch.from_numpy(grid)


def gather_response_rows(values: Tensor, batch: Batch) -> list[np.ndarray]:
    """Takes response-aligned rows off the grid.

    Args:
        values: `[b, s]` or `[b, s, ...]` on any device; detached and copied to the CPU, bfloat16 as float32.
        batch: the batch they were computed for; its `loss_mask` says where the responses are.

    Returns:
        b arrays `[R_i]` or `[R_i, ...]`, each owning its memory (rows may outlive the grid).
    """
    assert values.shape[:2] == batch.loss_mask.shape, f"{tuple(values.shape)} isn't on the batch's grid"
    local = values.detach().cpu()
    grid = (local.float() if local.dtype == torch.bfloat16 else local).numpy()
    mask = batch.loss_mask.detach().cpu().numpy() > 0
    return [grid[b][mask[b]] for b in range(len(mask))]


def _check_rows(
    rollouts: TokenSource, rows: np.ndarray, name: str, values: Sequence[np.ndarray], response_lengths: np.ndarray
) -> None:
    if len(values) != rows.size:
        raise RolloutError(f"{name}: {len(values)} rows for a batch of {rows.size}")
    for row, value, expected in zip(rows, values, response_lengths, strict=True):
        if len(value) != expected:
            raise RolloutError(
                f"{name}: {len(value)} values for the {expected} response tokens of sample "
                f"{rollouts.sample_ids[row]} ({rollouts.location(int(row))}); they belong to other rollouts"
            )


def _seq_tensor(name: str, values: np.ndarray | Sequence[float], size: int) -> Tensor:
    array = np.asarray(values)
    if array.shape != (size,):
        raise RolloutError(f"{name}: shape {array.shape} for a batch of {size}; one value per rollout is needed")
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


PREFETCHED = 2
"""Micro-batches that lie ready: one for the step that comes, one for a hitch."""
_END = object()


class Prefetch[T](Iterator[T]):
    """The same items in the same order, made up to `depth` ahead. An error of theirs comes out where its item would.

    Use as a context, or call `close`. The thread has also ended after the last item and after `close_all`; each waits
    for the item that is being made. A program that ends without any of these waits for it too: a thread that Python
    leaves behind in a torch operation would abort the process.
    """

    def __init__(self, items: Iterator[T], depth: int = PREFETCHED) -> None:
        self._items = items
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Any]] = deque()
        self._depth = depth
        _open.add(self)

    def __next__(self) -> T:
        if self._thread is None:
            raise StopIteration
        while len(self._ahead) <= self._depth:
            self._ahead.append(self._thread.submit(next, self._items, _END))
        try:
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        return item

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, and returns when it has ended."""
        # At most once: what holds it may be taken down after the modules that this needs.
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=True)
            _open.discard(self)


_open: set[Prefetch[Any]] = set()


@atexit.register
def close_all() -> None:
    """Ends all threads, whoever holds what they make; a stage's process calls it when the stage ends."""
    for items in list(_open):
        items.close()


def repeated[T](items: Iterator[T], times: int) -> list[Iterator[T]]:
    """The same items for several readers, each at its own pace. An item is kept until all have taken it.

    (`itertools.tee` keeps up to 57 that all have taken.)
    """
    if times == 1:
        return [items]
    waiting: list[deque[T]] = [deque() for _ in range(times)]

    def read(own: deque[T]) -> Iterator[T]:
        while True:
            if not own:
                try:
                    item = next(items)
                except StopIteration:
                    return
                for other in waiting:
                    other.append(item)
                del item
            yield own.popleft()

    return [read(own) for own in waiting]


TokenRow = Callable[[int], np.ndarray]
"""Given a row of the rollouts, its response-aligned array: `[R]`, or `[R, K]` for top-k targets."""


@dataclass(frozen=True)
class BatchSource:
    """Collates micro-batches and moves them to the device.

    Every rank reads the memory-mapped rows that it needs itself, so no batch is broadcast.
    """

    rollouts: TokenSource
    pad_multiple: int
    token_rows: Mapping[str, TokenRow]
    sequence_rows: Mapping[str, np.ndarray]
    """Per-rollout values `[N]`, such as rewards and advantages."""
    trained: np.ndarray | None = None
    """bool `[N]`, the rollouts whose responses count; None for all."""
    context_parallel: tuple[int, int] = (0, 1)
    """This process's rank and their number."""

    def batch(self, indices: np.ndarray) -> Batch:
        """The micro-batch of these rows of the rollouts, on the device."""
        return _to_device(self._collate(indices))

    def _collate(self, indices: np.ndarray, is_filler: bool = False) -> Batch:
        # Rollout by rollout, since several values of one may come from the same row of a cache.
        rows = [{name: row(int(i)) for name, row in self.token_rows.items()} for i in indices]
        trained = None if self.trained is None else self.trained[indices]
        if is_filler:
            trained = np.zeros(len(indices), dtype=bool)
        batch = collate(
            self.rollouts,
            indices,
            pad_token_id=0,
            pad_multiple=self.pad_multiple,
            token_rows={name: [row[name] for row in rows] for name in self.token_rows},
            seq_rows={name: values[indices] for name, values in self.sequence_rows.items()},
            trained=trained,
            context_parallel=self.context_parallel,
        )
        return batch if platform.is_cpu() else batch.pinned()

    def replay(self, order: BatchOrder, consumed: int, micro_batch_size: int, rank: int, size: int) -> Iterator[Batch]:
        """Endless micro-batches of one data-parallel rank, from where `consumed` rollouts were trained on.

        The next ones are read and collated on a thread of their own while the model works on this one.
        """
        with Prefetch(map(self._collate, order.micro_batches(consumed, micro_batch_size, rank, size))) as ahead:
            for batch in ahead:
                yield _to_device(batch)

    def once(self, groups: Sequence[np.ndarray], rank: int, size: int) -> Iterator[Batch]:
        """A batch of each group of rows, in turns over the data-parallel ranks.

        All ranks yield the same number of batches, since pipeline schedules and collectives count on it: where the
        groups run out, a rank yields a filler, a batch whose `loss_mask` is all 0.

        Args:
            groups: such as `length_groups` makes.
        """
        last = len(groups) - 1
        own = range(rank, -(-len(groups) // size) * size, size)
        with Prefetch(self._collate(groups[min(at, last)], is_filler=at > last) for at in own) as ahead:
            yield from map(_to_device, ahead)


def length_groups(lengths: np.ndarray, max_tokens: int, pad_multiple: int) -> list[np.ndarray]:
    """Rows sorted by length, longest first, cut into groups of at most `max_tokens` tokens with padding.

    Args:
        lengths: `[N]`, prompt and response; a model reads one token less.
        max_tokens: of a group; a rollout that is longer has one of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    padded = -(-(lengths[order] - 1) // pad_multiple) * pad_multiple
    groups, start = [], 0
    while start < len(order):
        count = max(1, max_tokens // max(1, int(padded[start])))
        groups.append(order[start : start + count])
        start += count
    return groups


def _to_device(batch: Batch) -> Batch:
    return batch.to(platform.device(), non_blocking=True)


def open_rollouts(path: Path, vocab_size: int, max_positions: int) -> Rollouts:
    """Reads and checks rollouts against the model that will see them.

    Raises:
        RolloutError: no row, a token id beyond the vocabulary, or a rollout longer than the model's positions.
    """
    rollouts = read_rollouts(path)
    if len(rollouts) == 0:
        raise RolloutError(f"{path}: holds no rollout; there is nothing to train on")
    validate_against_vocabulary(rollouts, vocab_size)
    longest = int(np.argmax(rollouts.lengths))
    if rollouts.lengths[longest] > max_positions:
        raise RolloutError(
            f"{path}: row {longest} ({rollouts.sample_ids[longest]}) has {rollouts.lengths[longest]} tokens, the model "
            f"has {max_positions} positions; shorten or drop such rollouts"
        )
    return rollouts


def pad_multiple(layout: Layout) -> int:
    """What sequence lengths are rounded up to: shards of the sequence must be equal."""
    shards = layout.tensor_parallel if layout.sequence_parallel else 1
    return shards * (2 * layout.context_parallel if layout.context_parallel > 1 else 1)
