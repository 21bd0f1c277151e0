"""What the measurements are held against, and whether they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.cases import HEADLINE_TOKENS, HEADLINE_VOCAB, PASSES, Case
from benchmarks.implementations import (
    FLOOR,
    FUSED_PLAIN,
    FUSED_TRITON,
    PEERS,
    PLAIN,
    PRODUCTS_REMADE,
    STRAIGHTFORWARD,
    TRITON,
)
from benchmarks.records import Figures

Found = Iterator[tuple[str, float]]
"""A case in words, and the ratio that was measured."""


@dataclass(frozen=True)
class Target:
    """A ratio that is to be at most (or at least) `limit`.

    Attributes:
        device: a part of the name that the device must have, or `cpu` for every CPU.
        ratios: what of the figures it speaks of.
    """

    text: str
    device: str
    limit: float
    ratios: Callable[[Figures], Found]
    at_least: bool = False

    def concerns(self, device: str, device_name: str) -> bool:
        return self.device == device or (device == "cuda" and self.device in device_name)

    def holds(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def verdict(self, figures: Figures) -> str:
        """`met`, `missed` or `open`, with the worst case."""
        found = list(self.ratios(figures))
        if not found:
            return "open: none of the measured cases is one of these"
        label, worst = (min if self.at_least else max)(found, key=lambda pair: pair[1])
        several = f", the worst of {len(found)}" if len(found) > 1 else ""
        return f"**{'met' if self.holds(worst) else 'missed'}**: {worst:.2f}x ({label}{several})"


def _words(case: Case) -> str:
    return f"{case.kind} against {case.target}, V={case.vocab:,}, n={case.tokens:,}, TP {case.tp}, {case.dtype}"


def _headline(figures: Figures) -> Iterator[Case]:
    for case in figures.cases():
        size = (case.policy, case.target, case.vocab, case.tokens, case.tp)
        if size == ("logits", "full", HEADLINE_VOCAB, HEADLINE_TOKENS, 1):
            yield case


def _headline_ratios(figures: Figures, of_memory: bool) -> Found:
    for case in _headline(figures):
        for passed in PASSES:
            record = figures.find(case, passed, PLAIN)
            if record is None:
                continue
            ratio = figures.memory_ratio(record) if of_memory else figures.time_ratio(record, STRAIGHTFORWARD)
            if ratio is not None:
                yield f"{_words(case)}, {passed}", ratio


def _headline_time(figures: Figures) -> Found:
    return _headline_ratios(figures, of_memory=False)


def _headline_memory(figures: Figures) -> Found:
    return _headline_ratios(figures, of_memory=True)


def _against_floor(figures: Figures) -> Found:
    """Logits that exist, large enough for the launch of kernels to be nothing."""
    for case in figures.cases():
        record = figures.find(case, "forward+backward", TRITON)
        if record and case.policy == "logits" and case.tokens * case.width >= 2**27:
            ratio = figures.time_ratio(record, FLOOR)
            if ratio is not None:
                yield _words(case), ratio


def _against_peers(figures: Figures) -> Found:
    for case in figures.cases():
        record = figures.find(case, "forward+backward", TRITON)
        if record is None or case.policy != "logits":
            continue
        for name in (STRAIGHTFORWARD, *PEERS):
            peer = figures.find(case, "forward+backward", name)
            if peer is not None:
                yield f"{name}, {_words(case)}", peer.seconds / record.seconds


def _fused_against_products(figures: Figures) -> Found:
    for case in figures.cases():
        record = figures.find(case, "forward+backward", FUSED_TRITON)
        record = record or figures.find(case, "forward+backward", FUSED_PLAIN)
        ratio = figures.time_ratio(record, PRODUCTS_REMADE) if record else None
        if ratio is not None:
            yield _words(case), ratio


_SIZE = f"V={HEADLINE_VOCAB:,}, {HEADLINE_TOKENS:,} tokens, full target"

TARGETS = (
    Target(f"CPU: at most 0.5x the time of the straightforward implementation ({_SIZE})", "cpu", 0.5, _headline_time),
    Target(f"CPU: at most 0.3x its extra memory ({_SIZE})", "cpu", 0.3, _headline_memory),
    Target("H100: forward+backward of existing logits within 1.3x of the bandwidth floor", "H100", 1.3, _against_floor),
    Target(
        "H100: forward+backward of existing logits at least 3x faster than every other implementation",
        "H100",
        3.0,
        _against_peers,
        at_least=True,
    ),
    Target(
        "H100: fused forward+backward at most 1.15x the time of its matrix products alone",
        "H100",
        1.15,
        _fused_against_products,
    ),
)
