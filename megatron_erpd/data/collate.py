"""From rollouts to the tensors a model reads: the one place where tokens are shifted and padded.

The grid is *label-aligned*. For a rollout of P prompt and R response tokens the model reads (prompt + response)[:-1]
and predicts (prompt + response)[1:]; `loss_mask[t] = 1` exactly where `labels[t]` is a response token, that is at
positions [P-1, P-1+R). A value per response token (a log-prob, a top-k row) lives at the position that predicts it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_erpd.errors import RolloutError

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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = change(value)
            elif isinstance(value, dict):
                moved[item.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **moved)


def collate(
    rollouts: TokenSource,
    indices: np.ndarray | Sequence[int],
    *,
    pad_token_id: int,
    pad_multiple: int = 1,
    pad_to: int | None = None,
    token_rows: Mapping[str, Sequence[np.ndarray]] | None = None,
    seq_rows: Mapping[str, np.ndarray | Sequence[float]] | None = None,
) -> Batch:
    """Shifts, aligns and pads these rollouts.

    Args:
        rollouts: where the tokens are.
        indices: int `[b]`, rows of `rollouts`.
        pad_token_id: a valid token id; padded positions come after the row, so causal attention never sees them,
            and are masked.
        pad_multiple: the sequence length is rounded up to a multiple of it (sequence parallelism needs a multiple of
            the tensor-parallel size).
        pad_to: a fixed sequence length instead of the longest row's (for pipelines with static shapes).
        token_rows: name -> one array per index, `[R]` or `[R, ...]`, response-aligned, already fetched for `indices`.
            float16, int16 and uint8 stay (what is packed is unpacked on the device); other floating types become
            float32, other integer types int64.
        seq_rows: name -> `[b]` values, by the same types.

    Returns:
        CPU tensors; `s` is max(P + R) - 1 rounded up, or `pad_to`.

    Raises:
        RolloutError: a row's values don't fit its response, or it is longer than `pad_to` (names rollout and field).
    """
    rows = np.asarray(indices, dtype=np.int64)
    assert rows.ndim == 1 and rows.size, "a batch needs at least one row"
    prompt_lengths, response_lengths = rollouts.prompt_lengths[rows], rollouts.response_lengths[rows]
    input_lengths = prompt_lengths + response_lengths - 1
    length = _sequence_length(rollouts, rows, input_lengths, pad_multiple, pad_to)

    # One padded buffer of length s + 1 serves tokens and labels: they are its two shifts.
    padded = np.full((rows.size, length + 1), pad_token_id, dtype=np.int64)
    for b, row in enumerate(rows):
        middle, end = prompt_lengths[b], prompt_lengths[b] + response_lengths[b]
        padded[b, :middle] = rollouts.prompt_tokens(row)
        padded[b, middle:end] = rollouts.response_tokens(row)
    positions = np.arange(length)
    inside = positions < input_lengths[:, None]
    loss_mask = inside & (positions >= prompt_lengths[:, None] - 1)
    # A shorter row's last token is a label only: it is no input of the model, even where there is room for it.
    tokens = np.where(inside, padded[:, :-1], pad_token_id)

    starts = prompt_lengths - 1
    grids = {}
    for name, values in (token_rows or {}).items():
        _check_rows(rollouts, rows, name, values, response_lengths)
        grids[name] = scatter_response_rows(values, starts, length)
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(padded[:, 1:].copy()),
        position_ids=torch.arange(length).expand(rows.size, length).contiguous(),
        loss_mask=torch.from_numpy(loss_mask.astype(np.float32)),
        row_indices=torch.from_numpy(rows.copy()),
        token_rows=grids,
        seq_rows={name: _seq_tensor(name, values, rows.size) for name, values in (seq_rows or {}).items()},
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


def _sequence_length(
    rollouts: TokenSource, rows: np.ndarray, input_lengths: np.ndarray, pad_multiple: int, pad_to: int | None
) -> int:
    assert pad_multiple >= 1
    longest = int(input_lengths.max())
    if pad_to is None:
        return -(-longest // pad_multiple) * pad_multiple
    assert pad_to % pad_multiple == 0, f"pad_to {pad_to} isn't a multiple of pad_multiple {pad_multiple}"
    if longest > pad_to:
        row = int(rows[input_lengths.argmax()])
        raise RolloutError(
            f"{rollouts.location(row)}: {longest + 1} tokens don't fit a sequence length of {pad_to} "
            f"(prompt + response - 1); raise the sequence length or drop the rollout"
        )
    return pad_to


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
