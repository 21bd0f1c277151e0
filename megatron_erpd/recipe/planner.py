"""From a recipe to the stages of its run, in an order in which they can run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.recipe import (
    Evaluation,
    Imported,
    OnPolicyControl,
    Recipe,
    ReplayControl,
    Sampled,
    Selection,
    StageOverrides,
)
from megatron_erpd.recipe.requests import (
    Checkpoint,
    Distill,
    Evaluate,
    Export,
    Import,
    ImportRollouts,
    ModelRequest,
    Precompute,
    Prepare,
    Report,
    Request,
    Sample,
    Score,
    Select,
    TrainingRequest,
    TrainOnPolicy,
    TrainTeacher,
)
from megatron_erpd.recipe.stages import Stage, flags_of
from megatron_erpd.sampling.inputs import verifier_file
from megatron_erpd.sampling.prompts import REASONING_GYM
from megatron_erpd.settings import (
    AUTO_SIGNAL,
    NO_SIGNAL,
    DistillSettings,
    EvaluateSettings,
    ImportSettings,
    Monitoring,
    OnPolicySettings,
    PrecomputeSettings,
    ReplaySettings,
    SampleSettings,
    SelectSettings,
    Settings,
    SlurmSettings,
    parse_settings,
)


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, each after those that it depends on.

    Raises:
        RecipeError: `stages` names a stage that the run does not have, or a signal a policy that the recipe does not
            train, or a section lacks what another one makes it need.
    """
    return _Planner(recipe).plan()


