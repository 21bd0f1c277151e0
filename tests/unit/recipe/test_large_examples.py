"""The examples of large runs: valid recipes whose layouts fit the GPUs that they name, from published sizes alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.commands import cli
from megatron_erpd.plan.gpu_fit import parse_gpus
from megatron_erpd.plan.resources import Resources, estimate
from megatron_erpd.recipe.file import load_recipe
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


def test_the_jobs_on_slurm_take_whole_nodes(planned: tuple[str, Resources], capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = planned
    with pytest.raises(SystemExit):  # there are no weights
        cli.main(["submit", str(EXAMPLES / name / "recipe.yaml"), "--dry-run"])
    script = next(text for text in capsys.readouterr().out.split("#!/bin/bash") if f"--job-name={name}/teacher" in text)
    assert f"#SBATCH --nodes={LARGE[name][2] // 8}\n" in script and "#SBATCH --gpus-per-node=8\n" in script


@pytest.mark.parametrize("name", LARGE)
def test_the_scripts_beside_the_recipe_are_what_submit_prints(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """... in a checkout in /opt/megatron-erpd."""
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(SystemExit):  # the model is not there
        cli.main(["submit", f"examples/{name}/recipe.yaml", "--dry-run"])
    printed = capsys.readouterr().out.replace(sys.executable, "/opt/megatron-erpd/.venv/bin/python")
    printed = printed.replace(str(EXAMPLES.parent), "/opt/megatron-erpd")
    parts = re.split(r"^# ---- \S+/slurm/(\S+)\n", printed, flags=re.MULTILINE)
    expected = {file: text.rstrip("\n") + "\n" for file, text in zip(parts[1::2], parts[2::2], strict=True)}
    assert {path.name: path.read_text() for path in (EXAMPLES / name / "slurm").iterdir()} == expected


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
