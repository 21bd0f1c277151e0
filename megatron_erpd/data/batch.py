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
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_erpd import platform
from megatron_erpd.data.packs import Packer
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
    """One micro-batch: what the model reads, which response tokens it predicts where, and the losses' grid.

    The model's input and the values per predicted token are of this process's part of the sequences (all of them, but
    for context parallelism); the grid holds whole rollouts, padded to one length, however the model reads them.

    Attributes:
        tokens, position_ids: int64 `[b, s / cp]`, or of a pack `[1, t / cp]`.
        row_indices: int64 `[b]`, which rollouts these are.
        loss_mask: float32 `[b, s]`, 1 where a response token is predicted, 0 on prompts and padding.
        token_rows: values per response token for the losses, `[b, s]`, 0 outside the response.
        seq_rows: values per rollout, `[b]`.
        response_positions: int64 `[n]`, ascending: where response tokens are predicted here, as rows of the model's
            hidden states `[s / cp, b, h]` laid flat. Found on the host: a device would have to be waited for to know
            how many there are.
        response_places: int64 `[n]`, the same on the grid `[b, s]` laid flat.
        labels: int64 `[n]`, the response tokens.
        target_rows: values per response token for the policy's head, `[n, ...]`.
        segments: of a pack, the tokens of each rollout with padding, on all context-parallel ranks; on the host. None
            for a padded micro-batch.
        segment_ends: int32 `[segments + 1]`, 0 and where each segment ends.
    """

    tokens: Tensor
    position_ids: Tensor
    row_indices: Tensor
    loss_mask: Tensor
    response_positions: Tensor
    response_places: Tensor
    labels: Tensor
    token_rows: dict[str, Tensor] = field(default_factory=dict)
    seq_rows: dict[str, Tensor] = field(default_factory=dict)
    target_rows: dict[str, Tensor] = field(default_factory=dict)
    segments: tuple[int, ...] | None = None
    segment_ends: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def response_order(self) -> Tensor:
        """int64 `[n]`: which of the micro-batch's response tokens these are, rollout by rollout."""
        return (self.loss_mask > 0).flatten().cumsum(0)[self.response_places] - 1

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


