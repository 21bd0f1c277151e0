"""What is replaced in Megatron and PyTorch: nothing elsewhere in the package, and nothing that is computed on a GPU.

Three replacements hold on every machine, as Megatron has no other door for them: `skip_compiling_helpers`,
`wrap_tensorboard_writer` and `save_optimizer_without_padding`, which corrects what a checkpoint is made of. All others
are for a machine without a CUDA device.

Megatron-Core and `megatron.training` are written for CUDA: they ask `torch.cuda` for a current device,
pass `device="cuda"` to factory functions, keep CUDA random states and time with CUDA events. `enable_cpu()`
gives them a CPU instead. It is called once per process before Megatron is imported, does nothing where CUDA
works, and has two parts:

1. A `TorchFunctionMode` which turns a CUDA `device=` argument (and `.cuda()`, `.to("cuda")`) into the CPU. It
   covers every tensor factory in one place.
2. Stand-ins for the few attributes of `torch.cuda` that Megatron calls outside of tensor functions: devices,
   streams, events, synchronisation, random states and memory statistics.

`torch.cuda.is_available()` stays False on purpose: PyTorch's own code (pinned memory in a DataLoader, the
profiler) asks it before it reaches for the driver. `torch.cuda.device_count()` says 1, because Megatron sets up
its process groups and seeds only when there is a device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import queue
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU_MEGATRON_FLAGS: dict[str, object] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "attention_backend": "unfused",
    "no_gradient_accumulation_fusion": True,
    "no_masked_softmax_fusion": True,
    "no_bias_swiglu_fusion": True,
    "no_bias_dropout_fusion": True,
    "no_rope_fusion": True,
    "use_cpu_initialization": True,
}
"""Megatron flags that a CPU needs: no fused kernel of CUDA, Apex or Transformer Engine, gloo for collectives."""

_CPU = torch.device("cpu")
_enabled = False


def is_cpu() -> bool:
    """Whether this process has no CUDA device and runs Megatron on its CPU stand-ins."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device that models and batches live on: the current CUDA device, or the CPU."""
    return _CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def distributed_backend() -> str:
    """The collective library for this machine: `nccl` with CUDA, `gloo` without."""
    return "gloo" if is_cpu() else "nccl"


def enable_cpu() -> bool:
    """Prepare this process for Megatron on a CPU; returns whether it is one.

    Idempotent, and without effect where a CUDA device is present. Must run before the first import of
    `megatron`, because Megatron reads `TORCHDYNAMO_DISABLE` and binds some functions at import.
    """
    global _enabled
    if not is_cpu():
        return False
    if not _enabled:
        _enabled = True
        # The jit fusers would start dynamo on a CUDA device; left as they are, functions also import seconds faster.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        torch.compile = _do_not_compile  # type: ignore[assignment]
        _replace_torch_cuda()
        _CpuInsteadOfCuda().__enter__()
    return True


def skip_compiling_helpers() -> None:
    """Keeps Megatron from compiling its data set helpers, which its wheel holds compiled.

    The wheel has no Makefile: Megatron would call make, fail and exit.
    """
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def wrap_tensorboard_writer(wrap: Callable[[Any], Any]) -> None:
    """Puts `wrap(writer)` in the place of Megatron's TensorBoard writer, on the rank that has one."""
    from megatron.training import global_vars

    writer = global_vars.get_tensorboard_writer()
    if writer is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER = wrap(writer)


