"""The measurement of one case on one rank: every implementation on the same inputs, their runs taken in turns."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import DTYPES, PASSES, Case
from benchmarks.implementations import (
    FLOOR,
    NO_DIVERGENCE,
    STRAIGHTFORWARD,
    Implementation,
    Runner,
    implementations,
)
from benchmarks.inputs import Context, Inputs, make_inputs
from benchmarks.measure import Collectives, MemoryMeter, Rates, SavedTensors, timed
from benchmarks.records import Record

AGREEMENT = 0.02
"""How far mean divergence and norm of the gradient may be from the straightforward ones, relative: bf16 keeps 8 bits.
What differs by more computes something else, and its time says nothing."""


class DisagreementError(RuntimeError):
    """Two implementations of a case don't compute the same."""


@dataclass(frozen=True)
class Probe:
    """What one run that isn't timed tells about an implementation; see `Record` for the fields."""

    peak_forward: int
    peak_backward: int
    gradient_bytes: int
    saved_bytes: int
    calls_forward: tuple[str, ...]
    calls_backward: tuple[str, ...]
    divergence: float
    gradient_norm: float


@dataclass(frozen=True)
class Bench:
    """Measures cases on one rank; all ranks call the same in the same order.

    Attributes:
        template: of the records: device, threads, repeats.
        memory: bytes that this rank may use.
        available: what can run here, by name; `reasons` says why the others can't.
        rates: what the floor is made of.
    """

    context: Context
    template: Record
    memory: int
    available: dict[str, Implementation]
    reasons: dict[str, str]
    rates: Rates

    @classmethod
    def prepare(cls, context: Context, cases: list[Case], template: Record, memory: int) -> Bench:
        """Finds out what can run and takes first samples of the two rates."""
        wanted = [x for x in implementations() if any(x.applies(case) for case in cases)]
        missing = {x.name: x.missing(context.device) for x in wanted}
        ranks = cases[0].tp
        dtypes = dict.fromkeys(DTYPES[case.dtype] for case in cases if case.policy == "hidden")
        return cls(
            context,
            template,
            memory,
            {x.name: x for x in wanted if missing[x.name] is None},
            {name: reason for name, reason in missing.items() if reason is not None},
            Rates(context, ranks, dtypes),
        )

    def measure(self, case: Case) -> tuple[list[Record], list[str]]:
        """The records of a case, and what was left out because it wouldn't fit into memory."""
        compared = [x for x in self.available.values() if x.applies(case)]
        too_large = [x for x in compared if x.memory(case) > self.memory]
        skipped = [
            f"{x.name}: about {x.memory(case) / 2**30:.1f} GiB don't fit into {self.memory / 2**30:.1f} GiB"
            for x in too_large
        ]
        compared = [x for x in compared if x not in too_large]
        if all(x.name in NO_DIVERGENCE for x in compared):
            return [], skipped
        inputs = make_inputs(case, self.context)
        runners = {x.name: x.build(case, inputs) for x in compared}
        # Garbage of before would be released in the middle of a probe, and be counted against it.
        gc.collect()
        gc.disable()
        try:
            probes = {x.name: self._probe(x, runners[x.name], inputs) for x in compared}
        finally:
            gc.enable()
        check_agreement(case, probes)
        times = self._times(case, runners)
        records = [
            self._record(case, name, index, probe, [run[index] for run in times[name]])
            for name, probe in probes.items()
            for index in range(len(PASSES))
        ]
        return records + self._floor(case), skipped

    def _probe(self, implementation: Implementation, runner: Runner, inputs: Inputs) -> Probe:
        forward, backward = runner
        if self.context.device.type == "cuda":
            backward(forward())  # kernels are compiled and libraries take their workspace, which isn't ours to count
        self.context.barrier()
        meter, saved = MemoryMeter(self.context.device), SavedTensors(inputs.storages())
        with Collectives() as in_forward, saved, meter.watch():
            result = forward()
        peak_forward = meter.peak
        with Collectives() as in_backward, meter.watch():
            gradient = backward(result)
        size = sum(x.untyped_storage().nbytes() for x in gradient)
        if implementation.name in NO_DIVERGENCE:
            size = 0  # written into memory that was there before
        peaks = self.context.over_ranks([peak_forward, meter.peak, saved.total])
        return Probe(
            peak_forward=int(peaks[0]),
            peak_backward=int(peaks[1]),
            gradient_bytes=size,
            saved_bytes=int(peaks[2]),
            calls_forward=tuple(in_forward.calls),
            calls_backward=tuple(in_backward.calls),
            divergence=self._mean(result, implementation.partial),
            gradient_norm=self._norm(gradient[0], shared=inputs.logits is None),
        )

    def _mean(self, result: Tensor, is_part: bool) -> float:
        mean = float(result.detach().double().mean())
        return self.context.over_ranks([mean], dist.ReduceOp.SUM)[0] if is_part else mean

    def _norm(self, gradient: Tensor, shared: bool) -> float:
        """Of the gradient of all columns, or of what every rank has the same of."""
        squares = float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)) ** 2
        return (squares if shared else self.context.over_ranks([squares], dist.ReduceOp.SUM)[0]) ** 0.5

    def _times(self, case: Case, runners: dict[str, Runner]) -> dict[str, list[tuple[float, float]]]:
        """Seconds of forward and of both passes, for each run; a round runs every implementation once, and takes a
        sample of the device's rates."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        for _ in range(self.template.repeats):
            self.rates.sample(None)
            if case.policy == "hidden":
                self.rates.sample(DTYPES[case.dtype])
            for name, (forward, backward) in runners.items():
                self.context.barrier()
                first, result = timed(forward, self.context)
                second, gradient = timed(partial(backward, result), self.context)
                del result, gradient
                slowest = self.context.over_ranks([first, first + second])
                times[name].append((slowest[0], slowest[1]))
        return times

    def _record(self, case: Case, name: str, index: int, probe: Probe, seconds: list[float]) -> Record:
        backward = index == 1
        extra = probe.peak_forward
        if backward:
            extra = max(extra, probe.peak_backward - probe.gradient_bytes)
        return replace(
            self.template,
            implementation=name,
            case=case,
            passed=PASSES[index],
            seconds=statistics.median(seconds),
            seconds_low=min(seconds),
            seconds_high=max(seconds),
            extra_bytes=extra,
            peak_bytes=max(probe.peak_forward, probe.peak_backward) if backward else probe.peak_forward,
            saved_bytes=probe.saved_bytes,
            calls_forward=probe.calls_forward,
            calls_backward=probe.calls_backward if backward else (),
            divergence=None if name in NO_DIVERGENCE else probe.divergence,
        )

    def _floor(self, case: Case) -> list[Record]:
        """What no implementation can be faster than, in both passes: the larger of the two times that moving every byte
        and doing every operation take at the rates of this device."""
        records = []
        for passed in PASSES:
            seconds = case.moved_bytes(passed) / self.rates.bytes_per_second
            if case.policy == "hidden":
                seconds = max(seconds, case.operations(passed) / self.rates.operations_per_second(DTYPES[case.dtype]))
            records.append(
                replace(
                    self.template,
                    implementation=FLOOR,
                    case=case,
                    passed=passed,
                    seconds=seconds,
                    seconds_low=seconds,
                    seconds_high=seconds,
                )
            )
        return records


def check_agreement(case: Case, probes: dict[str, Probe]) -> None:
    """Raises `DisagreementError` where an implementation's divergence or gradient isn't that of the others."""
    compared = {name: probe for name, probe in probes.items() if name not in NO_DIVERGENCE}
    expected = compared.get(STRAIGHTFORWARD, next(iter(compared.values())))
    for name, probe in compared.items():
        for what in ("divergence", "gradient_norm"):
            found, wanted = getattr(probe, what), getattr(expected, what)
            if not abs(found - wanted) <= AGREEMENT * abs(wanted):
                raise DisagreementError(f"{case.title}: {name} has a {what} of {found:.6g}, others {wanted:.6g}")