@dataclass(frozen=True)
class Padding:
    """What the model's input is rounded up to, so that its shards are equal.

    Attributes:
        sequence: of each sequence: context parallelism gives each rank two of 2 * CP equal pieces.
        total: of a padded micro-batch's sequences, or of a pack: with sequence parallelism a multiple of the
            tensor-parallel shards too.
    """

    sequence: int = 1
    total: int = 1

    @classmethod
    def of(cls, layout: Layout) -> Padding:
        sequence = 2 * layout.context_parallel if layout.context_parallel > 1 else 1
        return cls(sequence, sequence * (layout.tensor_parallel if layout.sequence_parallel else 1))

    def pack_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of sequences in a pack: int64 `[N]` from what the model reads of them."""
        return -(-lengths // self.sequence) * self.sequence


def collate(
    rollouts: TokenSource,
    indices: np.ndarray | Sequence[int],
    *,
    pad_token_id: int,
    padding: Padding = Padding(),  # frozen
    packed: bool = False,
    token_rows: Mapping[str, Sequence[np.ndarray]] | None = None,
    target_rows: Mapping[str, Sequence[np.ndarray]] | None = None,
    seq_rows: Mapping[str, np.ndarray | Sequence[float]] | None = None,
    trained: np.ndarray | None = None,
    context_parallel: tuple[int, int] = (0, 1),
) -> Batch:
    """Shifts, aligns and pads or packs these rollouts.

    Args:
        rollouts: where the tokens are.
        indices: int `[b]`, rows of `rollouts`.
        pad_token_id: a valid token id; padded positions come after the row, so causal attention never sees them,
            and are masked.
        packed: the model reads the rollouts one after another, on one row; else side by side, padded to the longest.
        token_rows, target_rows: name -> one array per index, `[R]` or (of targets) `[R, ...]`, response-aligned,
            already fetched for `indices`. float16, int16 and uint8 stay (what is packed is unpacked on the device);
            other floating types become float32, other integer types int64.
        seq_rows: name -> `[b]` values, by the same types.
        trained: bool `[b]`, rows whose responses the `loss_mask` holds; None for all.
        context_parallel: this process's rank and their number.

    Returns:
        CPU tensors; `s` is max(P + R) - 1 rounded up.

    Raises:
        RolloutError: a row's values don't fit its response (names rollout and field).
    """
    rows = np.asarray(indices, dtype=np.int64)
    assert rows.ndim == 1 and rows.size, "a batch needs at least one row"
    prompt_lengths, response_lengths = rollouts.prompt_lengths[rows], rollouts.response_lengths[rows]
    input_lengths = prompt_lengths + response_lengths - 1
    length = -(-int(input_lengths.max()) // padding.total) * padding.total
    for name, values in {**(token_rows or {}), **(target_rows or {})}.items():
        _check_rows(rollouts, rows, name, values, response_lengths)

    segments = None
    if packed:
        segments = padding.pack_lengths(input_lengths).tolist()
        if rest := -sum(segments) % padding.total:
            segments.append(rest)  # padding tokens of no rollout
        held = _held_of_pack(segments, *context_parallel)
    else:
        positions = rank_positions(length, *context_parallel).numpy() if context_parallel[1] > 1 else np.arange(length)
        # The order of Megatron's hidden states: position by position, of each all rows.
        held = np.tile(np.arange(rows.size), positions.size), positions.repeat(rows.size)
    row_of, position_of = held
    is_row = row_of < rows.size
    row_of = np.where(is_row, row_of, 0)
    is_input = is_row & (position_of < input_lengths[row_of])
    is_response = is_input & (position_of >= prompt_lengths[row_of] - 1)
    if trained is not None:
        is_response &= trained[row_of]

    # Each row's tokens one after another: what is read at a position is there, and the label is the one after it.
    lengths = input_lengths + 1
    flat = np.concatenate(
        [part for row in rows for part in (rollouts.prompt_tokens(row), rollouts.response_tokens(row))]
    )
    places = np.where(is_input, (np.cumsum(lengths) - lengths)[row_of] + position_of, 0)
    tokens = np.where(is_input, flat[places], pad_token_id).astype(np.int64)
    found = np.flatnonzero(is_response)
    in_response = position_of[found] - (prompt_lengths[row_of[found]] - 1)
    order = (np.cumsum(response_lengths) - response_lengths)[row_of[found]] + in_response

    grid = np.arange(length)
    starts = prompt_lengths - 1
    mask = (grid >= starts[:, None]) & (grid < input_lengths[:, None])
    if trained is not None:
        mask &= trained[:, None]
    if packed:
        shaped = [torch.from_numpy(values)[None] for values in (tokens, position_of)]
    else:
        shaped = [torch.from_numpy(values.reshape(-1, rows.size).T.copy()) for values in (tokens, position_of)]
    return Batch(
        tokens=shaped[0],
        position_ids=shaped[1],
        row_indices=torch.from_numpy(rows.copy()),
        loss_mask=torch.from_numpy(mask.astype(np.float32)),
        response_positions=torch.from_numpy(found),
        response_places=torch.from_numpy(row_of[found] * length + position_of[found]),
        labels=torch.from_numpy(flat[places[found] + 1].astype(np.int64)),
        token_rows={name: scatter_response_rows(values, starts, length) for name, values in (token_rows or {}).items()},
        seq_rows={name: _seq_tensor(name, values, rows.size) for name, values in (seq_rows or {}).items()},
        target_rows={name: _response_tensor(values)[order] for name, values in (target_rows or {}).items()},
        segments=None if segments is None else tuple(segments),
        segment_ends=None if segments is None else torch.tensor([0, *accumulate(segments)], dtype=torch.int32),
    )


def _held_of_pack(segments: Sequence[int], rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each token that a context-parallel rank holds of a pack: which segment's it is, and its position in it."""
    positions = [rank_positions(n, rank, size).numpy() if size > 1 else np.arange(n) for n in segments]
    return np.arange(len(segments)).repeat([len(part) for part in positions]), np.concatenate(positions)


