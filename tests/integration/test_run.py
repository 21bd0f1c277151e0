"""`megatron-erpd run`: a whole round on a tiny recipe (the student under torchrun), and what a second run does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_erpd.manifest import verify_manifest
from tests import forked
from tests.forked import REPOSITORY

RECIPE = """
name: tiny
prepare: python examples/quickstart/prepare.py --output {output} --num-demonstrations 64 --num-prompts 4 --num-heldout 4
  --num-layers 2
model: prepare/model
warm_up: {rollouts: prepare/demonstrations.parquet, loss: sft, epochs: 1, global_batch_size: 32, learning_rate: 1e-3}
rollouts:
  prompts: prepare/prompts.jsonl
  verifier: python:VERIFIER:score
  num_rollouts: 8
  max_new_tokens: 6
teacher: {loss: mse, epochs: 2, global_batch_size: 16, checkpoints: 2}
unlearned: {loss: ce, epochs: 1, global_batch_size: 16}
teachers:
  other: {loss: sapo, epochs: 1, global_batch_size: 16, kl_coefficient: 0.1, kl_estimator: exact, kl_topk: 8}
cache: {signal: "0.5*teacher/base + 0.3*base/unlearned + 0.2*other/base", k: 4}
student: {epochs: 1, global_batch_size: 16}
controls:
  gradient: {kind: distill, form: policy_gradient, signal: other/unlearned, epochs: 1, global_batch_size: 16}
  grpo: {kind: on_policy, updates: 2, prompts_per_update: 2}
evaluation: {prompts: prepare/heldout.jsonl, num_prompts: 4, num_samples: 2, max_new_tokens: 6, checkpoints: true}
layout: {micro_batch_size: 8}
stages: {student: {layout: {tensor_parallel: 2}}}
"""


VERIFIER = """
def score(record, response):
    return float(len(response) % 2 == 0)
"""
"""It mixes rewards whatever the policy says: even lengths are right. Many processes load it: it imports nothing."""

RUN = """
import subprocess, sys
from megatron_erpd.commands import cli
from tests import forked

popen = subprocess.Popen

def start(command, **options):
    program = command[1]
    forks = program.startswith(("tools/", "examples/")) or command[2:3] == ["torch.distributed.run"]
    if command[0] != sys.executable or not forks or {as_users_do!r} in (program, "all"):
        return popen(command, **options)
    options.pop("pass_fds")  # the run's lock
    return forked.Popen(command, **options)

subprocess.Popen = start
cli.main(["run", *sys.argv[1:]])
"""


def run(recipe: Path, output: Path, *flags: str, as_users_do: str = "") -> subprocess.CompletedProcess[str]:
    """`megatron-erpd run`, whose stages, torchrun and its workers are forked (`tests.forked`), but for the stages of
    the script `as_users_do`, or `all`."""
    command = [sys.executable, "-c", RUN.format(as_users_do=as_users_do), str(recipe), "--output", str(output), *flags]
    return forked.run(command, cwd=REPOSITORY, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("as_users_do", ["tools/sample.py", pytest.param("all", marks=pytest.mark.long)])
def test_a_round_from_recipe_to_report(tmp_path: Path, as_users_do: str) -> None:
    recipe, output, verifier = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "verifier.py"
    verifier.write_text(VERIFIER)
    recipe.write_text(RECIPE.replace("VERIFIER", str(verifier)))
    first = run(recipe, output, as_users_do=as_users_do)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]

    summary = json.loads((output / "report" / "summary.json").read_text())["policies"]
    assert {"base", "teacher", "unlearned", "other", "student", "gradient", "grpo"} <= set(summary)
    needed = {"accuracy_sampled", "accuracy_greedy", "kl_per_sequence", "kl_per_token", "entropy", "mean_length"}
    assert all(needed <= set(policy) for policy in summary.values())
    assert summary["base"]["kl_per_sequence"] == pytest.approx(0, abs=1e-6)
    assert summary["teacher"]["kl_per_sequence"] > 0
    assert (output / "report" / "index.html").stat().st_size > 10_000
    for folder in (
        "teacher",
        "unlearned",
        "teachers/other",
        "cache",
        "student",
        "controls/grpo",
        "export",
        "evaluation",
    ):
        verify_manifest(output / "round-01" / folder)

    # Every stage that takes long has left lines on how it went, under names of its own.
    kept = {
        "rollouts": ("sample/responses", "sample/reward_mean"),
        "base-log-probs": ("precompute/base/tokens_per_second",),
        "cache": ("precompute/teacher/tokens", "precompute/base/rollouts"),
        "teacher": ("stage1/loss", "world-size"),
        "evaluation": ("evaluation/student/accuracy_sampled", "evaluation/base/entropy"),
    }
    for folder, names in kept.items():
        rows = [json.loads(line) for line in (output / "round-01" / folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
        assert set(names) <= {name for row in rows for name in row}, folder

    # Nothing has changed: nothing is done. One setting has: what depends on it is made anew, and no more.
    teacher = (output / "round-01" / "teacher" / "manifest.json").stat().st_mtime_ns
    again = run(recipe, output, "--set", "controls.gradient.epochs=2")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert (output / "round-01" / "teacher" / "manifest.json").stat().st_mtime_ns == teacher
    assert "epochs: 1.0 -> 2.0" in again.stdout
    after = json.loads((output / "report" / "summary.json").read_text())["policies"]
    assert after["teacher"] == summary["teacher"]
    assert after["gradient"] != summary["gradient"]
