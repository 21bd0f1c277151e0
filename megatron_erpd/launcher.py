"""What a launcher says of this process, and what of it counts.

torchrun, and whatever starts several processes in its place, tells each through its environment which one it is (RANK
of WORLD_SIZE, LOCAL_RANK on its node) and where they meet (MASTER_ADDR, MASTER_PORT). Shells of clusters hold the same
names for other jobs. So: without RANK a process works alone and the rest is dropped; what would make it wait for
processes that nobody started is an error that names the variable.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_erpd.errors import LayoutError

FROM_A_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""What processes that are started here must not inherit."""
LAUNCHER_PREFIXES = ("PET_", "TORCHELASTIC_")
"""Torchrun reads its own flags from the first, Kubeflow's trainer sets them; the second tells its workers of it."""
_OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
"""Megatron takes these where RANK is not set. (A job's script keeps them: srun reads them.)"""

_COUNTERS = {"SLURM_PROCID": "srun", "OMPI_COMM_WORLD_RANK": "mpirun", "PMI_RANK": "mpiexec"}
"""What counts the starts of one command by launchers that set no RANK."""

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1


def launch() -> Launch:
    """What the environment says of this process; one that no launcher started is alone.

    Raises:
        LayoutError: the variables contradict each other or themselves; names the variable.
    """
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank is None:
        if world_size is not None and world_size > 1:
            raise LayoutError(
                f"WORLD_SIZE is {world_size} in the environment, but RANK is not set, so this process can't tell which "
                "of them it is; start it with torchrun, or `unset WORLD_SIZE` to work in one process"
            )
        for name, starter in _COUNTERS.items():
            task = os.environ.get(name, "").strip()
            if task.isdecimal() and int(task) > 0:
                raise LayoutError(
                    f"{name} is {task} in the environment: {starter} started this command more than once, and each "
                    "start would do all of the work; start it once, or with torchrun"
                )
        return Launch()
    if world_size is None:
        raise LayoutError(
            f"RANK is {rank} in the environment, but WORLD_SIZE is not set: a launcher sets both; `unset RANK` to work "
            "in one process, or start with torchrun"
        )
    if rank >= world_size:
        raise LayoutError(
            f"RANK is {rank} in the environment, but WORLD_SIZE is {world_size}: ranks count from 0; `unset RANK "
            "WORLD_SIZE` to work in one process, or start with torchrun"
        )
    return Launch(rank, world_size)


def check_meeting(launched: Launch, needs_device: bool = False) -> None:
    """Whether the processes of a launch can meet, before any of them has worked.

    Args:
        needs_device: each works on the GPU of its LOCAL_RANK.

    Raises:
        LayoutError: a variable is missing or wrong; names it.
    """
    if launched.world_size == 1:
        return
    several = f"and WORLD_SIZE is {launched.world_size}; start with torchrun, or `unset RANK WORLD_SIZE`"
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            raise LayoutError(f"{name} is not set in the environment, {several}")
    port = _number("MASTER_PORT", 1)
    if port is not None and port > 65535:
        raise LayoutError(f"MASTER_PORT is {port} in the environment, which is no port, {several}")
    if _number("LOCAL_RANK", 0) is None and needs_device:
        raise LayoutError(f"LOCAL_RANK is not set in the environment, so all ranks would share a GPU, {several}")
    if (interface := missing_interface()) is not None:
        raise LayoutError(interface)


def missing_interface() -> str | None:
    """What to say where gloo is told to use a network interface that this machine hasn't; None where it isn't."""
    wanted = [name.strip() for name in os.environ.get(_GLOO_INTERFACE, "").split(",") if name.strip()]
    known = [name for _, name in socket.if_nameindex()]
    for name in wanted:
        if name not in known:
            return (
                f"{_GLOO_INTERFACE} is {os.environ[_GLOO_INTERFACE]} in the environment, but this machine's network "
                f"interfaces are {', '.join(known)}; set it to one of them, or unset it"
            )
    return None


def work_alone() -> None:
    """Makes the environment say that this process is the only one, for all libraries that ask it."""
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    for name in list(os.environ):
        if is_launchers(name) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    if missing_interface() is not None:  # gloo would look for it even to meet itself
        del os.environ[_GLOO_INTERFACE]


def refuse_several(command: str) -> None:
    """For a command that does all its work in one process.

    Raises:
        LayoutError: a launcher has started several.
    """
    launched = launch()
    if launched.world_size > 1:
        raise LayoutError(
            f"{command} works in one process, and WORLD_SIZE is {launched.world_size} in the environment; start it "
            "without torchrun, or `unset RANK WORLD_SIZE`"
        )
    forget_launcher(os.environ)


def is_launchers(name: str) -> bool:
    """Whether an environment variable is a launcher's."""
    return name in (*FROM_A_LAUNCHER, *_OF_A_TASK, *_COUNTERS) or name.startswith(LAUNCHER_PREFIXES)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that are to be started from here."""
    return {name: value for name, value in environment.items() if not is_launchers(name)}


def forget_launcher(environment: os._Environ[str]) -> None:
    """The same for the environment of this process."""
    for name in [name for name in environment if is_launchers(name)]:
        del environment[name]


def set_threads(environment: dict[str, str] | os._Environ[str], threads: int) -> None:
    """Sets OMP_NUM_THREADS where it is not set, or to something that OpenMP can't read and would ignore."""
    levels = environment.get("OMP_NUM_THREADS", "").split(",")
    if not all(level.strip().isdecimal() and int(level) > 0 for level in levels):
        environment["OMP_NUM_THREADS"] = str(threads)


def said_rank() -> int:
    """The rank as far as it is readable, for who only decides how to report an error."""
    text = os.environ.get("RANK", "").strip()
    return int(text) if text.isdecimal() else 0


def _number(name: str, least: int) -> int | None:
    """A variable's whole number; None where it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise LayoutError(
            f"{name} is {text!r} in the environment, not a whole number of at least {least}; unset it to work in one "
            "process, or start with torchrun"
        )
    return int(text)
