"""What is replaced in Megatron and PyTorch: nothing elsewhere in the package, and nothing that is computed on a GPU.

Eight replacements hold on every machine, as Megatron has no other door for them: `skip_compiling_helpers`,
`wrap_tensorboard_writer`, `fuse_gradient_accumulation_without_apex`, `run_micro_batches`, by which a step may
have any number of packs, `save_optimizer_without_padding` and `load_into_torch_adam`, which correct what a checkpoint
is made of and how it is loaded, `save_beside_training`, which makes asynchronous saves end with their training, and
`verify_what_was_recorded`, for bases without Megatron's checksums. All others are for a machine without a CUDA device.

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
import ctypes
import functools
import itertools
import multiprocessing
import os
import queue
import resource
import signal
import time
import types
import weakref
from collections.abc import Callable
from multiprocessing.managers import SyncManager
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


def device_memory() -> int | None:
    """Bytes of a CUDA device of this machine, of several the one with the least; None on a CPU."""
    if is_cpu():
        return None
    return min(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))


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


def fuse_gradient_accumulation_without_apex() -> None:
    """Lets a model of Transformer Engine's layers have gradient accumulation fusion where Apex isn't installed.

    Those layers add the gradients of their weights to `main_grad` with kernels of their own. The output layer is
    Megatron's, which asks for Apex's kernel as soon as it is made (megatron-core 0.19.2); it isn't called, and the head
    that takes its place adds to `main_grad` itself (`vocab_parallel.passes.add_product`).
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import layers

    layers._grad_accum_fusion_available |= HAVE_TE


def run_micro_batches(count: Callable[[], int]) -> None:
    """Has Megatron's schedules run so many micro-batches of each optimizer step.

    Megatron takes the global batch size over micro-batch size and data-parallel size for it, which holds where every
    micro-batch has the same number of rollouts. It goes on counting rollouts by these three: the learning rate's
    schedule and the place in the data are kept in rollouts, whatever the layout.

    Args:
        count: asked before each step; the same on all ranks.
    """
    from megatron.training import training

    original = getattr(training.get_forward_backward_func, "__wrapped__", training.get_forward_backward_func)

    @functools.wraps(original)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        schedule = original(*args, **kwargs)
        return lambda **step: schedule(**step | {"num_microbatches": count()})

    training.get_forward_backward_func = chosen


def wrap_tensorboard_writer(wrap: Callable[[Any], Any]) -> None:
    """Puts `wrap(writer)` in the place of Megatron's TensorBoard writer, on the rank that has one."""
    from megatron.training import global_vars

    writer = global_vars.get_tensorboard_writer()
    if writer is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER = wrap(writer)


WITHOUT_PADDING = "saved_optimizer_without_padding"
"""The argument by which a checkpoint tells that `save_optimizer_without_padding` was in force when it was saved."""


