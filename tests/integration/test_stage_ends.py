"""A training ends with all that it started: however it ends, no thread and no process of its is left."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import threading
import time
from pathlib import Path

from megatron_erpd.errors import StageInterrupted
from tests.distributed.harness import run_ranks
from tests.integration.stages import make_round, run_stages

ENDS = {
    "last step": ([], ""),
    "early stop": (["--max-kl", "1e-9"], ""),
    "signal": ([], StageInterrupted.__name__),
    "interval": (["--", "--exit-interval", "2"], StageInterrupted.__name__),
    "exit": ([], StageInterrupted.__name__),
    "beside": (["--async-save", "--save-interval", "1"], ""),
    "error beside": (["--async-save", "--save-interval", "1"], "RuntimeError: now"),
    "error": ([], "RuntimeError: now"),
    # Saves of steps 4 and 8 of 10, and of the last one, for which Megatron ends the process and begins another.
    "writer": (["--async-save", "--checkpoints", "3"], "RuntimeError: the process that writes checkpoints ended"),
    "unsent": (["--async-save", "--save-interval", "1"], "RuntimeError: the process that writes checkpoints ended"),
}
"""How a training ends: its flags, and what it raises. `writer`: the process beside it is killed while it is idle.
`unsent`: a checkpoint can't be sent to it."""


def train(rank: int, world_size: int, folder: str, ends: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Trainings that end in each way; what they raised, and the threads and processes that they left."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron_erpd.training.step import ReplayStep

    loss = ReplayStep.loss_and_metrics
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    data += ["--base-log-probs", f"{folder}/base-log-probs", "--loss", "sapo", "--learning-rate", "1e-3"]
    data += ["--global-batch-size", "8", "--micro-batch-size", "4", "--epochs", "2"]
    found = {}
    for end in ends:
        flags = ENDS[end][0]
        calls = iter(range(100))

        def ending(*args, end=end, calls=calls):
            if next(calls) == 3:
                if end == "signal":
                    signal.raise_signal(signal.SIGTERM)
                elif end == "exit":
                    raise SystemExit
                elif end.startswith("error"):
                    raise RuntimeError("now")
                elif end == "unsent":
                    platform._ByValue.__reduce__ = unsendable
            if end == "writer":
                kill_when_idle()
            return loss(*args)

        ReplayStep.loss_and_metrics = ending
        before, raised = set(threading.enumerate()), ""
        try:
            run_stages(rank, world_size, [("train", [*data, "--output", f"{folder}/{end}", *flags])])
        except BaseException as error:
            raised = f"{type(error).__name__}: {error}"
        gc.collect()
        left = [thread.name for thread in set(threading.enumerate()) - before]
        found[end] = (raised, left + [child.name for child in multiprocessing.active_children()])
    return found


def kill_when_idle() -> None:
    """Kills the process that writes checkpoints, between the second save and the third."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import async_utils

    queue, caller = async_utils._async_calls_queue, PersistentAsyncCaller
    if queue.call_idx == 1 and queue.get_num_unfinalized_calls() == 0:
        caller._persistent_process.kill()
        caller._persistent_process.join()
    while queue.get_num_unfinalized_calls() and caller._persistent_comp_q.empty():
        time.sleep(0.01)  # the next step finds the save whole


def unsendable(tensor: object) -> None:
    raise MemoryError


def test_no_thread_and_no_process_is_left(tmp_path: Path) -> None:
    make_round(tmp_path)
    # After an error a process is not fit for another stage.
    groups = (["last step", "early stop", "beside", "signal"], ["interval"], ["exit"], ["error"], ["error beside"])
    groups += (["writer"], ["unsent"])
    for ends in groups:
        (found,) = run_ranks(train, 1, str(tmp_path), ends, timeout=600.0)
        for end in ends:
            raised = ENDS[end][1]
            assert found[end][0].startswith(raised) and bool(found[end][0]) == bool(raised), f"{end}: {found[end][0]}"
            assert found[end][1] == [], end