class _Planner:
    """Collects the stages of one recipe in the order in which they are described here."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.root = recipe.folder
        self.stages: list[Stage] = []
        self.overrides = {_stage_key(name): value for name, value in recipe.stages.items()}
        self.used: set[str] = set()

    def plan(self) -> list[Stage]:
        base, origin = self._initial()
        hf = origin
        for number in range(1, self.recipe.rounds + 1):
            base, hf = self._round(number, base, hf, origin)
        self._report()
        unknown = sorted(set(self.overrides) - self.used)
        if unknown:
            raise RecipeError(
                f"stages.{unknown[0]}: this run has no such stage; its stages are {', '.join(sorted(self.used))}"
            )
        return self.stages

    def _initial(self) -> tuple[Path, Path]:
        """The first base policy: its Megatron artifact and its Hugging Face folder."""
        recipe, model = self.recipe, self._path(self.recipe.model)
        if recipe.prepare:
            self._add("prepare", Prepare(line=recipe.prepare, output=self.root / "prepare"))
        if recipe.warm_up is None:
            return self._add("base", Import(hf=str(model), output=self.root / "round-01/base")), model
        initial = self._add("initial", Import(hf=str(model), output=self.root / "round-00/initial"))
        settings, rollouts = _as(ReplaySettings, recipe.warm_up), self._path(recipe.warm_up.rollouts)
        output = self.root / "round-00/warm-up"
        base = self._add("warm-up", TrainTeacher(base=initial, rollouts=rollouts, settings=settings, output=output))
        export = self._export("base-hf", {"base": base}, self.root / "round-01/base-hf")
        return base, export / "base"

    def _round(self, number: int, base: Path, hf: Path, origin: Path) -> tuple[Path, Path]:
        """One round; returns the base of the next. `origin` is the first round's base, as `hf` is this one's."""
        recipe, folder = self.recipe, self.root / f"round-{number:02d}"
        prefix = "" if number == 1 else f"round-{number:02d}/"
        rollouts = self._rollouts(f"{prefix}rollouts", number, hf, folder / "rollouts")
        scored = Precompute(
            base=base, rollouts=rollouts, settings=self._base_log_probs(), output=folder / "base-log-probs"
        )
        data = _Data(
            base,
            rollouts,
            base_log_probs=self._add(f"{prefix}base-log-probs", scored),
            rewards=self._rewards(f"{prefix}rewards", rollouts, folder / "rewards"),
        )
        policies = {"base": base}
        for name, section in recipe.stage1().items():
            stage = f"teachers/{name}" if name in recipe.teachers else name
            policies[name] = self._replay(prefix + stage, section, data, folder / stage)
        kept, selection = dict(policies), None
        if recipe.selection:
            policies["teacher"] = selection = self._selection(prefix, hf, policies["teacher"], rollouts, folder)
        cache = self._cache(f"{prefix}cache", policies, data, selection, folder / "cache")
        if recipe.student:
            policies["student"] = self._distill(
                f"{prefix}student", recipe.student, data, policies, cache, folder / "student"
            )
        for name, control in recipe.controls.items():
            stage, output = f"{prefix}controls/{name}", folder / "controls" / name
            if isinstance(control, ReplayControl):
                policies[name] = self._replay(stage, control, data, output)
            elif isinstance(control, OnPolicyControl):
                policies[name] = self._on_policy(stage, control, base, output)
            else:
                policies[name] = self._distill(stage, control, data, policies, cache, output)
        trained = {name: path for name, path in policies.items() if name != "base"}
        export = self._export(f"{prefix}export", trained, folder / "export", kept)
        first = None if number == 1 else origin
        self._evaluation(f"{prefix}evaluation", hf, first, export, rollouts, folder / "evaluation")
        return policies.get("student", base), export / "student"

    def _base_log_probs(self) -> PrecomputeSettings:
        """The base policy's log-probs; with its top-k rows when a section's exact KL reads them."""
        sections = {f"teachers.{n}" if n in self.recipe.teachers else n: s for n, s in self.recipe.stage1().items()}
        sections |= {f"controls.{n}": c for n, c in self.recipe.controls.items() if isinstance(c, ReplayControl)}
        wanted = {where: s.kl_topk for where, s in sections.items() if s.has_exact_kl}
        if not wanted:
            return PrecomputeSettings(kind="token")
        if len(set(wanted.values())) > 1:
            listed = ", ".join(f"{where}.kl_topk: {k}" for where, k in wanted.items())
            raise RecipeError(f"{listed}: the base's rows are made once for all; give all of them the same kl_topk")
        return PrecomputeSettings(signal=NO_SIGNAL, k=next(iter(wanted.values())))

    def _rollouts(self, name: str, number: int, hf: Path, output: Path) -> Path:
        section = self.recipe.rollouts
        if isinstance(section, Imported):
            request = ImportRollouts(
                source=str(self._path(section.file)),
                tokenizer=self._path(section.tokenizer) if section.tokenizer else hf,
                settings=_as(ImportSettings, section),
                fields=section.fields,
                output=output,
            )
            return self._add(name, request)
        sample = Sample(
            model=hf,
            **self._task(section),
            workers=section.workers,
            # Another seed keeps the samples of rounds that see the same prompts independent.
            settings=_as(SampleSettings, section).model_copy(update={"seed": section.seed + number - 1}),
            num_prompts=section.num_prompts,
            first_prompt=(section.num_prompts or 0) * (number - 1),
            output=output,
        )
        return self._add(name, sample)

    def _rewards(self, name: str, rollouts: Path, output: Path) -> Path | None:
        """The rewards of sampled rollouts; imported ones bring theirs."""
        section = self.recipe.rollouts
        if isinstance(section, Imported):
            return None
        return self._add(name, Score(rollouts=rollouts, **self._task(section), workers=section.workers, output=output))

    def _replay(self, name: str, section: ReplaySettings, data: _Data, output: Path) -> Path:
        settings = _as(ReplaySettings, section)
        settings = settings.model_copy(update={"loss": self._program(settings.loss)})
        return self._add(name, TrainTeacher(**data._asdict(), settings=settings, output=output))

    def _selection(self, prefix: str, hf: Path, teacher: Path, rollouts: Path, folder: Path) -> Path:
        """The teacher's checkpoints as Hugging Face folders, and the one of them that becomes the teacher."""
        section = self.recipe.selection
        assert section is not None
        checkpoints = (Checkpoint("teacher", teacher, "all"),)
        candidates = self._add(f"{prefix}candidates", Export(checkpoints=checkpoints, output=folder / "candidates"))
        request = Select(
            model=hf,
            teacher=teacher,
            candidates=candidates,
            **self._task(section, "selection"),
            workers=self._workers(section),
            rollouts=rollouts,
            unlearned=self.recipe.unlearned is not None,
            settings=_as(SelectSettings, section),
            output=folder / "selection",
        )
        return self._add(f"{prefix}selection", request)

    def _task(self, section: Sampled | Selection | Evaluation, where: str = "rollouts") -> dict[str, Any]:
        """Prompts of a section, and its verifier or that of the rollouts."""
        sampled = self.recipe.rollouts
        verifier = section.verifier or (sampled.verifier if isinstance(sampled, Sampled) else None)
        if verifier is None:
            raise RecipeError(f"{where}.verifier: missing; imported rollouts name no verifier to take instead")
        prompts = section.prompts
        return {
            "prompts": prompts if prompts.startswith(REASONING_GYM) else str(self._path(prompts)),
            "verifier": self._program(verifier),
        }

    def _workers(self, section: Sampled | Selection | Evaluation) -> int | None:
        """Of a section's verifier, or of that of the rollouts."""
        sampled = self.recipe.rollouts
        return section.workers or (sampled.workers if isinstance(sampled, Sampled) else None)

    def _program(self, name: str) -> str:
        """A verifier's or a loss's name with its file, if it has one, where the run has it."""
        file = verifier_file(name)
        return f"python:{self._path(str(file))}:{name.rpartition(':')[2]}" if file else name

    def _on_policy(self, name: str, section: OnPolicyControl, base: Path, output: Path) -> Path:
        sampled = self.recipe.rollouts
        assert isinstance(sampled, Sampled), "the recipe has checked it"
        request = TrainOnPolicy(
            base=base,
            **self._task(sampled),
            num_prompts=sampled.num_prompts,
            settings=_as(OnPolicySettings, section),
            output=output,
        )
        return self._add(name, request)

    def _cache(
        self,
        name: str,
        policies: Mapping[str, Path],
        data: _Data,
        selection: Path | None,
        output: Path,
    ) -> Path | None:
        """The teacher cache, when anything reads one, with the policies of all signals that do."""
        readers = {where: d for where, d in self.recipe.distillations().items() if d.reads_cache}
        if not readers:
            return None
        settings = self.recipe.cache
        wanted = _policies(settings.signal, "cache.signal", policies)
        for where, distillation in readers.items():
            if distillation.form == "policy_gradient":
                wanted |= _policies(distillation.signal, f"{where}.signal", policies)
            elif distillation.teacher == "hidden":
                wanted |= _policies(distillation.signal, f"{where}.signal", policies)
                if not settings.keep_hidden:
                    raise RecipeError(f"{where}.teacher: hidden reads hidden states; set cache.keep_hidden to true")
            elif settings.kind != "topk":
                raise RecipeError(f"{where}: the projection reads top-k targets; set cache.kind to topk")
        request = Precompute(
            base=data.base,
            rollouts=data.rollouts,
            policies=_chosen(wanted, policies),
            selection=selection,
            settings=settings,
            output=output,
        )
        return self._add(name, request)

    def _distill(
        self,
        name: str,
        section: DistillSettings,
        data: _Data,
        policies: Mapping[str, Path],
        cache: Path | None,
        output: Path,
    ) -> Path:
        settings = _as(DistillSettings, section)
        wanted = _policies(settings.signal, f"{name}: signal", policies) if settings.makes_target else set()
        request = Distill(
            **data._asdict(),
            cache=cache if settings.reads_cache else None,
            policies=_chosen(wanted, policies),
            settings=settings,
            output=output,
        )
        return self._add(name, request)

    def _export(
        self, name: str, checkpoints: Mapping[str, Path], output: Path, kept: Mapping[str, Path] | None = None
    ) -> Path:
        """Policies as Hugging Face folders, and the teachers' checkpoints on the way when the evaluation wants them.

        Args:
            kept: the artifacts with all checkpoints of the teachers, where a selection's holds only one.
        """
        wanted = [Checkpoint(policy, folder) for policy, folder in checkpoints.items()]
        evaluation = self.recipe.evaluation
        if evaluation and evaluation.checkpoints and kept:
            teachers = [teacher for teacher in ("teacher", *self.recipe.teachers) if teacher in kept]
            wanted += [Checkpoint(teacher, kept[teacher], "all") for teacher in teachers]
        return self._add(name, Export(checkpoints=tuple(wanted), output=output))

    def _evaluation(self, name: str, hf: Path, origin: Path | None, export: Path, rollouts: Path, output: Path) -> None:
        section = self.recipe.evaluation
        if section is None:
            return
        request = Evaluate(
            models={"base": hf},
            exported=export,
            **self._task(section, "evaluation"),
            workers=self._workers(section),
            rollouts=rollouts,
            settings=_as(EvaluateSettings, section),
            origin=origin,
            output=output,
        )
        self._add(name, request)

    def _report(self) -> None:
        artifacts = {stage.name: stage.output for stage in self.stages if stage.name != "prepare"}
        self._add("report", Report(root=self.root, artifacts=artifacts, output=self.root / "report"))

    def _add(self, name: str, request: Request) -> Path:
        """Adds a stage and returns its output folder; the recipe says how it is spread, and what it tells whom."""
        key = re.sub(r"^round-\d+/", "", name)
        self.used.add(key)
        override = self.overrides.get(key, StageOverrides())
        more: dict[str, Any] = {"verify_inputs": True}
        if isinstance(request, ModelRequest):
            given = override.layout.model_dump(include=override.layout.model_fields_set)
            more["layout"] = self.recipe.layout.changed(given)
            more["megatron"] = request.taken_flags(flags_of({**self.recipe.megatron, **override.megatron}))
        elif override.megatron:
            raise RecipeError(f"stages.{key}.megatron: this stage trains no model; remove the flags")
        if isinstance(request, TrainingRequest):
            more["monitoring"] = self._monitoring()
        self.stages.append(Stage(name, request.model_copy(update=more), self._slurm(override)))
        return request.output

    def _monitoring(self) -> Monitoring:
        """The recipe's section; the files of Weights & Biases lie in one folder of the run."""
        monitoring = self.recipe.monitoring
        if monitoring.wandb_project is None or monitoring.wandb_dir is not None:
            return monitoring
        return monitoring.model_copy(update={"wandb_dir": str(self.root / "wandb")})

    def _slurm(self, override: StageOverrides) -> SlurmSettings:
        """The recipe's section with what the stage gives; of the environment, variable by variable."""
        given = override.slurm.model_dump(include=override.slurm.model_fields_set)
        if "environment" in given:
            given["environment"] = {**self.recipe.slurm.environment, **given["environment"]}
        return parse_settings(SlurmSettings, {**self.recipe.slurm.model_dump(exclude_unset=True), **given})

    def _path(self, text: str) -> Path:
        inside = self.recipe.prepare and Path(text).parts[:1] == ("prepare",)
        return self.root / text if inside else Path(text)


