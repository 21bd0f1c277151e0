"""Meters: memory, what autograd keeps, collectives, time, and the two rates that the floor is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from benchmarks.inputs import Context

SETTLING_SECONDS = 0.05

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_to_all", "all_to_all_single", "broadcast", "reduce", "gather", "scatter"),
)
"""Functions of `torch.distributed` that are counted. A barrier moves nothing."""


class MemoryMeter:
    """Bytes of tensors on a device beyond those that were there when the meter was made.

    On CUDA devices the allocator's own statistics. On a CPU every allocation and release of PyTorch's allocator, as the
    profiler records them, summed up in the order of time: exact to the byte, with the temporaries inside of an
    operator; blind to what libraries take past that allocator (a matrix product's scratch space, gloo's buffers).

    Tensors that are counted must be released by this thread, inside of a `watch`, or stay until the last one is over.

    Attributes:
        live: at the end of the last `watch`.
        peak: the most at any moment of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.live = 0
        self.peak = 0
        self._device = device
        self._start = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._start
            self.live = torch.cuda.memory_allocated(self._device) - self._start
            return
        with profile(profile_memory=True) as profiler:
            yield
        assert profiler.kineto_results is not None
        events = [(e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        self.peak = self.live
        for _, size in sorted(events, key=lambda event: event[0]):
            self.live += size
            self.peak = max(self.peak, self.live)


class SavedTensors(saved_tensors_hooks):
    """Counts the memory that autograd keeps for backward while it is entered, each piece once, inputs left out.

    Attributes:
        storages: bytes of each piece, by its address.
    """

    def __init__(self, inputs: set[int]) -> None:
        self.storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


class Collectives:
    """Notes the calls of `torch.distributed`'s collectives while it is entered.

    After each it waits a little: gloo's thread may hold the tensors for a moment longer than the call takes, and where
    it is the last to hold them a `MemoryMeter` doesn't see the release. So nothing is timed while this is entered.

    Attributes:
        calls: their names in order; those that reduce name the operation, as in `all_reduce(SUM)`.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> Collectives:
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(dist, name, self._noting(name, original))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        place = {"all_reduce": 1, "reduce": 2, "reduce_scatter": 2, "reduce_scatter_tensor": 2}.get(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            label = name
            if place is not None:
                operation = kwargs.get("op", args[place] if len(args) > place else dist.ReduceOp.SUM)
                label += f"({str(operation).rsplit('.', 1)[-1]})"
            self.calls.append(label)
            result = original(*args, **kwargs)
            time.sleep(SETTLING_SECONDS)
            return result

        return call


def timed(call: Callable[[], Any], context: Context) -> tuple[float, Any]:
    """Seconds until the device is done, and the result."""
    start = time.perf_counter()
    result = call()
    context.synchronize()
    return time.perf_counter() - start, result


class Rates:
    """How fast this device copies and multiplies, at the best that was seen so far; on a CPU with all ranks at work at
    once, as they are when they compute.

    Args:
        ranks: that share the device's memory, on a CPU.
        dtypes: of the matrix products.
    """

    WARM_UP = 3

    def __init__(self, context: Context, ranks: int, dtypes: Iterable[torch.dtype]) -> None:
        on_gpu = context.device.type == "cuda"
        self._context = context
        self._source = torch.ones(2**30 if on_gpu else 2**27 // ranks, dtype=torch.uint8, device=context.device)
        self._copy = torch.empty_like(self._source)
        rows, inner, columns = (8192, 4096, 8192) if on_gpu else (1024 // ranks, 1024, 4096)
        self._operations = 2 * rows * inner * columns
        self._factors = {
            dtype: tuple(
                torch.ones(shape, dtype=dtype, device=context.device) for shape in ((rows, inner), (inner, columns))
            )
            for dtype in dtypes
        }
        self._seconds: dict[torch.dtype | None, float] = {}
        for _ in range(self.WARM_UP):
            for dtype in (None, *self._factors):
                self.sample(dtype)

    def sample(self, dtype: torch.dtype | None) -> None:
        """Times one copy (None) or one product; every rank does so at the same time."""
        call = self._copy_once if dtype is None else partial(torch.mm, *self._factors[dtype])
        self._context.barrier()
        seconds = self._context.over_ranks([timed(call, self._context)[0]])[0]
        self._seconds[dtype] = min(seconds, self._seconds.get(dtype, seconds))

    def _copy_once(self) -> None:
        self._copy.copy_(self._source)

    @property
    def bytes_per_second(self) -> float:
        """Read and written by a copy."""
        return 2 * self._source.numel() / self._seconds[None]

    def operations_per_second(self, dtype: torch.dtype) -> float:
        """Of a matrix product; a multiplication and an addition are two."""
        return self._operations / self._seconds[dtype]
