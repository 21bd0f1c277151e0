"""Settings: flags and back, and what contradicts itself."""

from __future__ import annotations

import argparse
from datetime import date
from typing import Any

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.settings import (
    DistillSettings,
    EvaluateSettings,
    ImportSettings,
    Layout,
    OnPolicySettings,
    PrecomputeSettings,
    ReplaySettings,
    SampleSettings,
    SelectSettings,
    Settings,
    parse_settings,
)
from megatron_erpd.settings.arguments import add_settings_arguments, settings_from_namespace, settings_to_argv

MODELS: list[type[Settings]] = [
    *(Layout, ReplaySettings, OnPolicySettings, SampleSettings, ImportSettings),
    *(PrecomputeSettings, DistillSettings, EvaluateSettings),
    SelectSettings,
]


def from_argv(model: type[Settings], argv: list[str]) -> Settings:
    parser = argparse.ArgumentParser()
    add_settings_arguments(parser, model, "settings")
    return settings_from_namespace(parser.parse_args(argv), model)


@pytest.mark.parametrize("model", MODELS)
def test_defaults_need_no_flags(model):
    assert settings_to_argv(model()) == []
    assert from_argv(model, []) == model()


@pytest.mark.parametrize(
    ("settings", "argv"),
    [
        (Layout(tensor_parallel=2, sequence_parallel=True), ["--tensor-parallel", "2", "--sequence-parallel"]),
        (ReplaySettings(loss="sapo", learning_rate=1e-5), ["--learning-rate", "1e-05", "--loss", "sapo"]),
        (ReplaySettings(loss="sft", sft_threshold=-1e-5), ["--loss", "sft", "--sft-threshold=-1e-05"]),
        (ReplaySettings(min_learning_rate=0.0), ["--min-learning-rate", "0.0"]),
        (PrecomputeSettings(signal="-0.5*contrast + strong"), ["--signal=-0.5*contrast + strong"]),
        (ImportSettings(append_eos=False, user_message=False), ["--no-append-eos", "--no-user-message"]),
        (
            SampleSettings(
                chat_template=True, template_arguments={"a": {"b": [False, "c"]}}, template_date="2026-11-29"
            ),
            ["--template-arguments", '{"a": {"b": [false, "c"]}}', "--template-date", "2026-11-29", "--chat-template"],
        ),
        (ImportSettings(system_prompt="-v\nor 'less'"), ["--system-prompt=-v\nor 'less'"]),
        (DistillSettings(teacher="live", delta=0.1), ["--teacher", "live", "--delta", "0.1"]),
    ],
)
def test_flags_and_back(settings, argv):
    assert settings_to_argv(settings) == argv
    assert from_argv(type(settings), argv) == settings


def test_what_is_not_given_to_a_template_is_no_part_of_an_artifact():
    """Those that were made before there were such settings are still what a recipe asks for."""
    for model in (SampleSettings, EvaluateSettings, SelectSettings, OnPolicySettings, ImportSettings):
        assert not {"system_prompt", "template_arguments", "template_date"} & model().model_dump(mode="json").keys()
    given = {"system_prompt": "a", "template_arguments": {"b": 1}, "template_date": date(2026, 11, 29)}
    assert ImportSettings(**given).model_dump().items() >= (given | {"template_date": "2026-11-29"}).items()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "isn't JSON"), ("[1]", "isn't a JSON object"), ("enable_thinking=false", "isn't JSON")]
)
def test_bad_json_on_the_command_line_is_named(text, message, capsys):
    with pytest.raises(SystemExit):
        from_argv(SampleSettings, ["--template-arguments", text])
    assert f"argument --template-arguments: {text}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_described_and_has_a_default(model):
    for name, field in model.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_all_bad_flags_are_named_as_flags():
    with pytest.raises(RecipeError, match=r"(?s)--learning-rate: Input should be.*--adam-beta1: Input should be"):
        from_argv(ReplaySettings, ["--learning-rate", "-1", "--adam-beta1", "2"])


