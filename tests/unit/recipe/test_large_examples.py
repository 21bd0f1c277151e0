"""The examples of large runs: valid recipes whose layouts fit the GPUs that they name, from published sizes alone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.commands import cli
from megatron_erpd.launch import flag_check
from megatron_erpd.plan.gpu_fit import parse_gpus
from megatron_erpd.plan.resources import Resources, estimate
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.slurm.submit import scripts
from tests import forked
from tests.distributed.checkpoint.published import LLAMA_31_70B, QWEN3_4B, QWEN25_32B

EXAMPLES = Path(__file__).parents[3] / "examples"
# Folder; config.json; parameters as published with the weights; GPUs; tokens of the longest rollout, where it is given.
LARGE: dict[str, tuple[dict[str, Any], int, int, int | None]] = {
    "qwen3-4b": (QWEN3_4B, 4_022_468_096, 8, None),
    "qwen2.5-32b": (QWEN25_32B, 32_763_876_352, 32, 16384),
    "llama3.1-70b": (LLAMA_31_70B, 70_553_706_496, 128, 16384),
}


@pytest.fixture(params=list(LARGE))
def planned(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Resources]:
    """A plan of an example, beside which there is nothing but the model's config.json."""
    config, _, gpus, longest = LARGE[request.param]
    recipe = load_recipe(EXAMPLES / request.param / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    Path(recipe.model).mkdir(parents=True)
    (Path(recipe.model) / "config.json").write_text(json.dumps(config))
    return request.param, estimate(recipe, gpus=parse_gpus("h100", gpus), sequence_length=longest)


def test_the_layout_fits(planned: tuple[str, Resources]) -> None:
    name, found = planned
    assert found.model and found.model.parameters == LARGE[name][1]
    assert found.gpus is not None and len(found.gpus.stages) == 4
    assert [row for row in found.gpus.stages if not (row.fits and row.enough_gpus)] == []
    assert max(row.num_processes for row in found.stages) == LARGE[name][2]
    assert found.gpus.proposals
    sampler = next(row for row in found.stages if row.command == "sample")
    assert sampler.layout == {"qwen3-4b": "", "qwen2.5-32b": "TP 4", "llama3.1-70b": "TP 8"}[name]


ON_GPUS: dict[str, dict[str, tuple[int, int, int]]] = {
    "qwen3-4b": {
        **dict.fromkeys(("base-log-probs", "teacher", "cache", "student"), (1, 8, 1)),
        **{"rollouts-slices": (1, 1, 8), "selection": (1, 1, 1), "evaluation": (1, 1, 1)},
    },
    "qwen2.5-32b": {
        **dict.fromkeys(("base-log-probs", "teacher", "cache", "student"), (4, 8, 1)),
        **{"rollouts-slices": (1, 4, 8)},
    },
    "llama3.1-70b": {
        **dict.fromkeys(("base-log-probs", "teacher", "cache", "student"), (16, 8, 1)),
        **{"rollouts-slices": (1, 8, 16)},
    },
}
"""Nodes, GPUs of a node, and jobs of an array; every other job takes a node without GPUs."""
WITHOUT_GPUS = {"base", "rollouts", "rewards", "export", "report"}


@pytest.mark.parametrize("name", LARGE)
def test_the_jobs_on_slurm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(EXAMPLES / name / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    made = scripts(recipe)
    assert made.keys() == {*ON_GPUS[name], *WITHOUT_GPUS, *(["candidates"] if name == "qwen3-4b" else [])}
    for job, script in made.items():
        nodes, gpus, array = ON_GPUS[name].get(job, (1, 0, 1))
        asked = dict(re.findall(r"^#SBATCH --(nodes|gpus-per-node|array)=(\S+)", script, re.MULTILINE))
        wanted = {"nodes": str(nodes)} | ({"gpus-per-node": str(gpus)} if gpus else {})
        assert asked == wanted | ({"array": f"1-{array}"} if array > 1 else {}), job
        assert f"#SBATCH --job-name={name}/{job}\n" in script
        trained = job in ("base-log-probs", "teacher", "cache", "student")
        assert (f"--nnodes {nodes} --nproc-per-node {gpus} " in script) == trained, job
        assert ("export CUDA_DEVICE_MAX_CONNECTIONS=1\n" in script) == (trained and name != "qwen3-4b"), job
    checked = subprocess.run(["bash", "-n"], input="\n".join(made.values()), text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_the_readme_shows_how_to_print_the_scripts(
    planned: tuple[str, Resources], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a recipe whose model has no weights yet, too."""
    monkeypatch.setattr(flag_check, "subprocess", forked)  # so that Megatron isn't imported anew
    name, _ = planned
    text = " ".join((EXAMPLES / name / "README.md").read_text().split())
    assert f"`megatron-erpd submit examples/{name}/recipe.yaml`" in text and "`--dry-run` prints the scripts" in text
    with pytest.raises(SystemExit):
        cli.main(["submit", str(EXAMPLES / name / "recipe.yaml"), "--dry-run"])
    assert f"/slurm/teacher.sbatch\n#!/bin/bash\n# Stage teacher of {name}: " in capsys.readouterr().out


def test_the_readme_tells_the_plans_figures(planned: tuple[str, Resources]) -> None:
    name, found = planned
    text = " ".join((EXAMPLES / name / "README.md").read_text().split())
    teacher = next(row for row in found.memory if row.stage == "teacher")
    assert f"{teacher.total / 2**30:.0f} of 71.6 GiB on every GPU" in text
    for size, word in ((teacher.weights, "weights"), (teacher.gradients, "gradients"), (teacher.optimizer, "of the")):
        assert f"{size / 2**30:.1f} {word}" in text
    if name != "qwen3-4b":
        assert found.gpus is not None
        assert f"at {found.gpus.proposals[0].total / 2**30:.1f} GiB" in text
        assert f"{(teacher.activations or 0) / 2**30:.1f} activations" in text


def test_the_readme_names_recipes_that_exist(planned: tuple[str, Resources]) -> None:
    text = (EXAMPLES / planned[0] / "README.md").read_text()
    recipes = re.findall(r"examples/[\w.-]+/recipe\.yaml", text)
    assert recipes and all((EXAMPLES.parent / path).is_file() for path in recipes)
