"""The table of Megatron flags: it is Megatron's, the page shows it, and every door refuses what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_erpd import platform
from megatron_erpd.checkpoint.mapping.config import flags_to_argv
from megatron_erpd.commands import cli
from megatron_erpd.errors import RecipeError
from megatron_erpd.launch import flag_check
from megatron_erpd.model import arguments
from megatron_erpd.model.arguments import megatron_argv, own_flags
from megatron_erpd.recipe.command_line import read_request
from megatron_erpd.recipe.requests import REQUESTS, TrainTeacher
from megatron_erpd.recipe.stages import RUNS_MODEL
from megatron_erpd.settings import Layout, ReplaySettings
from megatron_erpd.settings.megatron_flags import (
    PASSED,
    REFUSED,
    REFUSED_VALUES,
    WORKS,
    refused_flags,
    refused_values,
    without_refused,
)
from tests import forked
from tests.distributed.harness import run_ranks
from tests.unit.launch.test_preflight import SAMPLED, TASK, write_model

ROOT = Path(__file__).parents[3]
REASONS = {flag: refusal.reason for refusal in REFUSED for flag in refusal.flags}
SOME = {flag: refusal.reason for refusal in REFUSED for flag in (refusal.flags[0], refusal.flags[-1])}
ROWS = {
    **{refusal.what: refusal.flags for refusal in REFUSED},
    **WORKS,
    **PASSED,
}


def names_in_megatron(rank: int, world_size: int, model: str) -> tuple[list[list[str]], list[str]]:
    """The names of each of Megatron's options, and those that a training decides itself."""
    from megatron_erpd.model.megatron_flags import _parser

    request = TrainTeacher(settings=ReplaySettings(), **dict.fromkeys(("base", "rollouts", "output"), Path("x")))
    own = own_flags(Path(model), Layout(), flag_check._run_flags(request, Layout()), [], 2)
    return [list(action.option_strings) for action in _parser()._actions], list(flags_to_argv(dict.fromkeys(own, True)))


def rows_of(name: str) -> list[str]:
    """The rows of the table that have a flag."""
    return [
        row
        for row, flags in ROWS.items()
        for flag in flags
        if name == flag or (flag.endswith("*") and name.startswith(flag[:-1]))
    ]


def test_each_flag_of_megatrons_has_its_place(tmp_path: Path) -> None:
    write_model(tmp_path)
    ((options, own),) = run_ranks(names_in_megatron, 1, str(tmp_path))
    refused = {refusal.what for refusal in REFUSED}
    wrong = {}
    for names in options:
        places = [rows_of(name) or ["ours"] * (name in own or name.startswith("--wandb-")) for name in names]
        # All names of an option are in the same row, but for other names of what is ours.
        once = all(len(place) == 1 for place in places) and len({*map(tuple, places)}) == 1
        if not once and not (len(names) > 1 and all(place == ["ours"] or {*place} <= refused for place in places)):
            wrong[names[0]] = places
    assert wrong == {}
    assert {name for name in own if rows_of(name)} == set()
    known = [name for names in options for name in names]
    for flag in (flag for flags in ROWS.values() for flag in flags):
        assert any(name.startswith(flag[:-1]) if flag.endswith("*") else name == flag for name in known), flag


@pytest.mark.parametrize("test", WORKS)
def test_what_works_is_trained_with(test: str) -> None:
    text = (ROOT / test).read_text()
    assert "run_ranks(" in text and all(f'"{flag}"' in text for flag in WORKS[test])


def test_the_page_is_the_table() -> None:
    rows = [line for line in (ROOT / "docs/megatron-flags.md").read_text().splitlines() if line.startswith("| ")]
    expected = [f"| {_flags(flags)} | `{test}` |" for test, flags in WORKS.items()]
    expected += [f"| {refusal.what} | {_flags(refusal.flags)} | {refusal.reason} |" for refusal in REFUSED]
    expected += [f"| {what} | {_flags(flags)} |" for what, flags in PASSED.items()]
    expected += [f"| `{v.flag} {v.value}` | {v.layouts} | {v.reason} |" for v in REFUSED_VALUES]
    assert sorted(row for row in rows if "`--" in row) == sorted(expected)


def _flags(names: tuple[str, ...]) -> str:
    return " ".join(f"`{name}`" for name in names)


def test_words_of_refused_flags() -> None:
    words = ["--adam-eps", "-1e-7", "--rampup-batch-size", "2", "2", "-3", "--use-mup", "--mtp-num-layers=1", "--seed"]
    assert list(refused_flags(words)) == ["--rampup-batch-size", "--use-mup", "--mtp-num-layers"]
    assert not refused_flags(["--optimizer-cpu-offload", "--moe-router-fusion", "--fp8", "--dataloader-type"])
    assert without_refused(words) == ["--adam-eps", "-1e-7", "--seed"]


REQUIRED = {
    "train-teacher": ["--base", "b", "--rollouts", "r", "--output", "o"],
    "train-on-policy": ["--base", "b", "--prompts", "p", "--verifier", "math-verify", "--output", "o"],
    "precompute": ["--base", "b", "--rollouts", "r", "--output", "o"],
    "distill": ["--base", "b", "--rollouts", "r", "--output", "o"],
}