class _Data(NamedTuple):
    """What the trainings of a round learn from."""

    base: Path
    rollouts: Path
    base_log_probs: Path
    rewards: Path | None


def _chosen(names: Collection[str], policies: Mapping[str, Path]) -> dict[str, Path]:
    """The policies of these names beside the base."""
    return {name: policies[name] for name in sorted(names) if name != "base"}


def _policies(signal: str, where: str, trained: Mapping[str, Path]) -> set[str]:
    """The policies of a signal, all of which must be trained by the recipe; of `auto`, those of every outcome."""
    if signal == AUTO_SIGNAL:
        return {"base", "teacher", "unlearned"} & trained.keys()
    from megatron_erpd.objectives.signals import parse_signal, policies_of

    try:
        names = policies_of(parse_signal(signal))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    for name in sorted(names):
        if name not in trained:
            section = name if name in ("teacher", "unlearned") else f"teachers.{name}"
            raise RecipeError(
                f"{where}: {signal!r} needs the policy {name!r}; give the section {section} or another signal"
            )
    return names


def _as[S: Settings](model: type[S], section: Settings) -> S:
    """A recipe's section as the settings of its command, without the recipe's own keys."""
    return model(**section.model_dump(include=set(model.model_fields)))


def _stage_key(name: str) -> str:
    """Stages may be written with underscores, as sections are; names of the user's own are kept as they are."""
    return name if name.startswith(("controls/", "teachers/")) else name.replace("_", "-")