def save_optimizer_without_padding() -> None:
    """Lets a checkpoint of the distributed optimizer hold every parameter's own state; idempotent.

    Megatron pads the end of each bucket of its buffers, to a multiple of the data-parallel size and of 128 entries. For
    a checkpoint of type `fully_reshardable` it gathers the state without this padding, but then takes each parameter
    from its place with it (megatron-core 0.19.2): after the first padded bucket the master weights and moments of a
    parameter are its neighbour's, at the end zeros, and a training that resumes goes on from these. There are several
    buckets with `--overlap-grad-reduce`, and on the last pipeline stage of a model with tied embeddings. While it looks
    it is given the places without padding.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def without_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = _without_padding(buffer)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    DistributedOptimizer.sharded_param_state_fully_reshardable = without_padding


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """A buffer's parameters to (start, end, bucket), as if its buckets followed each other without padding."""
    ends = itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
    padding = [bucket.offset - start for bucket, start in zip(buffer.buckets, ends, strict=False)]
    return {
        parameter: (start - padding[bucket], end - padding[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def pretrain_on_cpu(args: argparse.Namespace) -> None:
    """Lets `megatron.training`'s `pretrain` run where there is no CUDA device; without effect where there is one.

    `pretrain` starts Megatron itself and would refuse the machine. Its synchronous saves of checkpoints pass their
    results through a helper process, which only asynchronous saves need: it starts with the first save and imports all
    of this anew, seconds for every rank, which is much of a small run on a CPU. They pass them on in this process.
    """
    if not is_cpu():
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import initialize, training

    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    filesystem_async._results_queue = None if args.async_save else queue.SimpleQueue()
    _load_into_torch_adam()


def _load_into_torch_adam() -> None:
    """Lets the distributed optimizer load a checkpoint into PyTorch's AdamW, which is Adam where there is neither
    Transformer Engine nor Apex; idempotent.

    PyTorch's Adam counts its steps in a tensor of each parameter, the fused ones in one number. Before a checkpoint is
    loaded there are no such tensors, and Megatron (megatron-core 0.19.2) asserts that there are; it looks for them in
    what it has loaded; and it gives all parameters the same one, which then counts each step once for every parameter.
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    read, load, fill = (
        DistributedOptimizer.state_dict,
        DistributedOptimizer.load_state_dict,
        DistributedOptimizer._set_main_param_and_optimizer_states,
    )
    if HAVE_APEX_OR_TE or hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    zeros = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
                    self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        return read(self)

    @functools.wraps(load)
    def load_state_dict(self: Any, state: Any) -> None:
        load(self, state)
        for of_parameter in self.optimizer.state.values():
            of_parameter["step"] = of_parameter["step"].clone()

    @functools.wraps(fill)
    def set_states(self: Any, parameter: Any, tensors: Any) -> None:
        fill(self, parameter, {"step": None, **tensors})

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


class _CpuInsteadOfCuda(TorchFunctionMode):
    """Sends every tensor function's CUDA device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "to" and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if name == "all_to_all_single":
            # The token dispatcher's split sizes become lists on their way from the GPU; here they never were on one.
            kwargs = {key: _as_list(value) if key.endswith("_split_sizes") else value for key, value in kwargs.items()}
        if name == "type" and len(args) == 1 and not kwargs:
            # Megatron's gradient clipping compares `grad.type()` with the names of CUDA tensor types.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _is_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    # Megatron passes the integer from torch.cuda.current_device() as a device.
    return isinstance(value, int) and not isinstance(value, bool)


class _Stream:
    """A CUDA stream's interface on a device where work is done in program order."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Event:
    """A CUDA event's interface, timed with the host's clock."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._time = 0.0

    def record(self, stream: object = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._time - self._time) * 1000.0

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _do_not_compile(model: Any = None, **options: Any) -> Any:
    """`torch.compile` that leaves functions as they are, called or used as a decorator."""
    return (lambda function: function) if model is None else model


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = "cuda") -> None:
    torch.set_rng_state(state.cpu())


def _returning(value: Any) -> Any:
    """A new function that takes anything and gives `value`. New each time: dynamo keeps a table of these functions and
    refuses one under two names."""
    return lambda *args, **kwargs: value


def _replace_torch_cuda() -> None:
    stream = _Stream()
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=0)
    replacements: dict[str, Any] = {
        "device_count": _returning(1),
        "current_device": _returning(_CPU),
        "set_device": _returning(None),
        "get_device_capability": _returning((0, 0)),
        "get_device_properties": _returning(properties),
        "get_device_name": _returning("cpu"),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": _returning(stream),
        "default_stream": _returning(stream),
        "set_stream": _returning(None),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": _returning(None),  # torch.manual_seed calls it after it has seeded the CPU
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "memory_stats": _returning({}),
        "memory_allocated": _returning(0),
        "max_memory_allocated": _returning(0),
        "memory_reserved": _returning(0),
        "max_memory_reserved": _returning(0),
        "device_memory_used": _returning(0),
        "reset_peak_memory_stats": _returning(None),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte"):
        setattr(torch.cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
