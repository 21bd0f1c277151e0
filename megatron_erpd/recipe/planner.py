"""From a recipe to the stages of its run, in an order in which they can run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_erpd.errors import RecipeError
from megatron_erpd.manifest import settings_identity
from megatron_erpd.recipe.identity import (
    evaluate_request,
    import_request,
    sample_request,
    score_request,
    select_request,
)
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
from megatron_erpd.recipe.stages import RUNS_MODEL, TRAINS, Stage, flags_of
from megatron_erpd.sampling.inputs import task_identity, verifier_file
from megatron_erpd.sampling.prompts import REASONING_GYM
from megatron_erpd.settings import (
    AUTO_SIGNAL,
    NO_SIGNAL,
    DistillSettings,
    EvaluateSettings,
    ImportSettings,
    Layout,
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
from megatron_erpd.settings.arguments import settings_to_argv


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
            output = self.root / "prepare"
            command = recipe.prepare.replace("{output}", shlex.quote(str(output)))
            # The scripts that the command names: editing one makes the stage anew.
            files = {f"file-{word}": Path(word) for word in shlex.split(command) if Path(word).is_file()}
            self._add("prepare", "prepare", [command], files, output, {"command": recipe.prepare})
        if recipe.warm_up is None:
            return self._add("base", "import", [], {"hf": model}, self.root / "round-01/base", {}), model
        initial = self._add("initial", "import", [], {"hf": model}, self.root / "round-00/initial", {})
        settings = _as(ReplaySettings, recipe.warm_up)
        inputs = {"base": initial, "rollouts": self._path(recipe.warm_up.rollouts)}
        output = self.root / "round-00/warm-up"
        base = self._add("warm-up", "train-teacher", settings_to_argv(settings), inputs, output, settings)
        export = self._export("base-hf", {"base": base}, self.root / "round-01/base-hf")
        return base, export / "base"

    def _round(self, number: int, base: Path, hf: Path, origin: Path) -> tuple[Path, Path]:
        """One round; returns the base of the next. `origin` is the first round's base, as `hf` is this one's."""
        recipe, folder = self.recipe, self.root / f"round-{number:02d}"
        prefix = "" if number == 1 else f"round-{number:02d}/"
        rollouts = self._rollouts(f"{prefix}rollouts", number, hf, folder / "rollouts")
        data = {"base": base, "rollouts": rollouts}
        output, kind = folder / "base-log-probs", self._base_log_probs()
        log_probs = self._add(f"{prefix}base-log-probs", "precompute", settings_to_argv(kind), data, output, kind)
        data["base-log-probs"] = log_probs
        data |= self._rewards(f"{prefix}rewards", rollouts, folder / "rewards")
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
            options = _as(ImportSettings, section)
            tokenizer = self._path(section.tokenizer) if section.tokenizer else hf
            source = str(self._path(section.file))
            request = import_request(options, source, section.fields, tokenizer)
            argv = settings_to_argv(options)
            for ours, theirs in section.fields.items():
                argv += ["--field", f"{ours}={theirs}"]
            argv = [*_input_flags(request.inputs), *argv]
            return self._add(name, "import-rollouts", argv, request.inputs, output, request.settings)
        # Another seed keeps the samples of rounds that see the same prompts independent.
        settings = _as(SampleSettings, section).model_copy(update={"seed": section.seed + number - 1})
        prompts, verifier = self._prompts(section.prompts), self._verifier(section.verifier)
        first = (section.num_prompts or 0) * (number - 1)
        request = sample_request(settings, hf, prompts, section.num_prompts, first)
        argv = ["--model", str(hf), "--prompts", prompts, "--verifier", verifier, *settings_to_argv(settings)]
        argv += [] if section.num_prompts is None else ["--num-prompts", str(section.num_prompts)]
        argv += ["--first-prompt", str(first)] if first else []
        gpus = settings.tensor_parallel
        return self._add(name, "sample", argv, request.inputs, output, request.settings, gpus_per_process=gpus)

    def _rewards(self, name: str, rollouts: Path, output: Path) -> dict[str, Path]:
        """The rewards of sampled rollouts, as an input of what trains on them; imported ones bring theirs."""
        section = self.recipe.rollouts
        if isinstance(section, Imported):
            return {}
        prompts, verifier = self._prompts(section.prompts), self._verifier(section.verifier)
        request = score_request(rollouts, prompts, verifier)
        argv = ["--rollouts", str(rollouts), "--prompts", prompts, "--verifier", verifier]
        return {"rewards": self._add(name, "score", argv, request.inputs, output, request.settings)}

    def _replay(self, name: str, section: ReplaySettings, data: dict[str, Path], output: Path) -> Path:
        settings = _as(ReplaySettings, section)
        return self._add(name, "train-teacher", settings_to_argv(settings), data, output, settings)

    def _selection(self, prefix: str, hf: Path, teacher: Path, rollouts: Path, folder: Path) -> Path:
        """The teacher's checkpoints as Hugging Face folders, and the one of them that becomes the teacher."""
        section = self.recipe.selection
        assert section is not None
        argv, inputs = ["--checkpoint", f"teacher={teacher}@all"], {"teacher": teacher}
        settings = {"iterations": {"teacher": "all"}}
        candidates = self._add(f"{prefix}candidates", "export", argv, inputs, folder / "candidates", settings)
        prompts, verifier = self._task("selection", section)
        unlearned, chosen = self.recipe.unlearned is not None, _as(SelectSettings, section)
        request = select_request(chosen, hf, teacher, candidates, prompts, verifier, unlearned)
        argv = ["--model", str(hf), "--teacher", str(teacher), "--candidates", str(candidates)]
        argv += ["--prompts", prompts, "--verifier", verifier, "--rollouts", str(rollouts)]
        argv += ["--unlearned"] if unlearned else []
        argv += settings_to_argv(chosen)
        return self._add(f"{prefix}selection", "select", argv, request.inputs, folder / "selection", request.settings)

    def _task(self, where: str, section: Selection | Evaluation) -> tuple[str, str]:
        """Prompts and verifier of a section that names its own prompts and maybe its own verifier."""
        sampled = self.recipe.rollouts
        verifier = section.verifier or (sampled.verifier if isinstance(sampled, Sampled) else None)
        if verifier is None:
            raise RecipeError(f"{where}.verifier: missing; imported rollouts name no verifier to take instead")
        return self._prompts(section.prompts), self._verifier(verifier)

    def _on_policy(self, name: str, section: OnPolicyControl, base: Path, output: Path) -> Path:
        sampled = self.recipe.rollouts
        assert isinstance(sampled, Sampled), "the recipe has checked it"
        settings = _as(OnPolicySettings, section)
        prompts, verifier = self._prompts(sampled.prompts), self._verifier(sampled.verifier)
        task, inputs = task_identity(prompts, verifier)
        identity = {**settings.model_dump(mode="json"), "num_prompts": sampled.num_prompts, **task}
        argv = ["--prompts", prompts, "--verifier", verifier, *settings_to_argv(settings)]
        argv += [] if sampled.num_prompts is None else ["--num-prompts", str(sampled.num_prompts)]
        return self._add(name, "train-on-policy", argv, {"base": base, **inputs}, output, identity)

    def _cache(
        self,
        name: str,
        policies: Mapping[str, Path],
        data: Mapping[str, Path],
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
        inputs = {"base": data["base"], "rollouts": data["rollouts"]}
        inputs |= {f"policy-{p}": policies[p] for p in sorted(wanted - {"base"})}
        inputs |= {"selection": selection} if selection else {}
        return self._add(name, "precompute", settings_to_argv(settings), inputs, output, settings)

    def _distill(
        self,
        name: str,
        section: DistillSettings,
        data: dict[str, Path],
        policies: Mapping[str, Path],
        cache: Path | None,
        output: Path,
    ) -> Path:
        settings = _as(DistillSettings, section)
        inputs = dict(data)
        if cache and settings.reads_cache:
            inputs["cache"] = cache
        if settings.makes_target:
            wanted = _policies(settings.signal, f"{name}: signal", policies)
            inputs |= {f"policy-{p}": policies[p] for p in sorted(wanted - {"base"})}
        return self._add(name, "distill", settings_to_argv(settings), inputs, output, settings)

    def _export(
        self, name: str, checkpoints: Mapping[str, Path], output: Path, kept: Mapping[str, Path] | None = None
    ) -> Path:
        """Policies as Hugging Face folders, and the teachers' checkpoints on the way when the evaluation wants them.

        Args:
            kept: the artifacts with all checkpoints of the teachers, where a selection's holds only one.
        """
        argv, inputs, iterations = [], dict(checkpoints), dict.fromkeys(checkpoints)
        for policy, folder in checkpoints.items():
            argv += ["--checkpoint", f"{policy}={folder}"]
        evaluation = self.recipe.evaluation
        if evaluation and evaluation.checkpoints:
            for teacher in ("teacher", *self.recipe.teachers):
                if kept and teacher in kept:
                    argv += ["--checkpoint", f"{teacher}={kept[teacher]}@all"]
                    key = teacher if kept[teacher] == checkpoints[teacher] else f"{teacher}@all"
                    inputs[key], iterations[key] = kept[teacher], "all"
        return self._add(name, "export", argv, inputs, output, {"iterations": iterations})

    def _evaluation(self, name: str, hf: Path, origin: Path | None, export: Path, rollouts: Path, output: Path) -> None:
        section = self.recipe.evaluation
        if section is None:
            return
        prompts, verifier = self._task("evaluation", section)
        settings = _as(EvaluateSettings, section)
        request = evaluate_request(settings, {"base": hf}, export, prompts, rollouts, verifier, origin)
        argv = ["--model", f"base={hf}", "--exported", str(export), "--prompts", prompts, "--rollouts", str(rollouts)]
        argv += ["--verifier", verifier, *settings_to_argv(settings)]
        argv += [] if origin is None else ["--origin", str(origin)]
        self._add(name, "evaluate", argv, request.inputs, output, request.settings)

    def _report(self) -> None:
        inputs = {stage.name: stage.output for stage in self.stages if stage.name != "prepare"}
        self._add("report", "report", [str(self.root)], inputs, self.root / "report", {})

    def _add(
        self,
        name: str,
        command: str,
        arguments: list[str],
        inputs: Mapping[str, Path],
        output: Path,
        settings: Settings | Mapping[str, Any],
        gpus_per_process: int = 1,
    ) -> Path:
        """Adds a stage and returns its output folder. What runs a model gets its inputs as flags by their names."""
        key = re.sub(r"^round-\d+/", "", name)
        self.used.add(key)
        override = self.overrides.get(key, StageOverrides())
        layout = self._layout(command, override)
        # The one part of a layout that changes the result.
        precision = {"precision": layout.precision} if command in RUNS_MODEL else {}
        megatron = flags_of({**self.recipe.megatron, **override.megatron}) if command in RUNS_MODEL else ()
        if override.megatron and command not in RUNS_MODEL:
            raise RecipeError(f"stages.{key}.megatron: this stage trains no model; remove the flags")
        if command in (*RUNS_MODEL, "import"):
            # Prompts and verifiers are not always files: their flags are among the arguments.
            files = {key: path for key, path in inputs.items() if key not in ("prompts", "verifier")}
            arguments = [*_input_flags(files), *arguments]
        if command in TRAINS:
            arguments = [*arguments, *settings_to_argv(self._monitoring())]
        if command not in ("prepare", "report"):
            arguments = [*arguments, "--output", str(output)]
        self.stages.append(
            Stage(
                name=name,
                command=command,
                arguments=tuple(arguments),
                inputs=dict(inputs),
                output=output,
                settings=settings_identity(settings, megatron, **precision),
                layout=layout,
                megatron=megatron,
                slurm=self._slurm(override),
                gpus_per_process=gpus_per_process,
            )
        )
        return output

    def _layout(self, command: str, override: StageOverrides) -> Layout:
        if command not in RUNS_MODEL:
            return Layout()
        given = override.layout.model_dump(include=override.layout.model_fields_set)
        return self.recipe.layout.model_copy(update=given)

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

    def _prompts(self, prompts: str) -> str:
        return prompts if prompts.startswith(REASONING_GYM) else str(self._path(prompts))

    def _verifier(self, verifier: str) -> str:
        file = verifier_file(verifier)
        return verifier if file is None else f"python:{self._path(str(file))}:{verifier.rpartition(':')[2]}"


def _input_flags(inputs: Mapping[str, Path]) -> list[str]:
    argv: list[str] = []
    for name, path in inputs.items():
        policy = name.removeprefix("policy-")
        argv += ["--policy", f"{policy}={path}"] if policy != name else [f"--{name}", str(path)]
    return argv


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