def scatter_response_rows(rows: Sequence[np.ndarray], starts: np.ndarray | Sequence[int], length: int) -> Tensor:
    """Places response-aligned rows on the grid.

    Args:
        rows: b arrays `[R_i]`.
        starts: int `[b]`, the position predicting the first response token, P_i - 1.
        length: s.

    Returns:
        `[b, s]`, of `collate`'s types, 0 outside the responses.
    """
    grid = np.zeros((len(rows), length), dtype=_kept_type(rows[0]))
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        grid[b, start : start + len(row)] = row
    return torch.from_numpy(grid)


def _response_tensor(rows: Sequence[np.ndarray]) -> Tensor:
    """Response-aligned rows one after another, of `collate`'s types."""
    return torch.from_numpy(np.concatenate(rows).astype(_kept_type(rows[0]), copy=False))


def _kept_type(row: np.ndarray) -> np.dtype:
    dtype = np.asarray(row).dtype
    return dtype if dtype in _PACKED else np.dtype(np.float32 if dtype.kind == "f" else np.int64)


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
    layout: Layout
    context_parallel: tuple[int, int] = (0, 1)
    """This process's rank and their number."""
    token_rows: Mapping[str, TokenRow] = field(default_factory=dict)
    target_rows: Mapping[str, TokenRow] = field(default_factory=dict)
    sequence_rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Per-rollout values `[N]`, such as rewards and advantages."""
    trained: np.ndarray | None = None
    """bool `[N]`, the rollouts whose responses count; None for all."""

    def batch(self, indices: np.ndarray) -> Batch:
        """The micro-batch of these rows of the rollouts, on the device."""
        return _to_device(self._collate(indices))

    def _collate(self, indices: np.ndarray, is_filler: bool = False) -> Batch:
        if not len(indices):  # an empty pack: the least that a model can read
            indices, is_filler = np.array([np.argmin(self.rollouts.lengths)]), True
        # Rollout by rollout, since several values of one may come from the same row of a cache.
        named = {**self.token_rows, **self.target_rows}
        rows = [{name: row(int(i)) for name, row in named.items()} for i in indices]
        trained = None if self.trained is None else self.trained[indices]
        if is_filler:
            trained = np.zeros(len(indices), dtype=bool)
        batch = collate(
            self.rollouts,
            indices,
            pad_token_id=0,
            padding=Padding.of(self.layout),
            packed=self.layout.pack_tokens is not None,
            token_rows={name: [row[name] for row in rows] for name in self.token_rows},
            target_rows={name: [row[name] for row in rows] for name in self.target_rows},
            seq_rows={name: values[indices] for name, values in self.sequence_rows.items()},
            trained=trained,
            context_parallel=self.context_parallel,
        )
        return batch if platform.is_cpu() else batch.pinned()

    def replay(self, micro_batches: Iterator[np.ndarray]) -> Iterator[Batch]:
        """The micro-batches of these rows of the rollouts.

        The next ones are read and collated on a thread of their own while the model works on this one.
        """
        with Prefetch(map(self._collate, micro_batches)) as ahead:
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


def length_groups(lengths: np.ndarray, max_tokens: int, multiple: int) -> list[np.ndarray]:
    """Rows sorted by length, longest first, cut into groups of at most `max_tokens` tokens with padding.

    Args:
        lengths: `[N]`, prompt and response; a model reads one token less.
        max_tokens: of a group; a rollout that is longer has one of its own.
        multiple: what lengths are rounded up to.
    """
    order = np.argsort(-lengths, kind="stable")
    padded = -(-(lengths[order] - 1) // multiple) * multiple
    groups, start = [], 0
    while start < len(order):
        count = max(1, max_tokens // max(1, int(padded[start])))
        groups.append(order[start : start + count])
        start += count
    return groups


def packer(layout: Layout, lengths: np.ndarray, attention_length: float) -> Packer:
    """How rollouts are dealt to packs.

    Args:
        lengths: `[N]`, prompt and response; a model reads one token less.
        attention_length: tokens of a sequence whose attention costs what everything else of the model costs.
    """
    assert layout.pack_tokens is not None
    padding = Padding.of(layout)
    tokens = padding.pack_lengths(lengths - 1)
    # A pack is rounded up as a whole as well.
    return Packer(tokens, tokens * (1 + tokens / attention_length), layout.pack_tokens // padding.total * padding.total)


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
