"""The sbatch file of a job: plain bash that its user can read and change."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_erpd.launch.processes import GRACE_SECONDS
from megatron_erpd.launcher import FROM_A_LAUNCHER, LAUNCHER_PREFIXES
from megatron_erpd.recipe.requests import ModelRequest, Prepare
from megatron_erpd.recipe.stages import PACKAGE_ROOT
from megatron_erpd.settings.slurm import slurm_patience
from megatron_erpd.slurm.jobs import Job
from megatron_erpd.units import counted

_OWN_CONNECTIONS = ("use-torch-fsdp2", "use-megatron-fsdp", "overlap-moe-expert-parallel-comm")
"""Flags with which Megatron refuses CUDA_DEVICE_MAX_CONNECTIONS=1, or wants more."""
_FIRST_PORT, _PORTS = 20000, 12000
"""Below the ports that Linux gives to outgoing connections (32768 on)."""
_CONTAINER_PYTHON = "python3"


def render(job: Job, run: str, root: Path) -> str:
    """The text of a job's sbatch file.

    Args:
        run: name of the run.
        root: the run's folder, which all nodes must share.
    """
    sections = [
        ["#!/bin/bash", *_about(job, run)],
        list(_directives(job, run, root.absolute())),
        list(_log(job, root.absolute())),
        list(_environment(job)),
        ["# slurm.setup of the recipe", *job.stage.slurm.setup] if job.stage.slurm.setup else [],
        list(_launch(job, root)),
        list(_wait(job)),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _about(job: Job, run: str) -> Iterator[str]:
    processes = f"{job.processes} process{'es' if job.processes > 1 else ''}"
    yield f"# Stage {job.stage.name} of {run}: {job.stage.command}, {processes} on {counted(job.nodes, 'node')}."
    if job.kind == "slices":
        does = "samples" if job.stage.command == "sample" else "scores"
        yield f"# Each of {job.stage.slurm.slices} jobs of an array {does} a slice; {job.stage.name} joins these."
    if job.needs:
        yield f"# Starts when these have succeeded: {', '.join(job.needs)}."


def _directives(job: Job, run: str, root: Path) -> Iterator[str]:
    slurm = job.stage.slurm
    gpus = job.processes // job.nodes * job.stage.gpus_per_process if job.uses_gpus and slurm.gpus_per_node else None
    log = root / "logs" / "slurm" / f"{job.name}-%{'A_%a' if job.kind == 'slices' else 'j'}.log"
    options: dict[str, object] = {
        "job-name": f"{run}/{job.name}",
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time,
        "array": f"1-{slurm.slices}" if job.kind == "slices" else None,
        "chdir": Path.cwd(),
        "output": log,
        "open-mode": "append",
    }
    for name, value in options.items():
        if value is not None:
            yield f"#SBATCH --{name}={shlex.quote(str(value))}"
    yield from (line if line.startswith("#SBATCH") else f"#SBATCH {line}" for line in slurm.sbatch)
    yield "# The job is queued again when a node fails, and by itself until its stage is complete. Only this script"
    yield "# gets the signal, so many seconds before the time limit; it tells the stage to save and to end."
    yield "#SBATCH --requeue"
    yield f"#SBATCH --signal=B:USR1@{slurm.signal_seconds}"


def _log(job: Job, root: Path) -> Iterator[str]:
    path = shlex.quote(str(root / "logs" / "slurm" / job.name))
    yield "# A log for each time that the job starts; the file of --output has what SLURM itself says."
    yield f'log={path}-"{_number(job)}-${{SLURM_RESTART_COUNT:-0}}".log'
    yield 'exec >>"$log" 2>&1'
    yield "set -e"


def _number(job: Job) -> str:
    """The job's number, as the shell knows it."""
    return "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.kind == "slices" else "$SLURM_JOB_ID"


