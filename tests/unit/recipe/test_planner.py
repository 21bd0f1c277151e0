"""From recipes to stages: their order, commands and identities."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.commands import held_out, rollouts
from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.recipe.command_line import read_request
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.recipe.requests import Precompute
from megatron_erpd.recipe.stages import TOOLS, Stage, dependencies, flags_of

TRAIN_ON_POLICY = "tools/train_on_policy.py"

SECTIONS: dict[str, Any] = {
    "name": "mine",
    "output": "out",
    "prepare": "python prepare.py --output {output}",
    "model": "prepare/model",
    "warm_up": {"rollouts": "prepare/demonstrations.parquet", "epochs": 2},
    "rollouts": {"prompts": "prepare/prompts.jsonl", "verifier": "python:task.py:score", "num_prompts": 8},
    "teacher": {"loss": "ce", "checkpoints": 2},
    "unlearned": {"loss": "ce"},
    "cache": {"signal": "unlearned", "k": 8},
    "student": {},
    "controls": {
        "advantage": {"kind": "distill", "form": "policy_gradient", "signal_weight": 0, "advantage_weight": 1},
        "live": {"kind": "distill", "teacher": "live", "signal": "strong"},
        "sapo": {"kind": "replay", "loss": "sapo"},
    },
    "evaluation": {"prompts": "prepare/heldout.jsonl", "checkpoints": True},
}


def stages_of(**sections: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(Recipe(**{**SECTIONS, **sections}))}


def test_the_stages_of_a_run():
    stages = stages_of()
    assert list(stages) == [
        *("prepare", "initial", "warm-up", "base-hf", "rollouts", "base-log-probs", "rewards", "teacher", "unlearned"),
        *("cache", "student", "controls/advantage", "controls/live", "controls/sapo", "export", "evaluation", "report"),
    ]
    waits = {name: dependencies(stage, list(stages.values())) for name, stage in stages.items()}
    assert waits["prepare"] == []
    assert waits["initial"] == ["prepare"]
    assert waits["rollouts"] == ["prepare", "base-hf"]
    assert waits["base-log-probs"] == ["warm-up", "rollouts"] and waits["rewards"] == ["prepare", "rollouts"]
    assert waits["teacher"] == waits["unlearned"] == ["warm-up", "rollouts", "base-log-probs", "rewards"]
    assert waits["cache"] == ["warm-up", "rollouts", "teacher", "unlearned"]
    assert waits["student"] == ["warm-up", "rollouts", "base-log-probs", "rewards", "cache"]
    assert waits["controls/advantage"] == waits["teacher"]
    assert waits["controls/live"] == [*waits["teacher"], "teacher"]
    assert waits["export"] == [
        "teacher",
        "unlearned",
        "student",
        "controls/advantage",
        "controls/live",
        "controls/sapo",
    ]
    assert set(waits["report"]) == set(stages) - {"prepare", "report"}
    order = list(stages)
    assert all(order.index(needed) < order.index(name) for name, names in waits.items() for needed in names)


def test_folders():
    stages = stages_of()
    folders = {name: str(stage.output) for name, stage in stages.items()}
    assert folders["initial"] == "out/round-00/initial" and folders["warm-up"] == "out/round-00/warm-up"
    assert folders["base-hf"] == "out/round-01/base-hf" and folders["controls/sapo"] == "out/round-01/controls/sapo"
    assert folders["report"] == "out/report" and folders["prepare"] == "out/prepare"
    assert str(stages_of(warm_up=None)["base"].output) == "out/round-01/base"


def test_commands_are_what_a_person_would_type(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    stages = stages_of(layout={"tensor_parallel": 2, "data_parallel": 2, "micro_batch_size": 8})
    assert stages["prepare"].shown() == "python prepare.py --output out/prepare"
    assert stages["teacher"].shown() == (
        "torchrun --standalone --nproc-per-node 4 -- tools/train_teacher.py --base out/round-00/warm-up "
        "--rollouts out/round-01/rollouts --base-log-probs out/round-01/base-log-probs "
        "--rewards out/round-01/rewards --checkpoints 2 "
        "--output out/round-01/teacher --verify-inputs --tensor-parallel 2 --data-parallel 2 --micro-batch-size 8"
    )
    assert stages["initial"].shown() == (
        "python tools/import_checkpoint.py --hf out/prepare/model --output out/round-00/initial --verify-inputs"
    )
    assert stages["rollouts"].shown() == (
        "python tools/sample.py --model out/round-01/base-hf/base --prompts out/prepare/prompts.jsonl "
        "--verifier python:task.py:score --num-prompts 8 --output out/round-01/rollouts --verify-inputs"
    )
    assert stages["rewards"].shown() == (
        "python tools/score.py --rollouts out/round-01/rollouts --prompts out/prepare/prompts.jsonl "
        "--verifier python:task.py:score --output out/round-01/rewards --verify-inputs"
    )
    assert "--policy teacher=out/round-01/teacher --policy unlearned=out/round-01/unlearned" in stages["cache"].shown()
    assert "--policy teacher=out/round-01/teacher" in stages["controls/live"].shown()
    assert "--cache" not in stages["controls/live"].shown() and "--cache" not in stages["controls/advantage"].shown()
    for stage in stages.values():
        assert stage.argv()[0] == sys.executable
        assert shlex.split(stage.shown())[-2:] == stage.argv()[-2:]
    assert all((Path("tools") / script).is_file() for script in TOOLS.values())


def test_torchrun_takes_the_commands_as_they_are():
    from torch.distributed.run import parse_args

    megatron = {"log-interval": 1}
    for stage in stages_of(layout={"tensor_parallel": 2}, megatron=megatron).values():
        if stage.num_processes > 1:
            words = shlex.split(stage.shown())
            parsed = parse_args(words[1:])
            assert parsed.nproc_per_node == "2"
            assert [parsed.training_script, *parsed.training_script_args] == words[words.index("--") + 1 :]


def test_a_layout_is_no_part_of_the_identity():
    plain, parallel = stages_of(), stages_of(layout={"tensor_parallel": 2, "micro_batch_size": 8})
    assert {n: (s.identity, s.inputs) for n, s in plain.items()} == {
        n: (s.identity, s.inputs) for n, s in parallel.items()
    }


def test_layouts_and_flags_of_one_stage():
    stages = stages_of(
        layout={"tensor_parallel": 2, "micro_batch_size": 8},
        megatron={"lr_decay_style": "cosine", "log-progress": True},
        stages={
            "teacher": {"layout": {"pipeline_parallel": 2}, "megatron": {"log-progress": False}},
            "base_log_probs": {"layout": {"tensor_parallel": 1}},
            "controls/sapo": {"layout": {"data_parallel": 2}},
        },
    )
    assert (stages["teacher"].layout.tensor_parallel, stages["teacher"].layout.pipeline_parallel) == (2, 2)
    assert stages["teacher"].megatron == ("--lr-decay-style", "cosine")
    assert stages["teacher"].argv()[-3:] == ["--", "--lr-decay-style", "cosine"]
    assert stages["teacher"].identity["megatron"] == ["--lr-decay-style", "cosine"]
    assert stages["student"].megatron == ("--lr-decay-style", "cosine", "--log-progress")
    assert "megatron" not in stages["initial"].identity
    assert stages["base-log-probs"].layout.num_processes == 1
    assert stages["controls/sapo"].layout.num_processes == 4
    assert stages["export"].layout.num_processes == 1 and stages["rollouts"].layout.num_processes == 1


def test_later_rounds_start_from_the_student():
    stages = stages_of(rounds=2, warm_up=None)
    assert str(stages["round-02/teacher"].inputs["base"]) == "out/round-01/student"
    assert str(stages["round-02/rollouts"].inputs["model"]) == "out/round-01/export/student"
    assert (stages["rollouts"].identity["seed"], stages["round-02/rollouts"].identity["seed"]) == (1, 2)
    assert stages["round-02/evaluation"].inputs["model-base"] == Path("out/round-01/export/student")
    # How far all rounds have come is measured from the first base; in the first round that is the base itself.
    assert "origin" not in stages["evaluation"].inputs
    assert stages["round-02/evaluation"].inputs["origin"] == stages["evaluation"].inputs["model-base"]
    assert "--origin out/prepare/model" in stages["round-02/evaluation"].shown()
    assert list(stages)[-1] == "report"


SELECTION = {"prompts": "prepare/validation.jsonl", "num_samples": 2}


def test_a_selection_puts_one_checkpoint_in_the_teachers_place(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    stages = stages_of(selection=SELECTION, cache={"signal": "auto", "k": 8})
    order = list(stages)
    assert order[order.index("unlearned") + 1 :][:3] == ["candidates", "selection", "cache"]
    waits = {name: dependencies(stage, list(stages.values())) for name, stage in stages.items()}
    assert waits["candidates"] == ["teacher"]
    assert waits["selection"] == ["prepare", "base-hf", "teacher", "candidates"]
    assert waits["cache"] == ["warm-up", "rollouts", "unlearned", "selection"]
    assert "teacher" not in waits["controls/live"] and "selection" in waits["controls/live"]
    assert stages["selection"].shown() == (
        "python tools/select_teacher.py --model out/round-01/base-hf/base --teacher out/round-01/teacher "
        "--candidates out/round-01/candidates --prompts out/prepare/validation.jsonl --verifier python:task.py:score "
        "--rollouts out/round-01/rollouts --unlearned --num-samples 2 --output out/round-01/selection --verify-inputs"
    )
    assert (
        stages["candidates"]
        .shown()
        .endswith("--checkpoint teacher=out/round-01/teacher@all --output out/round-01/candidates --verify-inputs")
    )
    cache = stages["cache"].shown()
    assert "--policy teacher=out/round-01/selection --policy unlearned=out/round-01/unlearned" in cache
    assert "--selection out/round-01/selection --signal auto" in cache
    export = stages["export"]
    assert "--checkpoint teacher=out/round-01/selection " in export.shown()
    assert "--checkpoint teacher=out/round-01/teacher@all" in export.shown()
    assert export.identity["iterations"]["teacher"] is None and export.identity["iterations"]["teacher@all"] == "all"
    assert export.inputs["teacher@all"] == Path("out/round-01/teacher")
    assert "selection" not in stages["student"].inputs and "selection" not in stages["controls/sapo"].inputs


def test_auto_needs_the_policies_of_every_outcome():
    selected = {"selection": SELECTION, "cache": {"signal": "auto"}, "controls": {}}
    assert {"policy-teacher", "policy-unlearned"} <= set(stages_of(**selected)["cache"].inputs)
    alone = stages_of(**selected, unlearned=None)
    assert "policy-unlearned" not in alone["cache"].inputs and not alone["selection"].request.unlearned
    explicit = stages_of(selection=SELECTION, cache={"signal": "contrast"}, controls={})["cache"]
    assert "policy-teacher" not in explicit.inputs and explicit.request.selection, "it is reported all the same"


def test_later_rounds_select_too():
    stages = stages_of(selection=SELECTION, rounds=2)
    assert stages["round-02/selection"].inputs["model"] == Path("out/round-01/export/student")
    assert stages["round-02/cache"].inputs["policy-teacher"] == Path("out/round-02/selection")


def test_each_round_takes_the_next_prompts():
    stages = stages_of(rounds=3)
    assert "--first-prompt" not in stages["rollouts"].shown() and "first_prompt" not in stages["rollouts"].identity
    assert "--num-prompts 8 --first-prompt 16" in stages["round-03/rollouts"].shown()
    assert stages["round-03/rollouts"].identity["first_prompt"] == 16
    every = stages_of(rounds=2, rollouts={k: v for k, v in SECTIONS["rollouts"].items() if k != "num_prompts"})
    assert "--first-prompt" not in every["round-02/rollouts"].shown()


def test_imported_rollouts_and_no_evaluation():
    rollouts = {"file": "dump.jsonl", "format": "verl", "fields": {"reward": "score"}, "append_eos": False}
    stages = stages_of(rollouts=rollouts, evaluation=None)
    shown = stages["rollouts"].shown()
    assert "--source dump.jsonl --tokenizer out/round-01/base-hf/base --format verl --no-append-eos" in shown
    assert "--field reward=score" in shown
    assert "evaluation" not in stages
    # They bring their rewards with them.
    assert "rewards" not in stages and "rewards" not in stages["teacher"].inputs


def test_no_cache_where_nothing_reads_one():
    assert "cache" not in stages_of(student=None, controls={})
    assert "cache" in stages_of(controls={})


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"stages": {"studnet": {}}}, "stages.studnet: this run has no such stage; its stages are base-hf"),
        ({"stages": {"rollouts": {"megatron": {"lr": 1}}}}, "stages.rollouts.megatron: this stage trains no model"),
        ({"unlearned": None}, "cache.signal: 'unlearned' needs the policy 'unlearned'; give the section unlearned"),
        ({"cache": {"signal": "teacher/"}}, "cache.signal: "),
        ({"cache": {"signal": "strong - teacher/base"}}, "cache.signal: .*the signal is 0 everywhere"),
        ({"cache": {"kind": "token"}}, "student: the projection reads top-k targets; set cache.kind to topk"),
        ({"rollouts": {"file": "x.jsonl"}}, "evaluation.verifier: missing"),
        ({"rollouts": {"file": "x.jsonl"}, "selection": SELECTION}, "selection.verifier: missing"),
        (
            {"student": {"form": "policy_gradient", "signal": "teacher/other"}},
            "student.signal: .* needs the policy 'other'; give the section teachers.other",
        ),
    ],
)
def test_what_can_not_be_planned(sections, expected):
    with pytest.raises(RecipeError, match=expected):
        stages_of(**sections)


def test_further_teachers():
    stages = stages_of(
        teachers={"other": {"loss": "sapo"}, "third": {"loss": "mse", "checkpoints": 2}},
        cache={"signal": "0.5*teacher/base + 0.5*other/third", "k": 8},
        student={"form": "policy_gradient", "signal": "other/unlearned"},
        controls={"live": {"kind": "distill", "teacher": "live", "signal": "third/base"}},
        stages={"teachers/other": {"layout": {"tensor_parallel": 2}}},
    )
    order = list(stages)
    assert order.index("unlearned") + 1 == order.index("teachers/other") < order.index("cache")
    assert str(stages["teachers/other"].output) == "out/round-01/teachers/other"
    assert stages["teachers/other"].layout.tensor_parallel == 2
    given = [name for name in stages["cache"].inputs if name.startswith("policy-")]
    assert given == ["policy-other", "policy-teacher", "policy-third", "policy-unlearned"]
    assert "--policy third=out/round-01/teachers/third" in stages["controls/live"].shown()
    assert "other=out/round-01/teachers/other" in stages["export"].shown()
    assert "third=out/round-01/teachers/third@all" in stages["export"].shown()


def test_an_on_policy_control_needs_no_rollouts():
    stages = stages_of(controls={"grpo": {"kind": "on_policy", "updates": 9}})
    stage = stages["controls/grpo"]
    assert dependencies(stage, list(stages.values())) == ["prepare", "warm-up"]
    assert stage.shown() == (
        f"python {TRAIN_ON_POLICY} --base out/round-00/warm-up --prompts out/prepare/prompts.jsonl "
        "--verifier python:task.py:score --updates 9 --num-prompts 8 --output out/round-01/controls/grpo "
        "--verify-inputs"
    )
    assert "grpo=out/round-01/controls/grpo" in stages["export"].shown()


def test_stages_verify_what_they_read_unless_told_otherwise():
    stages = stages_of()
    for stage in stages.values():
        assert ("--verify-inputs" in stage.flags()) == stage.is_tool, stage.name
        assert "--verify-inputs" not in stage.changed(verify_inputs=False).flags()
        assert not any("verify" in key for key in stage.identity)


def test_an_exact_kl_gets_the_bases_rows():
    exact = {"loss": "sapo", "kl_coefficient": 0.1, "kl_estimator": "exact", "kl_topk": 16}
    assert "--kind token" in stages_of()["base-log-probs"].shown()
    assert "--signal none --k 16" in stages_of(teacher=exact)["base-log-probs"].shown()
    assert "--signal none --k 16" in stages_of(controls={"x": {"kind": "replay", **exact}})["base-log-probs"].shown()
    with pytest.raises(RecipeError, match=r"teacher.kl_topk: 16, unlearned.kl_topk: 8: the base's rows"):
        stages_of(teacher=exact, unlearned={**exact, "kl_topk": 8})


def test_virtual_pipeline_stages_are_for_trainings():
    given = {"num-virtual-stages-per-pipeline-rank": 2, "microbatch-group-size-per-virtual-pipeline-stage": 4}
    virtual, plain = stages_of(megatron={**given, "adam-eps": 1e-7}), stages_of(megatron={"adam-eps": 1e-7})
    assert virtual["student"].megatron == (*flags_of(given), "--adam-eps", "1e-07")
    assert all(virtual[name].identity == plain[name].identity for name in ("cache", "student"))
    assert virtual["cache"].megatron == plain["cache"].megatron == ("--adam-eps", "1e-07")
    words = [*virtual["cache"].flags()[: -len(plain["cache"].megatron)], *virtual["student"].megatron]
    assert read_request(Precompute, words) == virtual["cache"].request


def test_megatron_flags():
    flags = {
        "recompute_granularity": "full",
        "--log-progress": True,
        "off": False,
        "gone": None,
        "mixture": ["a", "b"],
        "n": 3,
    }
    assert flags_of(flags) == (
        *("--recompute-granularity", "full", "--log-progress", "--mixture", "a", "b", "--n", "3"),
    )


class _Captured(ErpdError):
    pass


def test_commands_begin_with_what_was_planned(monkeypatch):
    seen: list[Any] = []

    def begin(request: Any) -> None:
        seen.append(request)
        raise _Captured

    for room in (rollouts, held_out):
        monkeypatch.setattr(room, "begin", begin)
    monkeypatch.setattr("megatron_erpd.sampling.score.prompts_of_rollouts", lambda *given: [])
    imported = {"file": "dump.jsonl", "fields": {"reward": "score"}, "on_reject": "skip"}
    evaluation = {"prompts": "reasoning-gym:chain_sum?size=9", "verifier": "math-verify", "num_samples": 2}
    functions = {"sample": rollouts.sample, "score": rollouts.score, "import-rollouts": rollouts.import_rollouts}
    functions |= {"select": held_out.select, "evaluate": held_out.evaluate}
    planned = [*stages_of(selection=SELECTION, rounds=2).values()]
    planned += stages_of(rollouts=imported, evaluation=evaluation).values()
    stages = [stage for stage in planned if stage.command in functions]
    assert {stage.command for stage in stages} == set(functions)
    for stage in stages:
        with pytest.raises(_Captured):
            functions[stage.command](stage.flags())
        assert seen.pop() == stage.request


def test_monitoring_is_asked_for_in_trainings_and_is_no_part_of_their_identity():
    plain, watched = stages_of(), stages_of(monitoring={"wandb_project": "erpd", "wandb_mode": "offline"})
    flags = ["--wandb-project", "erpd", "--wandb-mode", "offline", "--wandb-dir", "out/wandb"]
    for name, stage in watched.items():
        assert stage.identity == plain[name].identity
        words = stage.flags()
        trains = stage.command in ("train-teacher", "distill")
        assert ("--wandb-project" in words) == trains
        if trains:
            at = words.index("--wandb-project")
            assert words[at : at + 6] == flags
            assert words[:at] + words[at + 6 :] == plain[name].flags()
    elsewhere = stages_of(monitoring={"wandb_project": "erpd", "wandb_dir": "/scratch"})["teacher"].flags()
    assert elsewhere[elsewhere.index("--wandb-dir") + 1] == "/scratch"


def test_monitoring_without_a_project_is_refused():
    with pytest.raises(ValueError, match="wandb_mode offline has no effect with wandb_project: none"):
        stages_of(monitoring={"wandb_mode": "offline"})
