"""A recipe: one YAML file that says what a run does, validated whole.

Its sections are the settings of the stages (`megatron_erpd.settings`) with the paths that a stage is given. Everything
that is wrong with a recipe is told at once, each with its place, as `student.learning_rate`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from megatron_erpd.settings import (
    AUTO_SIGNAL,
    DistillSettings,
    EvaluateSettings,
    ImportSettings,
    Layout,
    Monitoring,
    OnPolicySettings,
    PrecomputeSettings,
    ReplayLoss,
    ReplaySettings,
    SampleSettings,
    SelectSettings,
    Settings,
    SlurmSettings,
    TemplateSettings,
)

MegatronFlags = dict[str, bool | int | float | str | list[str] | None]
"""Megatron's own flags by name, `--` left out. True is the bare flag; false and null leave the flag out."""


class WarmUp(ReplaySettings):
    """Training of the initial model on demonstrations; its result is the base of the first round."""

    loss: ReplayLoss = Field(default="sft", description="the replay loss")
    rollouts: str = Field(description="demonstrations, in the rollout format")

    @model_validator(mode="after")
    def _has_no_base(self) -> Self:
        if self.max_kl is not None:
            raise ValueError("max_kl: the warm-up has no base policy to measure a KL from; use min_entropy or epochs")
        if self.kl_coefficient > 0:
            raise ValueError("kl_coefficient: the warm-up has no base policy to stay near; remove it")
        if self.loss != "sft":
            raise ValueError(f"loss {self.loss}: a warm-up has no log-probs of its demonstrations; use sft")
        return self


class Sampled(SampleSettings):
    """Rollouts sampled from the base policy and scored."""

    prompts: str = Field(description="rows with prompt and answer (see Sources), or reasoning-gym:TASK?size=100")
    verifier: str = Field(description="math-verify, reasoning-gym:TASK or python:FILE_OR_MODULE:FUNCTION")
    workers: int | None = Field(
        default=None,
        ge=1,
        description="processes of the verifier, each with it loaded; default: as many as there are cores",
    )
    num_prompts: int | None = Field(
        default=None, ge=1, description="prompts of a round, which takes the next ones of the file; default: all"
    )


class Imported(ImportSettings):
    """Rollouts from a file of another program."""

    file: str = Field(description="the rollouts: a file, a folder, or a data set of the hub (see Sources)")
    fields: dict[str, str] = Field(default={}, description="our field to the file's field, over the format's")
    tokenizer: str | None = Field(default=None, description="Hugging Face folder; default: the model's own")


class Unlearned(ReplaySettings):
    """The unlearned policy: stage 1 with flipped signs."""

    unlearn: bool = Field(default=True, description="flip the sign of the advantage (or the label)")


class ReplayControl(ReplaySettings):
    """A control without a teacher: stage 1's training, evaluated beside the student."""

    kind: Literal["replay"]


class DistillControl(DistillSettings):
    """A control with other settings of stage 2."""

    kind: Literal["distill"]


class OnPolicyControl(OnPolicySettings):
    """A control that samples afresh for every update, from the prompts of the rollouts."""

    kind: Literal["on_policy"]


class Selection(SelectSettings):
    """Choosing the teacher among its kept checkpoints, on held-out prompts that are not those of the evaluation."""

    prompts: str = Field(description="validation prompts, as in rollouts; not those of the evaluation")
    verifier: str | None = Field(default=None, description="as in rollouts; default: that of the rollouts")
    workers: int | None = Field(default=None, ge=1, description="as in rollouts; default: those of the rollouts")


class Evaluation(EvaluateSettings):
    """Measurements of every policy of a round on held-out prompts."""

    prompts: str = Field(description="held-out prompts, as in rollouts")
    verifier: str | None = Field(default=None, description="as in rollouts; default: that of the rollouts")
    workers: int | None = Field(default=None, ge=1, description="as in rollouts; default: those of the rollouts")
    checkpoints: bool = Field(default=False, description="evaluate the teacher's kept checkpoints too")


class StageOverrides(Settings):
    """What is different for one stage."""

    layout: Layout = Field(default=Layout(), description="fields of the layout that differ from the recipe's")
    megatron: MegatronFlags = Field(default={}, description="Megatron's own flags, over the recipe's")
    slurm: SlurmSettings = Field(default=SlurmSettings(), description="of the stage's job, over the recipe's")


def _rollouts_tag(value: Any) -> str:
    imported = "file" in value if isinstance(value, Mapping) else isinstance(value, Imported)
    return "imported" if imported else "sampled"


Rollouts = Annotated[
    Annotated[Sampled, Tag("sampled")] | Annotated[Imported, Tag("imported")], Discriminator(_rollouts_tag)
]
Control = Annotated[ReplayControl | DistillControl | OnPolicyControl, Field(discriminator="kind")]