def _environment(job: Job) -> Iterator[str]:
    stage, slurm = job.stage, job.stage.slurm
    yield "# What a launcher of an interactive session may have left in the environment that sbatch passes on."
    yield f"unset {' '.join([*FROM_A_LAUNCHER, *(f'${{!{prefix}@}}' for prefix in LAUNCHER_PREFIXES)])}"
    yield "# Python shows what it prints at once, and its stack when it is killed for hanging."
    yield "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1"
    yield f"export PYTHONPATH={shlex.quote(str(PACKAGE_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield "# Threads of each process. Threads that wait by spinning would take cores from the other processes."
    threads = max(1, (slurm.cpus_per_task or 1) // (job.processes // job.nodes))
    yield f"export OMP_NUM_THREADS={threads} OMP_WAIT_POLICY=PASSIVE"
    if job.processes > 1:
        yield "# A collective that fails or times out ends its process; it would wait until the time limit otherwise."
        yield "export TORCH_NCCL_ASYNC_ERROR_HANDLING=1"
    layout = stage.layout
    if isinstance(stage.request, ModelRequest) and (layout.tensor_parallel > 1 or layout.context_parallel > 1):
        flags = {word.removeprefix("--") for word in stage.megatron}
        if flags & set(_OWN_CONNECTIONS):
            yield "# CUDA_DEVICE_MAX_CONNECTIONS is not set: FSDP and overlapped expert communication want several."
        else:
            yield "# With TP or CP, Megatron overlaps communication and computation by the order of launches, which one"
            yield "# connection keeps. It refuses to start without, up to Hopper; Blackwell does not need it."
            yield "export CUDA_DEVICE_MAX_CONNECTIONS=1"
    if slurm.environment:
        yield "# slurm.environment of the recipe"
        yield from (f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items())


def _launch(job: Job, root: Path) -> Iterator[str]:
    slurm = job.stage.slurm
    if job.processes > 1:
        yield "# Where the processes meet: this script runs on the first host of the job. (The network need not know"
        yield "# the name that the node has in SLURM.)"
        yield f"head=$(hostname) port=$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))"
    yield "# SLURM signals this script alone, which passes the signals on."
    yield "trap 'kill -USR1 $!' USR1"
    yield "trap 'kill -TERM $!' TERM"
    yield "# Runs what follows `--` and watches it; ends well only when the stage's artifact is complete."
    python = shlex.quote(sys.executable)
    yield f'{python} -m megatron_erpd.slurm.job {shlex.quote(str(root))} {job.name} --log "$log" -- \\'
    command = _command(job, slurm.python or (_CONTAINER_PYTHON if slurm.container_image else sys.executable))
    yield f"{_indented([*_srun(job, root), *command])} &"


def _wait(job: Job) -> Iterator[str]:
    """What is left to the shell, which no shortage of memory kills."""
    yield "# A signal ends `wait`, but not that program."
    yield "set +e"
    yield "while kill -0 $! 2>/dev/null; do wait $!; done"
    yield "wait $!"
    yield "code=$?"
    yield "# When it was killed itself (137: by SIGKILL, as for a shortage of memory), the job is queued again, which"
    yield "# ends what is left of the stage. 143, SIGTERM, is how SLURM ends a job."
    again = f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.stage.slurm.requeues} ]'
    yield f"if [ $code -gt 128 ] && [ $code -ne 143 ] && {again}; then"
    yield '    echo "[job] the program around the stage was killed (exit code $code); the job is queued again"'
    yield f'    scontrol requeue "{_number(job)}" && sleep 600'
    yield "fi"
    yield "exit $code"


def _srun(job: Job, root: Path) -> list[str]:
    """srun starts one task on each node, and ends all when one fails."""
    slurm = job.stage.slurm
    # Since 22.05, srun does not take the job's --cpus-per-task by itself.
    cpus = [f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
    lines = [shlex.join(["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *cpus])]
    if slurm.container_image:
        own = dict.fromkeys(str(path.absolute()) for path in (Path.cwd(), root, PACKAGE_ROOT))
        mounts = ",".join([*(f"{path}:{path}" for path in own), *slurm.container_mounts])
        lines += [shlex.join([f"--container-image={slurm.container_image}", f"--container-mounts={mounts}"])]
        lines += [shlex.join([f"--container-workdir={Path.cwd()}"])]
    return lines


def _command(job: Job, python: str) -> list[str]:
    stage = job.stage
    if isinstance(stage.request, Prepare):
        words = shlex.split(stage.request.shown)
        return [shlex.join([python if words[0] in ("python", "python3") else words[0], *words[1:]])]
    program, flags = stage.program(), stage.flags()
    at = len(flags) - (len(stage.megatron) + 1 if stage.megatron else 0)
    own, megatron = _lines(flags[:at]), [shlex.join(flags[at:])] if stage.megatron else []
    if job.kind == "slices":
        own += [f'--slice "$SLURM_ARRAY_TASK_ID/{stage.slurm.slices}"']
    elif job.kind == "merge":
        own += ["--merge-slices"]
    if job.processes == 1:
        return [shlex.join([python, *program]), *own, *megatron]
    module = ["-m"] if program[0] == "-m" else []
    # Torchrun kills a process that has not ended so long after it was told to; a checkpoint may take its time.
    patience = max(GRACE_SECONDS, slurm_patience(stage.slurm.signal_seconds))
    return [
        shlex.join([python, "-m", "torch.distributed.run"]),
        shlex.join(["--nnodes", str(job.nodes), "--nproc-per-node", str(job.processes // job.nodes)]),
        '--rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        shlex.join(["--shutdown-timeout", f"{patience:.0f}", *module, "--", *program[len(module) :]]),
        *own,
        *megatron,
    ]


def _lines(flags: list[str]) -> list[str]:
    """Flags with their values, a line each."""
    lines: list[list[str]] = [[]]
    for word in flags:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines if line]


def _indented(lines: list[str]) -> str:
    """Lines of one command."""
    return " \\\n".join(f"    {line}" for line in lines if line)