def save_optimizer_without_padding(args: argparse.Namespace) -> None:
    """Lets a checkpoint of the distributed optimizer hold every parameter's own state, and say so; idempotent.

    Megatron pads the end of each bucket of its buffers, to a multiple of the data-parallel size and of 128 entries. For
    a checkpoint of type `fully_reshardable` it gathers the state without this padding, but then takes each parameter
    from its place with it (megatron-core 0.19.2): after the first padded bucket the master weights and moments of a
    parameter are its neighbour's, at the end zeros, and a training that resumes goes on from these. There are several
    buckets with `--overlap-grad-reduce`, and on the last pipeline stage of a model with tied embeddings. While it looks
    it is given the places without padding. Checkpoints hold the arguments, and so `WITHOUT_PADDING`.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    setattr(args, WITHOUT_PADDING, True)
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


def verify_what_was_recorded() -> None:
    """Lets a training with `--verify-integrity` begin from a base that records no checksums in Megatron's way, which
    megatron-core 0.19.2 refuses; idempotent. An import has none, nor has what was trained without the flag; both are
    artifacts, whose manifests have them (`--verify-inputs`).
    """
    from megatron.core.dist_checkpointing import serialization

    verify = serialization.verify_integrity_manifest
    if hasattr(verify, "__wrapped__"):
        return

    @functools.wraps(verify)
    def verify_recorded(folder: str) -> None:
        if os.path.isfile(os.path.join(folder, "integrity.json")):
            verify(folder)

    serialization.verify_integrity_manifest = verify_recorded


def save_beside_training() -> None:
    """Makes Megatron's asynchronous saves (`--async-save`) end with the training, and no earlier; to be called before
    Megatron starts, and once for each training.

    A process of each rank writes its checkpoints. In megatron-core 0.19.2 it is ended by the SIGTERM that asks all
    processes of a stage to save; it outlives a training that is killed, and writes on into the checkpoint that the next
    start makes anew; and its training waits without end for one that was killed, for lack of memory say. Here it
    leaves SIGTERM and SIGINT to the training, is killed with it by the kernel (Linux), and its end is an error, as is a
    checkpoint that can't be sent to it. For the process through which it passes on what it has written the same holds.

    It is a child of the training. On a GPU it is a new interpreter, which reads the tensors from the GPU while the
    training waits; on a CPU a fork, made before the collective library has threads (where the last step is off the save
    interval, Megatron has ended it by then and makes another for the last save), and gets copies of the tensors. What a
    training on GPUs has in the host's memory, the distributed optimizer's state, PyTorch shares with it: in /dev/shm,
    with a file descriptor for each tensor, of which the process may then have as many as the system lets it.
    """
    global _results, _write_loop
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller as Caller

    _results = SyncManager(ctx=multiprocessing.get_context("fork"))
    _results.start(_live_with_parent)
    filesystem_async._results_queue = _results.Queue()
    if _write_loop is not None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _write_loop = Caller.async_loop
    start, schedule, is_done = Caller._get_process, Caller.schedule_async_call, Caller.is_current_async_call_done

    def get_process(rank: int, mp_mode: str = "", cpu_priority: int = 10, io_priority: int | None = None) -> Any:
        process = start(rank, "fork" if is_cpu() else "spawn", cpu_priority, io_priority)
        sent = Caller._persistent_queue
        for waited in (sent, Caller._persistent_preload_q):
            waited.join = functools.partial(_join, weakref.proxy(waited), process)  # its end ends its thread
        # It sends in a thread, which would say what it can't send and leave it out, and the training wait for it.
        sent._on_queue_feeder_error = functools.partial(_end_unsent, type(sent)._on_queue_feeder_error, process)
        return process

    def schedule_copies(self: Any, request: Any) -> None:
        if self.process is not None and not self.process.is_alive():
            raise _ended(self.process)
        if request.preload_fn is not None and is_cpu():
            rank, buckets, results = request.async_fn_args
            request = request._replace(async_fn_args=[rank, list(map(_copied, buckets)), results], preload_fn=None)
        schedule(self, request)

    def is_done_or_lives(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while self.process is not None and self.cur_item is None and self._persistent_comp_q.empty():
            if not self.process.is_alive() and self._persistent_comp_q.empty():
                raise _ended(self.process)
            if not blocking:
                break
            time.sleep(_POLL_SECONDS)
        return is_done(self, blocking, no_dist)

    Caller._get_process = get_process
    Caller.async_loop = _write_checkpoints
    Caller.schedule_async_call = schedule_copies
    Caller.is_current_async_call_done = is_done_or_lives


def end_saves_beside_training() -> None:
    """Ends the processes of asynchronous saves; none is under way unless the training failed."""
    global _results
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller as Caller
    from megatron.training import async_utils, checkpointing

    if (process := Caller._persistent_process) is not None:
        process.kill()
        process.join()
        for sent in (Caller._persistent_queue, Caller._persistent_preload_q):
            sent.cancel_join_thread()  # nobody reads any more what was to be sent
        Caller._persistent_process = Caller._persistent_queue = None
        Caller._persistent_preload_q = Caller._persistent_comp_q = None
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.process = None
        AsyncCallsQueue._persistent_caller = None
    async_utils._async_calls_queue = None
    checkpointing.finalize_deletion_processes(blocking=True)
    filesystem_async._results_queue = None
    if _results is not None:
        _results.shutdown()
        _results = None


_results: SyncManager | None = None
"""Where the processes of asynchronous saves say what they have written."""
_write_loop: Callable[..., None] | None = None
"""Megatron's loop of such a process, as far as it was replaced."""
_POLL_SECONDS = 0.02
_PARENT_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of prctl(2)."""


def _join(waited: Any, process: Any) -> None:
    """`JoinableQueue.join`: waits until the process has done what it was sent.

    Raises:
        RuntimeError: it has ended before.
    """
    while waited._unfinished_tasks.get_value():
        if not process.is_alive() and waited._unfinished_tasks.get_value():
            raise _ended(process)
        time.sleep(_POLL_SECONDS)


def _end_unsent(say: Callable[..., None], process: Any, error: Exception, unsent: Any) -> None:
    """Ends a process that won't get what was sent to it."""
    say(error, unsent)
    process.kill()


def _ended(process: Any) -> RuntimeError:
    how = f"ended with exit code {process.exitcode}"
    return RuntimeError(f"the process that writes checkpoints {how}; the last whole checkpoint is kept")


def _write_checkpoints(*args: Any) -> None:
    """The life of a process that writes a rank's checkpoints."""
    _live_with_parent()
    enable_cpu()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    (_write_loop or PersistentAsyncCaller.async_loop)(*args)


def _live_with_parent() -> None:
    """Ties this process to its parent: it is killed with it, and a signal to all of a stage is the parent's."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # which died before


def _copied(bucket: Any) -> Any:
    """A file's worth of a checkpoint with tensors of its own, which another process gets by value."""
    file, key, (data, tensors) = bucket
    return file, key, (data, [(item, _ByValue(tensor.clone())) for item, tensor in tensors])


class _ByValue:
    """A tensor that is a tensor again when another process has unpickled it: by value, where torch would share its
    memory, with a file descriptor for each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        values = bytearray(self._tensor.reshape(-1).view(torch.uint8).numpy())
        return _tensor_of, (values, self._tensor.dtype, self._tensor.shape)


def _tensor_of(values: bytearray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    # There is no tensor of an empty buffer.
    return torch.frombuffer(values, dtype=dtype).reshape(shape) if values else torch.empty(shape, dtype=dtype)


def pretrain_on_cpu(args: argparse.Namespace) -> None:
    """Lets `megatron.training`'s `pretrain` run where there is no CUDA device; without effect where there is one.

    `pretrain` starts Megatron itself and would refuse the machine. Its synchronous saves of checkpoints pass their
    results through a helper process, which only asynchronous saves need: it starts with the first save and imports all
    of this anew, seconds for every rank, which is much of a small run on a CPU. They pass them on in this process.
    Asynchronous ones get a queue of their own (`save_beside_training`).
    """
    if not is_cpu():
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import initialize, training

    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    if not args.async_save:
        filesystem_async._results_queue = queue.SimpleQueue()


def load_into_torch_adam() -> None:
    """Lets the distributed optimizer load a checkpoint into PyTorch's AdamW, which is Adam where there is neither
    Transformer Engine nor Apex, on a CPU and on a GPU; idempotent.

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
        if kwargs.get("pin_memory"):  # for a copy to the GPU that doesn't wait
            kwargs = {**kwargs, "pin_memory": False}
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
