"""What a launcher left in the environment: taken, dropped, or refused with its name."""

from __future__ import annotations

import os
import socket

import pytest

from megatron_erpd import launcher
from megatron_erpd.errors import LayoutError
from megatron_erpd.launcher import Launch

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.fixture
def environment(monkeypatch):
    for name in [name for name in os.environ if launcher.is_launchers(name) or name.startswith("GLOO_")]:
        monkeypatch.delenv(name)

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, Launch()),
        ({"RANK": " ", "WORLD_SIZE": "1"}, Launch()),
        ({"MASTER_ADDR": "node17", "MASTER_PORT": "1234", "LOCAL_RANK": "3", "PET_NNODES": "2"}, Launch()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "1"}, Launch(1, 2)),
    ],
)
def test_what_is_taken_or_dropped(environment, values, expected):
    environment(**values)
    assert launcher.launch() == expected


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "3"}, "RANK is 3 in the environment, but WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "RANK is 0 in the environment, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 in the environment, but WORLD_SIZE is 2"),
        ({"RANK": "gold", "WORLD_SIZE": "2"}, "RANK is 'gold'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "SLURM_PROCID is 3"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is 1 .*mpirun"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK is 1"),
    ],
)
def test_what_contradicts_itself_is_named(environment, values, named):
    environment(**values)
    with pytest.raises(LayoutError, match=named) as caught:
        launcher.launch()
    assert "start" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, None),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "123456"}, "MASTER_PORT is 123456"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is not set"),
        ({"GLOO_SOCKET_IFNAME": "ib77"}, "GLOO_SOCKET_IFNAME is ib77 in the environment, but .* are .*lo"),
        ({"GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1]}, None),
    ],
)
def test_where_several_meet(environment, changed, named):
    environment(**{**MEETING, **changed})
    launcher.check_meeting(Launch(0, 1), needs_device=True)  # alone, none of it is read
    if named is None:
        launcher.check_meeting(Launch(1, 2), needs_device=True)
    else:
        with pytest.raises(LayoutError, match=named):
            launcher.check_meeting(Launch(1, 2), needs_device=True)


def test_a_process_alone_says_so_to_all_libraries(environment):
    environment(**MEETING, PET_NNODES="2", TORCHELASTIC_USE_AGENT_STORE="True", SLURM_PROCID="0")
    environment(GLOO_SOCKET_IFNAME="ib77", NCCL_DEBUG="INFO", RANK="")
    launcher.work_alone()
    assert {n: v for n, v in os.environ.items() if launcher.is_launchers(n)} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    assert "GLOO_SOCKET_IFNAME" not in os.environ and os.environ["NCCL_DEBUG"] == "INFO"


def test_a_command_of_one_process(environment):
    environment(MASTER_ADDR="node17", PET_NPROC_PER_NODE="8")
    launcher.refuse_several("sample")
    assert "MASTER_ADDR" not in os.environ and "PET_NPROC_PER_NODE" not in os.environ
    environment(RANK="0", WORLD_SIZE="2")
    with pytest.raises(LayoutError, match="sample works in one process, and WORLD_SIZE is 2"):
        launcher.refuse_several("sample")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "3"), ("", "3"), ("many", "3"), ("0", "3"), ("-2", "3"), ("4", "4"), ("4,2", "4,2")]
)
def test_threads(value, expected):
    environment = {} if value is None else {"OMP_NUM_THREADS": value}
    launcher.set_threads(environment, 3)
    assert environment["OMP_NUM_THREADS"] == expected