@pytest.mark.parametrize("command", RUNS_MODEL)
def test_commands_refuse(command: str) -> None:
    for flag, reason in SOME.items():
        for words in ([flag, "1"], [f"{flag}=1"], ["--adam-eps", "1e-7", flag]):
            with pytest.raises(RecipeError) as caught:
                read_request(REQUESTS[command], [*REQUIRED[command], "--", *words])
            assert str(caught.value) == f"{flag}: {reason}"
    assert read_request(REQUESTS[command], [*REQUIRED[command], "--", "--overlap-grad-reduce"])


def test_megatrons_command_line_is_not_made_with_a_refused_flag() -> None:
    for flag, reason in SOME.items():
        with pytest.raises(RecipeError, match=f"^{re.escape(flag)}: {re.escape(reason)}$"):
            megatron_argv({}, [flag, "1"], Layout())


def test_values_that_some_layouts_refuse() -> None:
    """Of 8 query heads and 4 of keys and values."""

    def refused(words: list[str], **sizes: Any) -> list[str]:
        return [
            line.partition(":")[0] for line in refused_values(words, Layout(**{"precision": "bf16", **sizes}), 8, 4)
        ]

    packs, split = {"micro_batch_tokens": 64}, {"context_parallel": 2}
    for value in ("a2a+p2p", "all_gather", "allgather"):
        words = ["--cp-comm-type", "p2p", value, "--seed", "a2a"]
        named = ["--cp-comm-type " + value.replace("allg", "all_g")]
        assert [refused(words, **sizes) for sizes in ({}, packs, split, packs | split)] == [[], [], [], named]
    words = ["--cp-comm-type=a2a"]
    assert refused(words, **split, tensor_parallel=2) == refused(words, tensor_parallel=8) == []
    assert refused(words, **split, tensor_parallel=4) == refused(words, context_parallel=3) == ["--cp-comm-type a2a"]
    words = ["--attention-backend", "unfused"]
    assert [refused(words, **sizes) for sizes in ({}, packs, split)] == [[], *2 * [["--attention-backend unfused"]]]
    words = ["--transformer-impl", "transformer_engine"]
    assert refused(words, **packs) == [] == refused(words, precision="fp32")
    assert refused(words, **split, precision="fp32") == ["--transformer-impl transformer_engine"]


def test_a_layout_refuses_a_value_before_megatron_does(tmp_path: Path) -> None:
    write_model(tmp_path)
    layout = Layout(context_parallel=2, micro_batch_tokens=64)
    with pytest.raises(RecipeError, match=r"^--cp-comm-type a2a\+p2p: Transformer Engine's hierarchical"):
        own_flags(tmp_path, layout, {}, ["--cp-comm-type", "a2a+p2p"], 2)


def test_layers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's where it is installed and has an attention for what is asked."""
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(arguments, "_installed", lambda module: module == "transformer_engine")
    packs, split = {"micro_batch_tokens": 64}, {"context_parallel": 2}
    for sizes, fp32 in (({}, "transformer_engine"), (packs, "local"), (split, "local")):
        for precision, expected in (("fp32", fp32), ("bf16", "transformer_engine")):
            flags = arguments._platform_flags(Layout(**sizes, precision=precision))  # type: ignore[arg-type]
            assert (flags["transformer_impl"], flags["distributed_backend"]) == (expected, "nccl")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that all doors let through but for its flags."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path / "recipe.yaml"


def lines_of(path: Path, capsys: pytest.CaptureFixture[str], *argv: str, **sections: Any) -> list[str]:
    """The lines of a command's error about this recipe, about keys of Megatron's."""
    rollouts = {**SAMPLED, "verifier": "python:task.py:score"}
    values = {"name": "mine", "model": "model", "rollouts": rollouts, "teacher": {}, "student": {}, **sections}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(SystemExit) as caught:
        cli.main([argv[0], str(path), *argv[1:]])
    assert caught.value.code == 2
    message = capsys.readouterr().err.removeprefix("error: ")
    return [line.strip() for line in message.splitlines() if "megatron" in line]


DOORS = [["plan"], ["run"], ["run", "--dry-run"], ["submit"], ["submit", "--dry-run"]]


@pytest.mark.parametrize("argv", DOORS, ids=" ".join)
def test_recipes_are_refused(argv: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everywhere = {flag.removeprefix("--").replace("-", "_"): True for flag in REASONS}
    own = {"stages": {"student": {"megatron": {"use-mup": True}}}}
    found = lines_of(recipe, capsys, *argv, megatron={**everywhere, "use_mup": False}, **own)
    stages = "(for base-log-probs, teacher, cache, student)"
    named = {flag.removeprefix("--").replace("-", "_"): reason for flag, reason in REASONS.items()}
    expected = [f"megatron.{key}: {reason} {stages}" for key, reason in named.items() if key != "use_mup"]
    expected.append(f"stages.student.megatron.use-mup: {named['use_mup']} (for student)")
    assert found == expected


def test_other_flags_are_judged_beside_them(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_check, "subprocess", forked)
    given = {"use_mup": True, "log_intreval": 5}
    found = lines_of(recipe, capsys, "run", "--dry-run", megatron=given)
    assert [line.partition(" ")[0] for line in found] == ["megatron.use_mup:", "megatron:"]
    assert "did you mean --log-interval?" in found[1]
