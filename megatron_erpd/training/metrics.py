"""Metrics as `(sum, count)` pairs on their way to Megatron, and as JSON lines on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LOGGED = ("learning-rate", "grad-norm", "iteration-time", "world-size")


def report(prefix: str, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Megatron's report of a micro-batch: name to `[sum, count]`, which it adds up over DP x CP and divides once."""
    return {
        f"{prefix}/{name}": torch.stack([total.detach().float(), count.detach().to(total.device).float()])
        for name, (total, count) in metrics.items()
    }


def token_mean(values: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the trained tokens' values; masked values may be anything."""
    mask = loss_mask > 0
    return torch.where(mask, values, 0.0).sum(), mask.sum()


class JsonLinesWriter:
    """Stands before Megatron's TensorBoard writer and keeps each step's scalars as one JSON line.

    Megatron writes scalars on the last rank only; this object exists there and passes everything on. Lines of
    iterations that a resumed run does again are dropped when it does them again.
    """

    def __init__(self, path: Path, inner: Any) -> None:
        self._path = path
        self._inner = inner
        self._row: dict[str, float] = {}
        self._started = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add_scalar(self, name: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        self._inner.add_scalar(name, value, step, *args, **kwargs)
        if "/" not in name and name not in _LOGGED or " vs " in name:
            return
        if self._row and self._row["iteration"] != step:
            self.flush()
        self._row.setdefault("iteration", int(step))
        self._row[name] = float(value)

    def flush(self) -> None:
        self._inner.flush()
        if not self._row:
            return
        if not self._started:
            self._started = True
            keep_before(self._path, int(self._row["iteration"]))
        with self._path.open("a") as file:
            file.write(json.dumps(self._row) + "\n")
        self._row = {}


def keep_before(path: Path, iteration: int) -> None:
    """Drops the lines of a JSON-lines file from `iteration` on (and a last line cut short by a kill)."""
    if not path.is_file():
        return
    kept = [row for row in read_json_lines(path) if row["iteration"] < iteration]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