RECIPE = "recipe.yaml"
"""The recipe in a run's folder, as it was run last."""

_RESERVED = ("base", "teacher", "unlearned", "student", "manifest", "request")
"""Names of the round's own policies, and of files that lie beside those of the policies."""
_SIGNAL_WORDS = ("strong", "contrast", "none", "auto")
_SAMPLED_ALIKE = ("num_rollouts", "max_new_tokens", "temperature", "batch_size")
_PROMPTED_ALIKE = ("chat_template", *TemplateSettings.model_fields)
_TEACHER_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
"""As a signal can write it."""
_CONTROL_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


class Recipe(Settings):
    """A run: the sections of the recipe. Paths are relative to `directory`, or start with `prepare/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the run")
    output: str | None = Field(default=None, description="the run's folder; default: runs/NAME")
    directory: str | None = Field(
        default=None,
        description="where relative paths begin; default: the current directory, which a run's recipe keeps here",
    )
    prepare: str | None = Field(default=None, description="command that writes inputs into the folder {output}")
    model: str = Field(description="Hugging Face folder of the initial model")
    rounds: int = Field(default=1, ge=1, description="rounds; each starts from the student of the one before")
    warm_up: WarmUp | None = None
    rollouts: Rollouts
    teacher: ReplaySettings | None = None
    unlearned: Unlearned | None = None
    teachers: dict[str, ReplaySettings] = {}
    selection: Selection | None = None
    cache: PrecomputeSettings = PrecomputeSettings()
    student: DistillSettings | None = None
    controls: dict[str, Control] = {}
    evaluation: Evaluation | None = None
    layout: Layout = Layout()
    slurm: SlurmSettings = SlurmSettings()
    stages: dict[str, StageOverrides] = {}
    megatron: MegatronFlags = {}
    monitoring: Monitoring = Monitoring()

    @model_validator(mode="before")
    @classmethod
    def _inherit_from_cache(cls, values: Any) -> Any:
        """The signal of a policy gradient or a live teacher, when not given, is the cache's; delta and eta_max too."""
        cache = values.get("cache") if isinstance(values, Mapping) else None
        if not isinstance(cache, Mapping):
            return values
        controls = values.get("controls")
        values = {**values, "student": _inherited(values.get("student"), cache)}
        if isinstance(controls, Mapping):
            values["controls"] = {
                name: _inherited(c, cache) if isinstance(c, Mapping) and c.get("kind") == "distill" else c
                for name, c in controls.items()
            }
        return values

    @model_validator(mode="before")
    @classmethod
    def _inherit_from_rollouts(cls, values: Any) -> Any:
        """How an on-policy control samples, when not given, is how the rollouts are sampled; how its prompts and those
        of selection and evaluation go through the chat template, too. A policy learns under one and is measured so."""
        rollouts = values.get("rollouts") if isinstance(values, Mapping) else None
        if not isinstance(rollouts, Mapping):
            return values
        prompted = {key: rollouts[key] for key in _PROMPTED_ALIKE if key in rollouts}
        if rollouts.get("user_message") or ("file" in rollouts and prompted):
            prompted["chat_template"] = True
        values = {**values, **{n: _prompted(values[n], prompted) for n in ("selection", "evaluation") if n in values}}
        if isinstance(controls := values.get("controls"), Mapping):
            shared = {key: rollouts[key] for key in _SAMPLED_ALIKE if key in rollouts}
            on_policy = {n for n, c in controls.items() if isinstance(c, Mapping) and c.get("kind") == "on_policy"}
            alike = {n: {**shared, **_prompted(controls[n], prompted)} for n in on_policy}
            values["controls"] = {**controls, **alike}
        return values

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        for name, control in self.controls.items():
            if isinstance(control, OnPolicyControl) and isinstance(self.rollouts, Imported):
                raise ValueError(
                    f"controls.{name}: on_policy samples from the prompts of the rollouts and scores with their "
                    "verifier, and imported rollouts name none; sample them, or leave the control out"
                )
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        for name in self.teachers:
            taken = (*_RESERVED, *_SIGNAL_WORDS, *self.controls)
            if not re.fullmatch(_TEACHER_NAME, name) or name in taken:
                raise ValueError(
                    f"teachers.{name}: a teacher's name is made of letters, digits, '_' and '.' (signals are written "
                    f"with it), and is none of {', '.join(taken)}; rename it"
                )
        for name in self.controls:
            if not re.fullmatch(_CONTROL_NAME, name) or name in _RESERVED:
                raise ValueError(
                    f"controls.{name}: a control's name is made of letters, digits, '_', '.' and '-', and is none of "
                    f"{', '.join(_RESERVED)}; rename it"
                )
        if not (self.teacher or self.unlearned or self.teachers or self.student or self.controls):
            raise ValueError("nothing to train; give at least one of teacher, unlearned, teachers, student, controls")
        if self.rounds > 1 and self.student is None:
            raise ValueError("rounds: the next round starts from the student, and there is none; give student")
        if self.rounds > 1 and isinstance(self.rollouts, Imported):
            raise ValueError(
                "rounds: a later round learns from rollouts of its own base policy, and rollouts.file holds another "
                "policy's; give rollouts.prompts, or start a run for each round"
            )
        return self

    @model_validator(mode="after")
    def _groups_have_a_signal(self) -> Self:
        if isinstance(self.rollouts, Imported) or self.rollouts.num_rollouts > 1:
            return self
        sections: dict[str, ReplaySettings | DistillSettings] = {**self.replays(), **self.distillations()}
        for where, section in sections.items():
            if section.advantages_for is not None and section.advantage != "raw":
                raise ValueError(
                    f"{where}.advantage: {section.advantage} compares the rollouts of a prompt, and "
                    "rollouts.num_rollouts is 1: all advantages would be 0, and "
                    f"{section.advantages_for} would have nothing to learn from; sample more, or use raw"
                )
        return self

    @model_validator(mode="after")
    def _selection_fits(self) -> Self:
        if self.selection and not self.teacher:
            raise ValueError("selection: there is no teacher to choose checkpoints of; give the section teacher")
        if self.selection and self.evaluation and self.selection.prompts == self.evaluation.prompts:
            raise ValueError(
                "selection.prompts: are those of the evaluation, whose figures for the chosen teacher would be too "
                "high; give other prompts"
            )
        if self.cache.signal == AUTO_SIGNAL and not self.selection:
            raise ValueError(
                "cache.signal: auto is decided by the teacher's reward on held-out prompts; give the section "
                "selection, or name the signal"
            )
        for where, distillation in self.distillations().items():
            auto = distillation.reads_cache and distillation.signal == AUTO_SIGNAL
            if auto and self.cache.signal != AUTO_SIGNAL:
                raise ValueError(f"{where}.signal: auto takes what the cache chose; set cache.signal to auto")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output or f"runs/{self.name}")

    def stage1(self) -> dict[str, ReplaySettings]:
        """The policies that signals can name besides the base, by their names."""
        sections = {"teacher": self.teacher, "unlearned": self.unlearned, **self.teachers}
        return {name: section for name, section in sections.items() if section}

    def replays(self) -> dict[str, ReplaySettings]:
        """All trainings on the round's rollouts by a replay loss, by their place in the recipe."""
        own = {name if name in ("teacher", "unlearned") else f"teachers.{name}": s for name, s in self.stage1().items()}
        controls = {f"controls.{n}": c for n, c in self.controls.items() if isinstance(c, ReplaySettings)}
        return {**own, **controls}

    def distillations(self) -> dict[str, DistillSettings]:
        """The student and the distilled controls by their place in the recipe."""
        controls = {f"controls.{n}": c for n, c in self.controls.items() if isinstance(c, DistillSettings)}
        return {"student": self.student, **controls} if self.student else dict(controls)

    def of_run(self) -> str:
        """What the run's folder keeps: as `to_yaml`, and relative paths mean the same from any other directory."""
        here, folder = Path.cwd(), self.folder
        if folder.is_relative_to(here):
            folder = folder.relative_to(here)
        output = None if folder == Path("runs", self.name) else str(folder)
        return self.model_copy(update={"directory": str(here), "output": output}).to_yaml()

    def to_yaml(self) -> str:
        """The recipe with its defaults filled in; reads back as the same recipe."""
        values = self.model_dump(mode="json", exclude_none=True)
        # Only what a stage's layout gives differs from the recipe's layout; its defaults say nothing.
        values["stages"] = {name: o.model_dump(mode="json", exclude_unset=True) for name, o in self.stages.items()}
        # What a section has not, although the rollouts have it, would be theirs when it is read again.
        on_policy = [c for c in values["controls"].values() if c["kind"] == "on_policy"]
        for section in (values.get("selection"), values.get("evaluation"), *on_policy):
            for name in TemplateSettings.model_fields if section else ():
                if name in values["rollouts"]:
                    section.setdefault(name, TemplateSettings.model_fields[name].default)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _prompted(section: Any, prompted: Mapping[str, Any]) -> Any:
    if not isinstance(section, Mapping) or section.get("chat_template") is False:
        return section
    return {**prompted, **section}


def _inherited(section: Any, cache: Mapping[str, Any]) -> Any:
    if not isinstance(section, Mapping):
        return section
    live = section.get("teacher") in ("live", "hidden")
    gradient = section.get("form") == "policy_gradient"
    projection = ("signal", "delta", "eta_max", "projection_clip")
    wanted = ("signal",) if gradient else projection if live else ()
    return {**{key: cache[key] for key in wanted if key in cache}, **section}
