"""Recipes: what is read, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.file import load_recipe
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Imported, Recipe, Sampled
from megatron_erpd.settings import TemplateSettings

MINIMAL = """
name: mine
model: models/base
rollouts: {prompts: p.jsonl, verifier: math-verify}
teacher: {loss: ce}
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str, *overrides: str, **layout: int) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides, layout)

    return read


def refused(read, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the first."""
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_are_filled_in_and_read_back(read):
    recipe = read(MINIMAL + "stages: {teacher: {layout: {tensor_parallel: 2}, megatron: {lr-decay-style: cosine}}}\n")
    assert isinstance(recipe.rollouts, Sampled) and recipe.rollouts.num_rollouts == 16
    assert recipe.folder == Path("runs/mine")
    again = read(recipe.to_yaml())
    assert again == recipe
    assert again.stages["teacher"].layout.model_fields_set == {"tensor_parallel"}


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*/recipe*.yaml")), ids=str)
def test_the_examples_are_recipes(path, read):
    recipe = load_recipe(path)
    assert read(recipe.to_yaml()) == recipe


def test_rollouts_from_a_file(read):
    recipe = read(MINIMAL, "rollouts={file: dump.jsonl, format: verl, fields: {reward: score}}")
    assert isinstance(recipe.rollouts, Imported) and recipe.rollouts.fields == {"reward": "score"}


def test_all_problems_are_told_at_once_with_their_places(read):
    lines = refused(
        read,
        """
        name: mine
        rollouts: {prompts: p.jsonl, verifer: math-verify, temperature: 0}
        teacher: {loss: cee, epochs: many}
        controls: {tight: {kind: replay, loss: ppo, clip_lo: 0.1}, odd: {kind: replai}}
        studnet: {}
        """,
    )
    text = "\n".join(lines)
    for expected in (
        "model: missing",
        "rollouts.verifier: missing",
        "rollouts.verifer: unknown key; did you mean verifier?",
        "rollouts.temperature: Input should be greater than 0",
        "teacher.loss: cee is unknown; choose one of ppo, ",
        "teacher.epochs: Input should be a valid number",
        "controls.tight.clip_lo: unknown key; did you mean clip_low?",
        "controls.odd",
        "studnet: unknown key; did you mean student?",
    ):
        assert expected in text
    assert len(lines) == 9


def test_an_unknown_key_without_a_likely_meaning_gets_the_list(read):
    (line,) = refused(read, MINIMAL + "cache: {zzz: 1}\n")
    assert line.startswith("cache.zzz: unknown key; the keys here are kind, signal")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("teacher: {loss: ce}\n", "'teacher' is given twice"),
        ("a: [1\n", "no YAML"),
        ("- a\n", "mapping"),
    ],
)
def test_what_is_no_recipe(read, text, expected):
    with pytest.raises(RecipeError, match=expected):
        read((MINIMAL if text.startswith("teacher") else "") + text)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: can't be read"):
        load_recipe(tmp_path / "nothing.yaml")


def test_a_runs_folder_stands_for_its_recipe(read, tmp_path, monkeypatch):
    recipe = read(MINIMAL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/recipe.yaml").write_text(recipe.of_run())
    again = load_recipe(tmp_path / "runs/mine")
    assert again.model_copy(update={"directory": None}) == recipe


def test_one_size_of_micro_batches(read):
    """Of two in a section none is taken; what comes over a recipe takes the place of its other one."""
    both = "layout: micro_batch_size 4 counts rollouts, micro_batch_tokens 8 counts tokens; give one of them"
    assert refused(read, MINIMAL + "layout: {micro_batch_size: 4, micro_batch_tokens: 8}") == [both]
    text = MINIMAL + "layout: {micro_batch_size: 4}\n"
    assert refused(read, text, "layout.micro_batch_size=4", "layout.micro_batch_tokens=8") == [both]
    stages = "stages: {teacher: {layout: {micro_batch_size: 4, micro_batch_tokens: 8}}}"
    assert refused(read, text + stages) == [f"stages.teacher.{both}"]
    for given in (read(text, "layout.micro_batch_tokens=8"), read(text, micro_batch_tokens=8)):
        assert (given.layout.micro_batch_size, given.layout.micro_batch_tokens) == (None, 8)
    teacher = next(
        s for s in plan(read(text + "stages: {teacher: {layout: {micro_batch_tokens: 8}}}")) if s.name == "teacher"
    )
    assert (teacher.layout.micro_batch_size, teacher.layout.micro_batch_tokens) == (None, 8)


def test_values_over_the_recipes(read):
    recipe = read(
        MINIMAL, "teacher.epochs=3", "student.delta=1", "student.teacher=live", "unlearned={}", tensor_parallel=2
    )
    assert recipe.teacher and recipe.teacher.epochs == 3
    assert recipe.student and recipe.student.delta == 1
    assert recipe.unlearned and recipe.unlearned.unlearn
    assert recipe.layout.tensor_parallel == 2
    assert read(MINIMAL, "student={}", "teacher=null").teacher is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "write SECTION.KEY=VALUE"),
        ("teacher..epochs=1", "write SECTION.KEY=VALUE"),
        ("name.first=x", "name is a value, not a section"),
        ("teacher.epochs=[", "is no YAML value"),
    ],
)
def test_bad_overrides(read, override, expected):
    with pytest.raises(RecipeError, match=expected):
        read(MINIMAL, override)


def test_groups_of_one_where_nothing_compares_within_them(read):
    overrides = ("teacher.loss=ce", "unlearned={loss: ppo, advantage: raw}", "student={form: policy_gradient}")
    assert read(MINIMAL, "rollouts.num_rollouts=1", *overrides).unlearned


def test_a_reader_of_the_signal_inherits_the_caches(read):
    recipe = read(
        MINIMAL,
        "cache={signal: contrast, delta: 0.25, projection_clip: 8}",
        "student={form: policy_gradient}",
        "controls.live={kind: distill, teacher: live, signal: strong}",
        "controls.plain={kind: distill}",
    )
    assert recipe.student and recipe.student.signal == "contrast"
    live, plain = recipe.controls["live"], recipe.controls["plain"]
    assert (live.signal, live.delta, live.projection_clip) == ("strong", 0.25, 8)  # type: ignore[union-attr]
    # Not read: the cache's count.
    assert (plain.signal, plain.delta, plain.projection_clip) == ("strong", 0.5, None)  # type: ignore[union-attr]


def test_an_on_policy_control_samples_as_the_rollouts_do(read):
    recipe = read(
        MINIMAL,
        "rollouts.max_new_tokens=9",
        "rollouts.num_rollouts=5",
        "controls.grpo={kind: on_policy, num_rollouts: 3}",
    )
    grpo = recipe.controls["grpo"]
    assert (grpo.max_new_tokens, grpo.num_rollouts) == (9, 3)  # type: ignore[union-attr]
    assert read(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("rollouts", "evaluation", "expected"),
    [
        ("{}", "{}", (False, None, {}, None)),
        ("{chat_template: true, template_date: 2026-11-29}", "{}", (True, None, {}, "2026-11-29")),
        ("{chat_template: true, system_prompt: a}", "{system_prompt: b}", (True, "b", {}, None)),
        ("{chat_template: true, system_prompt: a}", "{system_prompt: null}", (True, None, {}, None)),
        ("{chat_template: true, template_arguments: {x: false}}", "{}", (True, None, {"x": False}, None)),
        ("{chat_template: true, system_prompt: a}", "{chat_template: false}", (False, None, {}, None)),
        ("{file: x.jsonl, template_arguments: {x: 1}}", "{}", (True, None, {"x": 1}, None)),
        ("{file: x.jsonl, user_message: true}", "{}", (True, None, {}, None)),
        ("{file: x.jsonl}", "{}", (False, None, {}, None)),
    ],
)
def test_prompts_go_through_the_template_alike_everywhere(read, rollouts, evaluation, expected):
    sampled = {} if "file" in rollouts else {"prompts": "p.jsonl", "verifier": "math-verify"}
    given = {**sampled, **yaml.safe_load(rollouts)}
    held_out = {"prompts": "h.jsonl", "verifier": "math-verify", **yaml.safe_load(evaluation)}
    sections = {"rollouts": given, "evaluation": held_out, "selection": {**held_out, "prompts": "v.jsonl"}}
    if sampled:
        sections["controls"] = {"grpo": {"kind": "on_policy", **yaml.safe_load(evaluation)}}
    recipe = read(yaml.safe_dump({**yaml.safe_load(MINIMAL), **sections}))
    for section in (recipe.evaluation, recipe.selection, *recipe.controls.values()):
        found = [getattr(section, name) for name in ("chat_template", *TemplateSettings.model_fields)]
        assert tuple(found) == expected
    assert read(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["teacher=null"], "nothing to train"),
        (["rollouts.system_prompt=a"], "rollouts: system_prompt has no effect without chat_template"),
        (["rollouts={file: x.jsonl, template_date: tomorrow}"], "rollouts.template_date: 'tomorrow' is no date"),
        (["selection={prompts: v.jsonl}", "teacher=null", "student={}"], "selection: there is no teacher"),
        (["selection={prompts: h.jsonl}", "evaluation={prompts: h.jsonl}"], "selection.prompts: are those of the eval"),
        (["cache={signal: auto}"], "cache.signal: auto is decided by the teacher's reward on held-out prompts"),
        (
            ["selection={prompts: v.jsonl}", "student={form: policy_gradient, signal: auto}"],
            "student.signal: auto takes what the cache chose; set cache.signal to auto",
        ),
        (
            ["selection={prompts: v.jsonl}", "cache={signal: auto}", "student={teacher: live}"],
            "student: signal: auto is decided where a teacher cache is made",
        ),
        (["warm_up={rollouts: d.parquet, kl_coefficient: 0.1}"], "warm_up: kl_coefficient: the warm-up has no base"),
        (["warm_up={rollouts: d.parquet, loss: ce}"], "warm_up: loss ce: a warm-up has no log-probs"),
        (["warm_up={rollouts: d.parquet, max_kl: 0.1}"], "warm_up: max_kl: the warm-up has no base policy"),
        (["rollouts={file: x.jsonl}", "controls.grpo={kind: on_policy}"], "controls.grpo: on_policy samples from"),
        (["controls.grpo={kind: on_policy, epochs: 2}"], "controls.grpo.epochs: unknown key"),
        (["cache.delta=0"], "cache.delta: Input should be greater than 0"),
        (["cache.eta_max=-1"], "cache.eta_max: Input should be greater than 0"),
        (["cache.eta_max=.inf"], "cache.eta_max: Input should be a finite number"),
        (["student={teacher: live, delta: -0.5}"], "student.delta: Input should be greater than 0"),
        (["student={teacher: live, eta_max: 0}"], "student.eta_max: Input should be greater than 0"),
        (["controls.x={kind: distill, teacher: live, eta_max: 0}"], "controls.x.eta_max: Input should be greater than"),
        (
            ["rollouts.num_rollouts=1", "teacher.loss=sapo"],
            "teacher.advantage: group_norm compares the rollouts of a prompt, and rollouts.num_rollouts is 1",
        ),
        (
            ["rollouts.num_rollouts=1", "unlearned={loss: mse, advantage: group_mean}"],
            "unlearned.advantage: group_mean",
        ),
        (
            ["rollouts.num_rollouts=1", "teachers.x={loss: ppo, advantage: leave_one_out}"],
            "teachers.x.advantage: leave",
        ),
        (["rollouts.num_rollouts=1", "controls.x={kind: replay, loss: gspo}"], "controls.x.advantage: group_norm"),
        (
            ["rollouts.num_rollouts=1", "student={form: policy_gradient, sign_agreement: true}"],
            "student.advantage: group_norm compares the rollouts of a prompt",
        ),
        (["rounds=2"], "rounds: the next round starts from the student"),
        (
            ["rounds=2", "student={}", "rollouts={file: r.jsonl}"],
            "rounds: a later round learns from rollouts of its own",
        ),
        (["controls.student={kind: replay}"], "controls.student: a control's name"),
        (["controls={'a/b': {kind: replay}}"], "controls.a/b: a control's name"),
        (["teachers.student={}"], "teachers.student: a teacher's name"),
        (["teachers.strong={}"], "teachers.strong: a teacher's name"),
        (["teachers={a-b: {}}"], "teachers.a-b: a teacher's name"),
        (["teachers.x={}", "controls.x={kind: replay}"], "teachers.x: a teacher's name"),
        (["teachers.x={epoch: 3}"], "teachers.x.epoch: unknown key; did you mean epochs?"),
    ],
)
def test_contradictions(read, overrides, expected):
    (line,) = refused(read, MINIMAL, *overrides)
    assert expected in line
