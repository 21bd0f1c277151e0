"""Figures: one record for each implementation, case and pass, and the ratios that are made of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Pass
from benchmarks.implementations import FLOOR, STRAIGHTFORWARD


@dataclass(frozen=True)
class Record:
    """What one implementation took for one pass of a case. Of several ranks the largest, of several runs the median.

    Attributes:
        passed: `pass` in the file. `forward` is that of a training step: what backward needs is kept.
        seconds_low, seconds_high: the fastest and the slowest run.
        extra_bytes: the most memory held at any moment beyond the inputs and the gradient of the policy's logits (or of
            its hidden states and output layer), which every implementation is given or must return. The gradient
            counts as there from the beginning of backward, so that what an implementation holds before it has made the
            gradient is counted a little too low, never too high.
        peak_bytes: the same with that gradient.
        saved_bytes: what autograd keeps from forward to backward beyond the inputs.
        collectives_forward, collectives_backward: how many calls; `calls_*` names them.
        divergence: the mean over the tokens in nats, None where there is none.
    """

    implementation: str
    case: Case
    passed: Pass
    device: str
    device_name: str
    threads: int
    repeats: int
    seconds: float
    seconds_low: float
    seconds_high: float
    extra_bytes: int = 0
    peak_bytes: int = 0
    saved_bytes: int = 0
    calls_forward: tuple[str, ...] = ()
    calls_backward: tuple[str, ...] = ()
    divergence: float | None = None

    @property
    def collectives_forward(self) -> int:
        return len(self.calls_forward)

    @property
    def collectives_backward(self) -> int:
        return len(self.calls_backward)

    def as_json(self) -> dict[str, Any]:
        """Flat, the case's fields among the others; `collectives_backward` is 0 for the pass `forward`."""
        fields = dataclasses.asdict(self)
        case, passed = fields.pop("case"), fields.pop("passed")
        first = {"implementation": fields.pop("implementation"), "pass": passed, **case}
        calls = {name: list(fields.pop(name)) for name in ("calls_forward", "calls_backward")}
        counts = {
            "collectives_forward": self.collectives_forward,
            "collectives_backward": self.collectives_backward,
        }
        return {**first, **fields, **counts, **calls}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of `as_json`."""
        case = Case(**{item.name: values[item.name] for item in dataclasses.fields(Case)})
        own = {item.name: values[item.name] for item in dataclasses.fields(cls) if item.name in values}
        calls = {name: tuple(values[name]) for name in ("calls_forward", "calls_backward")}
        return cls(**{**own, **calls, "case": case, "passed": values["pass"]})


class Figures:
    """Records, and how they compare within their case."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records: list[Record] = []
        self._by_key: dict[tuple[Case, Pass, str], Record] = {}
        self.add(records)

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            self.records.append(record)
            self._by_key[record.case, record.passed, record.implementation] = record

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(record.case for record in self.records))

    def names(self, case: Case) -> list[str]:
        """The implementations that there are figures for, the floor last."""
        return list(dict.fromkeys(r.implementation for r in self.records if r.case == case))

    def find(self, case: Case, passed: Pass, name: str) -> Record | None:
        return self._by_key.get((case, passed, name))

    def time_ratio(self, record: Record, other: str) -> float | None:
        """The time of `record` in units of another implementation's; None where there is no such figure."""
        found = self.find(record.case, record.passed, other)
        return record.seconds / found.seconds if found and found.seconds else None

    def memory_ratio(self, record: Record, other: str = STRAIGHTFORWARD) -> float | None:
        """The extra memory of `record` in units of another implementation's."""
        found = self.find(record.case, record.passed, other)
        return record.extra_bytes / found.extra_bytes if found and found.extra_bytes else None

    def summary(self, case: Case) -> str:
        """A line for the terminal: times of forward and backward, and ratios."""
        parts = []
        for name in self.names(case):
            record = self.find(case, "forward+backward", name)
            if record is None:
                continue
            ratio = self.time_ratio(record, STRAIGHTFORWARD)
            compared = "" if ratio is None or name in (STRAIGHTFORWARD, FLOOR) else f" ({ratio:.2f}x)"
            parts.append(f"{name} {seconds_text(record.seconds)}{compared}")
        return ", ".join(parts)

    def write_json(self, path: Path) -> None:
        """A list, one record a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(record.as_json()) for record in self.records)
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_json(path: Path) -> list[Record]:
    """The records that `write_json` wrote."""
    return [Record.from_json(values) for values in json.loads(path.read_text(encoding="utf-8"))]


def seconds_text(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} µs"


def bytes_text(size: float) -> str:
    """Three significant digits in the unit that suits; units are powers of 1024."""
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{_three_digits(size / step)} {unit}"
    return f"{size:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
