"""`run`, `run --dry-run`, `status` and `plan` agree on every stage: done, undecided, again, resumed or new."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_erpd.commands import cli, status
from megatron_erpd.launch import local
from megatron_erpd.launch.display import Display
from megatron_erpd.launch.processes import Slots
from megatron_erpd.manifest import CONTENT, MANIFEST, REQUEST, begin_artifact, finish_artifact
from megatron_erpd.plan.resources import estimate
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.stages import Stage

RECIPE = """
name: mine
model: model
rollouts: {prompts: p.jsonl, verifier: "python:score.py:score"}
teacher: {loss: ce}
student: {}
"""
MODEL = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320},
    **{"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu"},
    "tie_word_embeddings": False,
}
WORDS = {"done": "done", "undecided": "undecided", "again": "again", "resumed": "stopped", "new": "waiting"}
"""Word of a verdict to the state that `status` shows."""


class InProcess:
    """Stands for a stage's process: leaves what its settings and inputs decide, at once."""

    started: list[str] = []

    def __init__(self, stage: Stage, log: Path, gpus: Any, *rest: Any) -> None:
        self.stage, self.log, self.gpus, self.elapsed = stage, log, gpus, 0.0
        self.log_start = 0
        self.started.append(stage.name)
        inputs = Artifacts(log.parent.parent).digests(stage)
        if stage.is_tool:
            begin_artifact(stage.output, stage.command, stage.request.recorded.identity, inputs)
        if stage.command == "import":
            shutil.copytree(stage.inputs["hf"], stage.output / "hf")
        (stage.output / "weights").write_text(json.dumps([stage.identity, inputs]))
        if stage.command == "score":  # the same rewards, whoever gives them
            (stage.output / CONTENT).write_text('{"digest": null}')
        if stage.is_tool:
            finish_artifact(stage.output)

    def poll(self) -> int:
        return 0

    def note_end(self, *_: str) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the recipe; returns the stages that were started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "StageProcess", InProcess)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(MODEL))
    Path("p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    Path("score.py").write_text("def score(record, response):\n    return 1.0\n")
    Path("r.yaml").write_text(RECIPE)

    def run(*flags: str) -> list[str]:
        recipe = load_recipe(Path("r.yaml"), flags)
        stages = plan(recipe)
        InProcess.started = []
        display = Display("test", [stage.name for stage in stages], Console(file=io.StringIO()))
        local.Runner(recipe.folder, stages, Slots(gpus=[], cores=4), display).run(stages)
        return InProcess.started

    return run


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's model has no weights, which a dry run would say in its last lines."""
    monkeypatch.setattr("megatron_erpd.launch.preflight.check_recipe", lambda *given, **named: None)


def verdicts(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Stage to the word of the verdict, on which all commands agree, with its reasons."""
    argv = [word for flag in flags for word in ("--set", flag)]
    capsys.readouterr()
    cli.main(["run", "r.yaml", "--dry-run", *argv])
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    found = dict(line.removeprefix("# ").split(": ", 1) for line in lines)
    recipe = load_recipe(Path("r.yaml"), flags)
    assert {row.name: row.verdict for row in estimate(recipe).stages} == found
    rows = status.status_table(recipe).rows
    states = {name: row.state for name, row in rows.items()}
    assert states == {name: WORDS[word.partition(",")[0]] for name, word in found.items()}
    for name, word in found.items():
        if word.startswith("again, "):
            assert rows[name].note == word.removeprefix("again, ")
        if word.startswith("undecided, "):
            assert rows[name].note == word.removeprefix("undecided, ")
    return found


ALL = ["base", "rollouts", "base-log-probs", "rewards", "teacher", "cache", "student", "export", "report"]


def write(path: str, text: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(text) and None


def interrupt(stage: str) -> Callable[[], None]:
    def lose_the_manifest() -> None:
        folder = Path("runs/mine/round-01") / stage
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / REQUEST).write_text(json.dumps({key: manifest[key] for key in ("stage", "settings", "inputs")}))
        (folder / MANIFEST).unlink()

    return lose_the_manifest


CHANGES: dict[str, tuple[Callable[[], Any], list[str], dict[str, str]]] = {
    # What is done, flags, and the reasons of the stages that are not done then.
    "nothing": (lambda: None, [], {}),
    "layout": (lambda: None, ["layout.tensor_parallel=2", "layout.micro_batch_size=2"], {}),
    "a comment": (write("score.py", "def score(record, response):\n    # why\n    return 1.0\n"), [], {}),
    "the cache": (
        lambda: None,
        ["cache.delta=0.3"],
        {
            "cache": "again, because delta: ",
            "student": "its input cache will be made anew",
            "export": "its input student will be made anew",
            "report": "again, because its inputs cache, student and export will be made anew",
        },
    ),
    "the student alone": (lambda: None, ["student.epochs=9"], dict.fromkeys(ALL[6:], "again, because ")),
    "prompts": (
        write("p.jsonl", '{"prompt": "1+2=", "answer": "3"}\n'),
        [],
        {"rollouts": "again, because input prompts changed", **dict.fromkeys(ALL[2:], "again, because its input")},
    ),
    "the verifier": (
        write("score.py", "def score(record, response):\n    return 0.5 + 0.5\n"),
        [],
        {
            "rewards": "again, because input verifier changed",
            "teacher": "undecided, kept if its input rewards comes out the same",
            **dict.fromkeys(ALL[5:], "undecided, kept if its input"),
        },
    ),
    "an answer": (
        write("p.jsonl", '{"prompt": "1+1=", "answer": "11"}\n'),
        [],
        {"rewards": "again, because input prompts changed", **dict.fromkeys(ALL[4:], "undecided, kept if its input")},
    ),
    "model": (write("model/config.json", json.dumps({**MODEL, "rope_theta": 1e5})), [], dict.fromkeys(ALL, "again")),
    "precision": (lambda: None, ["layout.precision=bf16"], dict.fromkeys([ALL[2], *ALL[4:]], "again, because ")),
    "a stage's folder": (
        lambda: shutil.rmtree("runs/mine/round-01/student"),
        [],
        {"student": "new", "export": "undecided, kept if its input student comes out the same", "report": "undecided"},
    ),
    "an interrupted stage": (
        interrupt("student"),
        [],
        {
            "student": "resumed, because it did not end, and resumes",
            "export": "undecided, kept if its input student comes out the same",
            "report": "undecided, kept if its inputs student and export come out the same",
        },
    ),
    "a removed file": (
        lambda: Path("runs/mine/round-01/export/weights").unlink(),
        [],
        {"export": "again, because runs/mine/round-01/export/weights: named in", "report": "undecided"},
    ),
}
KEPT = {
    **{change: ["teacher", "cache", "student", "export"] for change in ("the verifier", "an answer")},
    "a stage's folder": ["export", "report"],
    "an interrupted stage": ["export", "report"],
    "a removed file": ["report"],
}
"""What comes out the same, to the bit, leaves these as they are after all."""


@pytest.mark.parametrize("change", CHANGES)
def test_all_commands_agree(run, capsys, change):
    assert verdicts(capsys) == dict.fromkeys(ALL, "new")
    assert run() == ALL
    act, flags, expected = CHANGES[change]
    act()
    found = verdicts(capsys, *flags)
    not_done = {name: word for name, word in found.items() if not word.startswith("done, because")}
    assert list(not_done) == list(expected)
    for name, word in expected.items():
        assert word in not_done[name]
    assert run(*flags) == [name for name in not_done if name not in KEPT.get(change, [])]
    # Only what was left open is kept after all; with other rewards or another report it is not.
    assert all(not_done[name].startswith("undecided, ") for name in KEPT.get(change, []))
    assert all(word.startswith("done, because") for word in verdicts(capsys, *flags).values())


def test_what_was_replaced_comes_back(run, capsys):
    run()
    run("student.epochs=9")
    found = verdicts(capsys)
    assert found["student"].startswith("done, because the one asked for is kept in runs/mine/replaced/student/0001")
    # What isn't kept is made again from it.
    not_done = [name for name, word in found.items() if not word.startswith("done")]
    assert not_done == ["export", "report"] == run()
    # The student of 9 epochs is in turn kept, also where nothing is in its place.
    shutil.rmtree("runs/mine/round-01/student")
    assert verdicts(capsys, "student.epochs=9")["student"].startswith("done, because the one asked for is kept in")
    assert run("student.epochs=9") == ["export", "report"]


def test_a_missing_input_of_the_users(run, capsys):
    run()
    Path("p.jsonl").unlink()
    cli.main(["run", "r.yaml", "--dry-run"])
    out = capsys.readouterr().out
    assert "# rollouts: blocked, because p.jsonl: no such file" in out
    assert "# base: done" in out and "# teacher: again, because its input rollouts can't be made" in out


def test_a_run_from_before_rewards_were_a_stage(run, capsys):
    """Its trainings are those asked for where the verifier gives the rewards that the rollouts have."""
    run()
    for folder in ("round-01/teacher", "round-01/student", "report"):
        file = Path("runs/mine") / folder / MANIFEST
        manifest = json.loads(file.read_text())
        manifest["inputs"].pop("rewards", None)
        file.write_text(json.dumps({key: value for key, value in manifest.items() if key != "checksum"}))
    shutil.rmtree("runs/mine/round-01/rewards")
    found = verdicts(capsys)
    assert found["rewards"] == "new" and found["teacher"] == "undecided, kept if its input rewards comes out the same"
    # The report of a run lists the stages.
    assert found["report"].startswith("again, because its input rewards will be made; its inputs ")
