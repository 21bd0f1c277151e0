"""A stage for tests on the cluster: takes its folder, waits, writes a file, publishes its manifest.

Its argument is JSON. In a job of several processes all begin, and the first of them writes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_erpd.manifest import begin_artifact, finish_artifact, input_digest

job = json.loads(sys.argv[1])
output, first = Path(job["output"]), os.environ.get("RANK", "0") == "0"
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
inputs = {name: input_digest(Path(path)) for name, path in job["inputs"].items()}
if first:
    begin_artifact(output, "precompute", job["settings"], inputs)


def save(number, frame):
    if first:
        (output / "saved").write_text(f"in start {restart}")
    print("saved", flush=True)
    if job.get("stubborn"):
        return
    sys.exit("error: stopped before its end")


signal.signal(signal.SIGTERM, save)
print("started", os.environ.get("RANK"), os.environ.get("SLURMD_NODENAME"), flush=True)
if "raise" in job and restart < job.get("raises", 100):
    raise RuntimeError(job["raise"])
if "error" in job:
    print(f"error: {job['error']}", file=sys.stderr, flush=True)
    sys.exit(2)
if job.get("stops") and restart == 0:
    print("error: stopped before its end", file=sys.stderr, flush=True)
    sys.exit(75)
if "hang" in job and restart == 0:
    time.sleep(job["hang"])
if "die" in job and restart == 0 and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if restart < job.get("waits", 0):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if job.get("chatty"):
            print(".", flush=True)
if job.get("rank_waits") and restart == 0:
    time.sleep(600)
if first and not job.get("forgets_manifest"):
    saved = output / "saved"
    (output / "result").write_text(saved.read_text() if saved.is_file() else f"fresh in start {restart}")
    finish_artifact(output)
sys.exit(job.get("ends_with", 0))
