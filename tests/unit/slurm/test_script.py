"""The sbatch files: what a recipe's `slurm` section becomes, and which jobs a run has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.settings import SlurmSettings
from megatron_erpd.slurm.jobs import Job, JobRecord, jobs_of
from megatron_erpd.slurm.submit import scripts
from tests.distributed.harness import REPOSITORY

RECIPE: dict[str, Any] = {
    "name": "mine",
    "model": "models/mine",
    "rollouts": {"file": "data/rollouts.jsonl"},
    "teacher": {"loss": "ce"},
    "unlearned": {},
    "student": {},
}


@pytest.fixture
def recipe(tmp_path: Path):
    def make(**sections: Any) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **sections}))
        return load_recipe(path)

    return make


def job(recipe: Recipe, name: str) -> Job:
    return next(job for job in jobs_of(plan(recipe)) if job.name == name)


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_all_scripts_are_bash(recipe, tmp_path):
    made = scripts(recipe(slurm={"setup": ["module load cuda"], "environment": {"A": "b c"}, "slices": 2}))
    for name, script in made.items():
        (tmp_path / name).write_text(script)
        checked = subprocess.run(["bash", "-n", str(tmp_path / name)], capture_output=True, text=True)
        assert checked.returncode == 0, f"{name}: {checked.stderr}"
        assert "\nunset RANK WORLD_SIZE" in script and " ${!PET_@} ${!TORCHELASTIC_@}\n" in script
        assert "export A='b c'\n" in script and "\nmodule load cuda\n" in script


def test_jobs_wait_for_those_whose_artifacts_they_read(recipe):
    needs = {job.name: set(job.needs) for job in jobs_of(plan(recipe()))}
    assert needs["teacher"] == needs["unlearned"] == {"base", "rollouts", "base-log-probs"}
    assert {"teacher", "rollouts"} <= needs["cache"]
    assert "cache" in needs["student"] and "student" in needs["export"]


def test_every_job_waits_for_prepare(recipe):
    jobs = jobs_of(plan(recipe(prepare="python make.py {output}")))
    assert jobs[0].name == "prepare" and not jobs[0].needs
    assert jobs[1].needs == ("prepare",)  # though the model is not made by it
    assert all(job.needs for job in jobs[1:])


def test_what_a_job_asks_for_comes_from_the_recipe_and_its_stage(recipe):
    asked = {
        **{"account": "me", "partition": "h100", "qos": "high", "reservation": "mine", "constraint": "ib"},
        **{"cpus_per_task": 32, "memory": "200G", "time": "04:00:00", "signal_seconds": 600, "sbatch": ["--exclusive"]},
    }
    made = scripts(recipe(slurm=asked, stages={"teacher": {"slurm": {"time": "2-00:00:00"}}}))
    student, teacher = directives(made["student"]), directives(made["teacher"])
    for name in ("account", "partition", "qos", "reservation", "constraint"):
        assert student[name] == asked[name]
    assert (student["cpus-per-task"], student["mem"], student["time"]) == ("32", "200G", "04:00:00")
    assert student["signal"] == "B:USR1@600" and "exclusive" in student and "requeue" in student
    assert teacher == {**student, "time": "2-00:00:00"} | {k: teacher[k] for k in ("job-name", "output")}
    assert "--cpus-per-task=32" in made["student"].partition("srun")[2].partition("\n")[0]


def test_nodes_follow_from_the_layout_and_the_gpus_of_a_node(recipe):
    layout = {"tensor_parallel": 4, "data_parallel": 4}
    made = scripts(recipe(layout=layout, slurm={"gpus_per_node": 8}))
    teacher, base, export = (directives(made[name]) for name in ("teacher", "base", "export"))
    assert (teacher["nodes"], teacher["gpus-per-node"], teacher["ntasks-per-node"]) == ("2", "8", "1")
    assert "--nnodes 2 --nproc-per-node 8 " in made["teacher"]
    assert base["nodes"] == "1" and "gpus-per-node" not in base and "torch.distributed.run" not in made["base"]
    assert "gpus-per-node" not in export


@pytest.mark.parametrize(
    "slurm, processes", [({"gpus_per_node": 8}, 13), ({"nodes": 3}, 4), ({"nodes": 1, "gpus_per_node": 4}, 8)]
)
def test_processes_that_do_not_divide_over_nodes_are_refused(recipe, slurm, processes):
    with pytest.raises(RecipeError, match=f"{processes} processes can't be spread over . node"):
        scripts(recipe(layout={"data_parallel": processes}, slurm=slurm))


def test_one_connection_is_for_tensor_and_context_parallelism(recipe):
    one, flag = "CUDA_DEVICE_MAX_CONNECTIONS=1", {"use-megatron-fsdp": True}
    assert one not in scripts(recipe(layout={"data_parallel": 2}))["teacher"]
    assert one in scripts(recipe(layout={"tensor_parallel": 2}))["teacher"]
    assert one in scripts(recipe(layout={"context_parallel": 2}))["teacher"]
    assert one not in scripts(recipe(layout={"tensor_parallel": 2}))["base"]
    assert f"export {one}" not in scripts(recipe(layout={"tensor_parallel": 2}, megatron=flag))["teacher"]


def test_slices_are_an_array_and_a_job_that_joins_them(recipe):
    made = recipe(stages={"cache": {"slurm": {"slices": 4}}}, layout={"tensor_parallel": 2, "precision": "bf16"})
    slices, merge = job(made, "cache-slices"), job(made, "cache")
    assert merge.needs == ("cache-slices",) and "teacher" in slices.needs
    text = scripts(made)
    assert directives(text["cache-slices"])["array"] == "1-4"
    assert '--slice "$SLURM_ARRAY_TASK_ID/4"' in text["cache-slices"] and "--nproc-per-node 2" in text["cache-slices"]
    assert "--merge-slices" in text["cache"] and "torch.distributed.run" not in text["cache"]
    assert "--precision bf16" in text["cache"] and "--tensor-parallel" not in text["cache"]
    assert "array" not in directives(text["base-log-probs"])
    assert "cache" in job(made, "student").needs


SAMPLED = {"prompts": "data/prompts.jsonl", "verifier": "math-verify", "num_prompts": 1024}


def test_rollouts_are_sampled_in_slices(recipe):
    made = recipe(
        rollouts=SAMPLED,
        rounds=2,
        stages={"rollouts": {"slurm": {"slices": 8}}},
        slurm={"gpus_per_node": 8},
        controls={"grpo": {"kind": "on_policy"}},
    )
    text = scripts(made)
    for name, second in (("rollouts", False), ("round-02-rollouts", True)):
        slices, merge = job(made, f"{name}-slices"), job(made, name)
        assert merge.needs == (f"{name}-slices",)
        asked = directives(text[f"{name}-slices"])
        assert (asked["array"], asked["gpus-per-node"]) == ("1-8", "1")
        assert "gpus-per-node" not in directives(text[name]) and "array" not in directives(text[name])
        assert "jobs of an array samples a slice" in text[f"{name}-slices"]
        assert '--slice "$SLURM_ARRAY_TASK_ID/8"' in text[f"{name}-slices"] and "--merge-slices" in text[name]
        assert ("--first-prompt 1024" in text[name]) == ("--first-prompt 1024" in text[f"{name}-slices"]) == second
        assert ("export" in slices.needs) == second
    assert "round-02-controls-grpo" in text and "round-02-controls-grpo-slices" not in text


def test_a_slice_s_artifact_is_that_of_the_sample_command(recipe, tmp_path):
    made = recipe(rollouts=SAMPLED, slurm={"slices": 8})
    record = tmp_path / "job.json"
    record.write_text(json.dumps(job(made, "rollouts-slices").record()))
    one = JobRecord.read(record).as_slice(3)
    assert one.output == made.folder / "round-01/rollouts/.slice-0003-of-0008"
    assert one.identity == {**job(made, "rollouts").stage.identity, "slice": "3/8"}
    record.write_text(json.dumps(job(made, "cache-slices").record()))
    assert JobRecord.read(record).as_slice(3).output == made.folder / "round-01/cache/slice-0003-of-0008"


def test_more_slices_than_part_files_are_refused_when_the_prompts_are_there(recipe, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1="}\n' * 300)
    sampled = {**SAMPLED, "prompts": str(prompts)}
    assert "rollouts-slices" in scripts(recipe(rollouts=sampled, slurm={"slices": 3}))
    with pytest.raises(RecipeError, match=r"rollouts: slurm.slices 4: 300 prompts make 3 part files of 128 prompts"):
        scripts(recipe(rollouts=sampled, slurm={"slices": 4}))
    with pytest.raises(RecipeError, match=r"rollouts: slurm.slices 3: 200 prompts make 2 part files"):
        scripts(recipe(rollouts={**sampled, "num_prompts": 200}, slurm={"slices": 3}))


def test_a_sampler_s_gpus_are_one_process_s(recipe):
    sampled = {**SAMPLED, "engine": "vllm", "tensor_parallel": 4}
    asked = {"gpus_per_node": 8, "cpus_per_task": 32}
    script = scripts(recipe(rollouts=sampled, slurm=asked))["rollouts"]
    assert (directives(script)["nodes"], directives(script)["gpus-per-node"]) == ("1", "4")
    assert "--tensor-parallel 4" in script and "torch.distributed.run" not in script
    assert "export OMP_NUM_THREADS=32 " in script
    assert "gpus-per-node" not in directives(scripts(recipe(rollouts=sampled))["rollouts"])
    plain, spread = (plan(recipe(rollouts={**sampled, "tensor_parallel": n})) for n in (1, 4))
    assert [stage.identity for stage in plain] == [stage.identity for stage in spread]
    with pytest.raises(RecipeError, match="rollouts: tensor_parallel 16: .* slurm.gpus_per_node is 8"):
        scripts(recipe(rollouts={**sampled, "tensor_parallel": 16}, slurm=asked))
    with pytest.raises(RecipeError, match="tensor_parallel 4: engine transformers"):
        recipe(rollouts={**SAMPLED, "tensor_parallel": 4})


def test_slices_of_a_target_that_is_projected_as_a_whole_are_refused(recipe):
    with pytest.raises(RecipeError, match="cache: slurm.slices 2: projection global"):
        scripts(recipe(slurm={"slices": 2}, cache={"projection": "global"}))


def test_a_container_is_srun_s_and_sees_the_folders_of_the_run(recipe):
    image = {"container_image": "/images/megatron.sqsh", "container_mounts": ["/data:/data"]}
    script = scripts(recipe(slurm=image))["teacher"]
    srun = script[script.index("    srun") :]
    assert "--container-image=/images/megatron.sqsh" in srun
    assert f"{Path.cwd()}:{Path.cwd()}" in srun and ",/data:/data" in srun
    assert "\n    python3 " in srun and sys.executable not in srun


def test_megatron_s_own_flags_stay_last(recipe):
    script = scripts(recipe(megatron={"recompute-granularity": "full"}, slurm={"slices": 2}))["cache-slices"]
    assert "    -- --recompute-granularity full &\n" in script
    assert script.index("--slice ") < script.index("--recompute-granularity")


# Stands for the program around the stage: says that it is there, then does what it is told.
WATCHER = """#!/bin/bash
trap 'echo was told USR1 >> told; exit 0' USR1
trap 'echo was told TERM >> told; exit 1' TERM
touch ready
case $(cat behavior) in kill) kill -KILL $$ ;; end) exit 3 ;; esac
while sleep 0.05; do :; done
"""


@pytest.mark.parametrize(
    "behavior, restart, told, code, queued_again",
    [
        ("kill", 0, None, 137, True),
        ("kill", 1, None, 137, True),
        ("kill", 2, None, 137, False),  # as often as slurm.requeues says
        ("end", 0, None, 3, False),
        ("wait", 0, signal.SIGUSR1, 0, False),
        ("wait", 0, signal.SIGTERM, 1, False),
    ],
)
def test_the_shell_passes_signals_on_and_queues_a_job_again_whose_program_was_killed(
    recipe, tmp_path, monkeypatch, behavior, restart, told, code, queued_again
):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "watcher"))
    script = scripts(recipe(slurm={"requeues": 2}))["teacher"].replace(str(Path("runs/mine").absolute()), str(tmp_path))
    (tmp_path / "logs/slurm").mkdir(parents=True)
    (tmp_path / "behavior").write_text(behavior)
    for name, text in {
        **{"teacher.sbatch": script, "watcher": WATCHER},
        **{"scontrol": '#!/bin/bash\necho "$@" >> queued\n', "sleep": "#!/bin/bash\nexec /bin/sleep 0.05\n"},
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": f"{restart}"}
    shell = subprocess.Popen(["bash", "teacher.sbatch"], cwd=tmp_path, env=environment)
    if told is not None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        shell.send_signal(told)
    assert shell.wait(timeout=30) == code
    log = (tmp_path / f"logs/slurm/teacher-17-{restart}.log").read_text()
    assert ("was killed (exit code 137); the job is queued again" in log) == queued_again
    assert (tmp_path / "queued").exists() == queued_again
    if queued_again:
        assert (tmp_path / "queued").read_text() == "requeue 17\n"
    if told is not None:
        assert (tmp_path / "told").read_text() == f"was told {told.name.removeprefix('SIG')}\n"


@pytest.mark.parametrize(
    "slurm, message",
    [
        ({"partitoin": "x"}, "slurm.partitoin: unknown key; did you mean partition"),
        ({"time": 90}, "slurm.time"),
        ({"time": "soon"}, "time 'soon': write"),
        ({"time": "00:05:00", "signal_seconds": 300}, "signal_seconds 300: .*00:05:00"),
        ({"sbatch": ["--output=x"]}, "--output is written by submit"),
        ({"environment": {"a-b": "x"}}, "'a-b' is no name"),
        ({"container_mounts": ["/a:/a"]}, "container_mounts: has no effect"),
    ],
)
def test_what_can_not_be_written_is_refused_with_its_place(recipe, slurm, message):
    with pytest.raises(RecipeError, match=message):
        recipe(slurm=slurm)
    if "partitoin" in slurm:
        with pytest.raises(RecipeError, match=r"stages.teacher.slurm.partitoin: unknown key; did you mean partition"):
            recipe(stages={"teacher": {"slurm": slurm}})


def test_a_recipe_with_a_slurm_section_reads_back_as_itself(recipe, tmp_path):
    made = recipe(slurm={"partition": "h100"}, stages={"teacher": {"slurm": {"time": "10:00"}}})
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert scripts(again) == scripts(made)


def test_slurm_is_no_part_of_an_artifact_s_identity(recipe):
    plain, asked = plan(recipe()), plan(recipe(slurm={"partition": "h100"}))
    assert [stage.identity for stage in plain] == [stage.identity for stage in asked]


def test_dry_run_prints_the_scripts_and_writes_nothing(recipe, tmp_path):
    recipe()
    command = [sys.executable, "-m", "megatron_erpd.commands.cli", "submit", "recipe.yaml", "--dry-run"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}  # and needs no SLURM
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2  # as `submit` would
    assert "base, rollouts: hf models/mine: no such file or folder" in done.stderr
    assert "# ---- runs/mine/slurm/teacher.sbatch\n#!/bin/bash\n" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_submitting_without_slurm_says_what_is_missing(recipe, tmp_path):
    (tmp_path / "models/mine").mkdir(parents=True)
    recipe()
    code = "from megatron_erpd.slurm.queue import slurm; slurm('squeue')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, cwd=REPOSITORY
    )
    assert "squeue: not found; run this where SLURM's programs are" in done.stderr


def test_the_page_on_slurm_has_every_key_and_a_recipe_that_works(tmp_path):
    page = (REPOSITORY / "docs" / "slurm.md").read_text()
    rows = [line.partition(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) >= set(SlurmSettings.model_fields)
    (tmp_path / "recipe.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    made = scripts(load_recipe(tmp_path / "recipe.yaml"))
    assert "2 nodes" in made["teacher"].splitlines()[1] and directives(made["cache-slices"])["array"] == "1-8"
