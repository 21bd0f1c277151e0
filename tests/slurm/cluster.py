"""A SLURM cluster of two nodes on this machine: munge, a controller and two daemons, in a folder of their own."""

from __future__ import annotations

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])
NODES = ("n1", "n2")

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again starts when its former credentials have expired: 5 s is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
# The nodes claim more cores than the machine has, so that jobs run side by side.
SlurmdParameters=config_overrides
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
KillWait=2
MinJobAge=300
# A stage's processes meet on a port that follows from the job's number: clusters on one machine must not share numbers.
FirstJobId={first_job}
SlurmdTimeout=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    lacking = [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    return f"SLURM is not installed here: no {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge)" * bool(
        lacking
    )


class Cluster:
    """The cluster; start it once, and stop it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unshared = folder / "unshared"
        """A folder of which each node sees one of its own, where the system allows."""
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Raises `RuntimeError` with the daemons' logs when the nodes don't get ready."""
        os.environ["PATH"] = _SEARCH
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        for name in ("state", *(f"spool-{node}" for node in NODES), "unshared"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(
                host=socket.gethostname(),
                user=getpass.getuser(),
                folder=self.folder,
                ports=_free_ports(3),
                first_job=random.SystemRandom().randrange(1, 60_000),
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        _wait_for((self.folder / "munge.socket").exists, 10)
        config = ("-f", str(self.folder / "slurm.conf"))
        self._daemon("slurmctld", "-D", *config)
        self._daemon("slurmd", "-D", "-N", "n1", *config)
        self._daemon("slurmd", "-D", "-N", "n2", *config, unshared=self.can_unshare())
        if not _wait_for(lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30):
            logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
            raise RuntimeError("the test cluster did not start\n" + "\n".join(logs))

    def can_unshare(self) -> bool:
        """Whether a node can be given a file system of its own."""
        test = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(self.unshared)]
        return subprocess.run(test, capture_output=True).returncode == 0

    def stop(self) -> None:
        with suppress(Exception):
            self.command("scancel", f"--user={getpass.getuser()}")
            _wait_for(lambda: not self.command("squeue", "-h").strip(), 10)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

    def command(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout

    def _daemon(self, *command: str, unshared: bool = False) -> None:
        if unshared:
            mount = f'mount -t tmpfs none {self.unshared} && exec "$0" "$@"'
            command = ("unshare", "--mount", "bash", "-c", mount, *command)
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            )


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_for(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False
