"""A stage for tests: takes its folder, writes one file, publishes its manifest. Its only argument is JSON."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_erpd.manifest import begin_artifact, finish_artifact, input_digest

job = json.loads(sys.argv[1])
print("started", flush=True)
if "CUDA_VISIBLE_DEVICES" in os.environ:
    print("GPUs", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
output = Path(job["output"])
inputs = {name: input_digest(Path(path)) for name, path in job["inputs"].items()}
settings = job.get("own_settings", job["settings"])
resumed = begin_artifact(output, job["stage"], settings, inputs)
if "child" in job:  # a worker in a session of its own, as torchrun's are
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(job["child"]).write_text(str(child.pid))
if "meet" in job:  # ends only when a stage beside it has started too
    (output / "here.tmp").write_text("")
    deadline = time.monotonic() + 60
    while not Path(job["meet"]).is_file():
        if time.monotonic() > deadline:
            sys.exit("error: nobody came")
        time.sleep(0.02)
if "sleep" in job:
    time.sleep(job["sleep"])
if "crash" in job:
    raise RuntimeError(job["crash"])
if "fail" in job and not resumed:
    (output / "half").write_text("half")
    sys.exit(job["fail"])
if not job.get("forgets_manifest"):
    (output / "result").write_text("resumed" if resumed else "fresh")
    finish_artifact(output, warnings=job.get("warnings", []))
if job.get("end", 0) < 0:
    os.kill(os.getpid(), -job["end"])
sys.exit(job.get("end", 0))