def test_parse_settings_names_places():
    with pytest.raises(RecipeError, match=r"(?s)invalid ReplaySettings:\n  epochs: .*\n  epoch: "):
        parse_settings(ReplaySettings, {"epochs": 0, "epoch": 1})


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        (ReplaySettings, {"learning_rate": 1e-4, "min_learning_rate": 1e-3}, "min_learning_rate 0.001 is above"),
        (ReplaySettings, {"min_learning_rate": 1e-7}, "give learning_rate too"),
        (ReplaySettings, {"loss": "sapo", "beta": 0.5}, "beta 0.5 has no effect with loss: sapo"),
        (ReplaySettings, {"loss": "ce", "clip_high": 9}, "clip_high 9.0 has no effect with loss: ce"),
        (ReplaySettings, {"loss": "cispo", "clip_low": 0.9}, "clip_low 0.9 has no effect"),
        (ReplaySettings, {"kl_estimator": "k1"}, "kl_estimator k1 has no effect with kl_coefficient: 0"),
        (ReplaySettings, {"importance_cap": 5}, "importance_cap 5.0 has no effect with importance_correction: none"),
        (
            ReplaySettings,
            {"kl_coefficient": 1, "kl_topk": 8},
            "kl_topk 8 has no effect with kl_estimator: k3",
        ),
        (OnPolicySettings, {"num_rollouts": 1}, "num_rollouts is 1: all advantages would be 0"),
        (PrecomputeSettings, {"signal": "none", "delta": 1}, "delta 1.0 has no effect with signal: none"),
        (PrecomputeSettings, {"kind": "token", "delta": 1}, "delta 1.0 has no effect with kind: token"),
        (PrecomputeSettings, {"kind": "token", "projection_clip": 9}, "projection_clip 9.0 has no effect"),
        (PrecomputeSettings, {"projection_clip": 0}, "projection_clip: Input should be greater than 0"),
        (PrecomputeSettings, {"delta": 0}, "delta: Input should be greater than 0"),
        (PrecomputeSettings, {"eta_max": -1}, "eta_max: Input should be greater than 0"),
        (PrecomputeSettings, {"delta": float("nan")}, "delta: Input should be a finite number"),
        (PrecomputeSettings, {"eta_max": float("inf")}, "eta_max: Input should be a finite number"),
        (DistillSettings, {"projection_clip": 9}, "projection_clip 9.0 has no effect .*teacher: cache"),
        (DistillSettings, {"teacher": "live", "delta": -1}, "delta: Input should be greater than 0"),
        (DistillSettings, {"kl_budget": 0.1}, "kl_budget 0.1 has no effect with form: projection"),
        (DistillSettings, {"delta": 0.1}, "delta 0.1 has no effect with form: projection and teacher: cache"),
        (DistillSettings, {"signal": "contrast"}, "signal contrast has no effect .*the cache's own settings count"),
        (DistillSettings, {"form": "policy_gradient", "divergence": "js"}, "divergence js has no effect"),
        (DistillSettings, {"form": "policy_gradient", "loss": "sapo", "clip_low": 0.5}, "clip_low 0.5 has no effect"),
        (DistillSettings, {"form": "policy_gradient", "signal_weight": 0}, "nothing to learn from"),
        (DistillSettings, {"form": "policy_gradient", "teacher": "live"}, "teacher: live is for the projection"),
        (DistillSettings, {"teacher": "live", "signal": "auto"}, "signal: auto is decided where a teacher cache is"),
        (ReplaySettings, {"max_kl": 0}, "max_kl: Input should be greater than 0"),
        (ReplaySettings, {"min_entropy": -0.1}, "min_entropy: Input should be greater than 0"),
        (ReplaySettings, {"save_interval": 0}, "save_interval: Input should be greater than or equal to 1"),
        (SampleSettings, {"system_prompt": "Be brief."}, "system_prompt has no effect without chat_template"),
        (OnPolicySettings, {"template_date": "2026-11-29"}, "template_date has no effect without chat_template"),
        (
            EvaluateSettings,
            {"chat_template": True, "system_prompt": ""},
            "system_prompt: String should have at least 1",
        ),
        (ImportSettings, {"template_date": "29 Nov 2026"}, "template_date: '29 Nov 2026' is no date; write it as 2026"),
        (ImportSettings, {"template_date": "2026-02-30"}, "template_date: .*day"),
        (ImportSettings, {"template_arguments": {"a": date(2026, 11, 29)}}, "a date is text in quotes"),
        (ImportSettings, {"template_arguments": {"a": float("inf")}}, "template_arguments: .*JSON"),
        (SelectSettings, {"num_prompts": 1}, "num_prompts: Input should be greater than or equal to 2"),
        (
            DistillSettings,
            {"form": "policy_gradient", "signal_weight": 0, "advantage_weight": 1, "sign_agreement": True},
            "sign_agreement compares",
        ),
        (DistillSettings, {"shuffle_signal": True}, "shuffle_signal True has no effect with form: projection"),
        (
            DistillSettings,
            {"form": "policy_gradient", "signal_weight": 0, "advantage_weight": 1, "shuffle_signal": True},
            "shuffle_signal permutes the signal, and signal_weight is 0",
        ),
    ],
)
def test_contradictions(model: type[Settings], values: dict[str, Any], expected: str):
    with pytest.raises(RecipeError, match=expected):
        parse_settings(model, values)


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "ppo", "clip_low": 0.9, "clip_high": 9, "dual_clip": 3},
        {"loss": "mse", "beta": 0.3, "sequence_log_ratio": "mean", "kl_coefficient": 0.1, "kl_estimator": "k2"},
        {"loss": "sapo", "tau_positive": 2, "importance_correction": "token", "importance_cap": 5, "unlearn": True},
    ],
)
def test_what_belongs_together(values):
    parse_settings(ReplaySettings, values)


def test_which_distillations_read_what():
    cached, live = DistillSettings(), DistillSettings(teacher="live", signal="contrast", delta=0.1)
    control = DistillSettings(form="policy_gradient", signal_weight=0, advantage_weight=1)
    assert [s.reads_cache for s in (cached, live, control)] == [True, False, False]
    assert [s.needs_teacher for s in (cached, live, control)] == [True, True, False]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        *((ReplaySettings(loss=loss), f"loss {loss}") for loss in ("ppo", "gspo", "cispo", "sapo", "mse")),
        *((ReplaySettings(loss=loss), None) for loss in ("ce", "sft")),
        (DistillSettings(), None),
        (DistillSettings(form="policy_gradient"), None),
        (DistillSettings(form="policy_gradient", advantage_weight=0.5), "advantage_weight 0.5"),
        (DistillSettings(form="policy_gradient", sign_agreement=True), "sign_agreement"),
    ],
)
def test_what_learns_from_advantages(settings, expected):
    assert settings.advantages_for == expected


def test_processes_of_a_layout():
    assert Layout(tensor_parallel=2, pipeline_parallel=3, context_parallel=2, data_parallel=5).num_processes == 60
