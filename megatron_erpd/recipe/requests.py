"""What each command is asked for: its typed settings, what it reads, where it writes, and how it is spread.

A stage of a run holds one of these; a command reads the same from its flags (`recipe/command_line.py`). What identifies
the artifact (`identity` and `inputs`, as its manifest keeps them) is made here alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from megatron_erpd.errors import RecipeError
from megatron_erpd.manifest import settings_identity
from megatron_erpd.sampling.inputs import prompts_identity, scorer_version, task_identity
from megatron_erpd.settings import (
    DistillSettings,
    EvaluateSettings,
    ImportSettings,
    Layout,
    Monitoring,
    OnPolicySettings,
    OptimizerSettings,
    PrecomputeSettings,
    ReplaySettings,
    SampleSettings,
    SelectSettings,
    Settings,
    TrainingSettings,
)
from megatron_erpd.settings.megatron_flags import without_virtual_stages
from megatron_erpd.slices import Slice

SOURCE_HELP = (
    "a file or folder (JSON lines, JSON, CSV, Parquet, Arrow), or a data set of the hub, "
    + "NAME[:CONFIGURATION]:SPLIT[@REVISION]"
)
PROMPTS_HELP = (
    f"rows with prompt and answer: {SOURCE_HELP}, with ?prompt=NAME&answer=NAME where they are called otherwise; or "
    "reasoning-gym:TASK?size=100&seed=1"
)
VERIFIER_HELP = "math-verify, reasoning-gym:TASK, python:FILE.py:FUNCTION or python:MODULE:FUNCTION"
NO_VERIFIER_HELP = f"{VERIFIER_HELP}; without one nothing is scored"
BASE_HELP = "artifact with the base policy's checkpoint"
ROLLOUTS_HELP = "artifact, folder or Parquet file"
REWARDS_HELP = "rewards of these rollouts that `megatron-erpd score` wrote (default: those that the rollouts brought)"
WORKERS_HELP = "processes of the verifier, each with it loaded (default: as many as there are cores)"
COUNT_HELP = "use so many of the prompts (default: all)"


@dataclass(frozen=True)
class Repeated:
    """A flag that is given once for each entry of a field, as `--policy NAME=DIR`.

    Attributes:
        read: the field's value from the words after the flags.
        write: these words from the value.
    """

    flag: str
    metavar: str
    read: Callable[[Sequence[str]], Any]
    write: Callable[[Any], list[str]]


def read_pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` words as a mapping; `RecipeError` for another form or a name that is given twice."""
    pairs: dict[str, str] = {}
    for text in words:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise RecipeError(f"--{flag} {text}: write NAME=VALUE")
        if name in pairs:
            raise RecipeError(f"--{flag} {text}: {name} is given twice")
        pairs[name] = value
    return pairs


def read_policies(words: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR` words of `--policy`.

    Raises:
        RecipeError: not of that form, a repeated name, or the name `base`, which --base gives.
    """
    policies: dict[str, Path] = {}
    for item in words:
        name, found, folder = item.partition("=")
        if not found or not name or not folder:
            raise RecipeError(f"--policy {item}: write NAME=DIR, for example teacher=runs/mine/teacher")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(f"--policy {item}: a name may hold letters, digits, _, - and . (it becomes a folder's)")
        if name == "base" or name in policies:
            raise RecipeError(f"--policy {item}: {name!r} is given twice (base comes from --base)")
        policies[name] = Path(folder)
    return policies


class Checkpoint(NamedTuple):
    """A checkpoint to export and the name of its folder. `iteration`: a number, `all`, or None for the latest."""

    name: str
    folder: Path
    iteration: str | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        match = re.fullmatch(r"([\w.@-]+)=(.+?)(?:@(\d+|all))?", text)
        if not match:
            raise RecipeError(f"--checkpoint {text}: write NAME=DIR, NAME=DIR@ITERATION or NAME=DIR@all")
        return cls(match[1], Path(match[2]), match[3])

    def __str__(self) -> str:
        return f"{self.name}={self.folder}" + (f"@{self.iteration}" if self.iteration else "")


def _pairs(values: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


_POLICY = Repeated("policy", "NAME=DIR", read_policies, _pairs)
_MODEL = Repeated("model", "NAME=HF", lambda words: {n: Path(p) for n, p in read_pairs("model", words).items()}, _pairs)
_FIELD = Repeated("field", "OURS=THEIRS", lambda words: read_pairs("field", words), _pairs)
_CHECKPOINT = Repeated(
    "checkpoint",
    "NAME=DIR[@ITERATION]",
    lambda words: tuple(map(Checkpoint.read, words)),
    lambda checkpoints: list(map(str, checkpoints)),
)


def _given(**paths: Path | None) -> dict[str, Path]:
    """Inputs by their names in a manifest, without those that are not given."""
    return {name.replace("_", "-"): path for name, path in paths.items() if path is not None}


def _policy_inputs(policies: Mapping[str, Path]) -> dict[str, Path]:
    return {f"policy-{name}": folder for name, folder in policies.items()}


class Request(Settings):
    """What one command is asked for."""

    command: ClassVar[str]
    """The command of `megatron-erpd`, and the stage that the manifest names."""
    example: ClassVar[str] = ""

    output: Path = Field(description="folder of the artifact")
    verify_inputs: bool = Field(
        default=False,
        description="first compare the files of artifacts that are read with the checksums in their manifests; `run` "
        "and `submit` ask for it",
    )

    @property
    def artifact(self) -> Path:
        """The folder of the artifact that is written."""
        return self.output

    @property
    def inputs(self) -> dict[str, Path]:
        """Name to folder or file of everything that the result depends on, as the manifest names it."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """All settings that decide the result, as the manifest keeps them."""
        raise NotImplementedError

    @property
    def gpus_per_process(self) -> int:
        """More than 1 where a sampler spreads the policy over several by itself."""
        return 1

    @property
    def recorded(self) -> Self:
        """The request whose identity the manifest will keep: a training chooses the learning rate that is not given."""
        return self


class ModelRequest(Request):
    """Of a command that runs data through a model in Megatron."""

    settings: Settings
    layout: Layout = Field(default=Layout(), title="layout")
    megatron: tuple[str, ...] = Field(default=(), description="Megatron's own flags, after `--`")

    @classmethod
    def taken_flags(cls, megatron: Sequence[str]) -> tuple[str, ...]:
        """What the command takes of a recipe's or command line's Megatron flags: virtual pipeline stages are for
        trainings alone."""
        return tuple(megatron) if issubclass(cls, TrainingRequest) else without_virtual_stages(megatron)

    def _identity(self, **more: Any) -> dict[str, Any]:
        """With the one part of a layout that changes the result; virtual pipeline stages are another part."""
        flags = without_virtual_stages(self.megatron)
        return settings_identity(self.settings, flags, precision=self.layout.precision, **more)


class TrainingRequest(ModelRequest):
    """Of a command that trains."""

    settings: TrainingSettings
    base: Path = Field(description=BASE_HELP)
    monitoring: Monitoring = Field(default=Monitoring(), title="monitoring")

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity()

    @property
    def recorded(self) -> Self:
        """The same with the learning rate that the training takes: by the size of its base, which must be there, where
        none is given.

        Raises:
            CheckpointError: the size can't be told.
        """

        def size() -> int:
            from megatron_erpd.checkpoint.mapping.parameter_count import parameters_of  # which imports PyTorch

            return parameters_of(self.base / "hf")

        return self.model_copy(update={"settings": self.settings.with_rates(size)})


class SlicedRequest(Request):
    """Of a command whose work independent jobs can share."""

    shares: ClassVar[tuple[str, str]]
    """What the command does to which things."""
    slice: Slice | None = None
    merge_slices: bool = False

    @property
    def whole(self) -> Self:
        """The request for all slices together."""
        return self.model_copy(update={"slice": None})

    def _of_slice(self, identity: dict[str, Any]) -> dict[str, Any]:
        return identity | ({"slice": str(self.slice)} if self.slice else {})


class Prepare(Request):
    """The recipe's own command, which writes inputs of the run."""

    command = "prepare"
    line: str
    """As the recipe has it, with `{output}` for the folder."""

    @property
    def shown(self) -> str:
        """The command line to execute."""
        return self.line.replace("{output}", shlex.quote(str(self.output)))

    @property
    def inputs(self) -> dict[str, Path]:
        """The scripts that the command names: editing one makes the stage anew."""
        return {f"file-{word}": Path(word) for word in shlex.split(self.shown) if Path(word).is_file()}

    @property
    def identity(self) -> dict[str, Any]:
        return {"command": self.line}


class Import(Request):
    """Writes a Megatron checkpoint (torch_dist) with a Hugging Face model's weights, bit for bit.

    The artifact holds `megatron/` (loadable under any layout and precision) and `hf/` (the configuration, tokenizer,
    chat template and all else but the weights). Under torchrun the processes share the work, however many there are.
    With --dry-run nothing is written, and config.json is enough: it shows the mapping, the shapes in every rank of a
    layout, memory and time.
    """

    command = "import"
    example = (
        "--hf Qwen3-4B --output runs/mine/base\n"
        "         megatron-erpd import --hf Llama-3.1-70B --dry-run --tensor-parallel 8 --pipeline-parallel 4"
    )
    hf: str = Field(
        description="Hugging Face folder with config.json and safetensors, a .gguf file, or "
        "ORGANISATION/NAME[@REVISION] on the hub, where there is a network",
    )
    via: Literal["megatron-bridge"] | None = Field(
        default=None,
        description="convert with Megatron-Bridge, where it is installed: for architectures that are not supported "
        "here",
    )
    checkpoint: Path | None = Field(
        default=None,
        description="take this Megatron checkpoint (torch_dist, of Megatron-LM or Megatron-Bridge) instead of the "
        "model's own weights: a policy that was trained elsewhere; its files are linked or copied",
    )

    @model_validator(mode="after")
    def _takes_one_way(self) -> Self:
        if self.via and self.checkpoint:
            raise ValueError("--via and --checkpoint: are two ways to get the weights; give one of them")
        return self

    @property
    def inputs(self) -> dict[str, Path]:
        return _given(hf=Path(self.hf), checkpoint=self.checkpoint)

    @property
    def identity(self) -> dict[str, Any]:
        return {"via": self.via} if self.via else {}


class Export(Request):
    """Writes Hugging Face folders from Megatron checkpoints, one after another, and compares each with its checkpoint.

    A folder appears when every tensor is in it and was found equal, bit for bit. Under torchrun the processes share the
    work, however many there are.
    """

    command = "export"
    example = "--checkpoint student=runs/mine/round-01/student --output exported"
    checkpoints: Annotated[tuple[Checkpoint, ...], _CHECKPOINT] = Field(
        description="artifact to export and the name of its folder; repeatable. @all: every iteration kept, as "
        "NAME@ITERATION"
    )
    via: Literal["megatron-bridge"] | None = Field(
        default=None, description="convert with Megatron-Bridge, as the checkpoints were imported; needs --hf"
    )
    hf: Path | None = Field(
        default=None, description="with --via: the Hugging Face folder that was imported, weights included"
    )

    @property
    def named(self) -> dict[str, Checkpoint]:
        """The checkpoints by their names in the manifest. A name that comes alone and with @all asks for all; where the
        two are of different artifacts, the second is called NAME@all."""
        found: dict[str, Checkpoint] = {}
        for one in sorted(self.checkpoints, key=lambda checkpoint: checkpoint.iteration or ""):
            same = one.name not in found or found[one.name].folder == one.folder
            found[one.name if same else f"{one.name}@{one.iteration}"] = one
        return found

    @property
    def inputs(self) -> dict[str, Path]:
        return {name: one.folder for name, one in self.named.items()}

    @property
    def identity(self) -> dict[str, Any]:
        iterations = {name: one.iteration for name, one in self.named.items()}
        return {"iterations": iterations, **({"via": self.via} if self.via else {})}


class ImportRollouts(Request):
    """Turns rollouts that another program wrote into this project's format; every row that can't be used is named."""

    command = "import-rollouts"
    example = "--source dump.jsonl --format verl --field reward=score --tokenizer Qwen3-4B --output runs/mine/rollouts"
    source: str = Field(description=f"the rollouts: {SOURCE_HELP}")
    tokenizer: Path | None = Field(
        default=None, description="Hugging Face folder; needed for sources without token ids"
    )
    settings: ImportSettings = Field(default=ImportSettings(), title="reading")
    fields: Annotated[dict[str, str], _FIELD] = Field(
        default={}, description="read our field OURS from THEIRS, over the format's own; repeatable"
    )

    @property
    def inputs(self) -> dict[str, Path]:
        return _given(source=Path(self.source), tokenizer=self.tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        return settings_identity(self.settings, fields=self.fields)


class Sample(SlicedRequest):
    """Samples rollouts from a policy and scores them. An interrupted run goes on with the part files (of 128 prompts
    each) that it has not written."""

    command = "sample"
    example = (
        "--model Qwen3-4B --prompts train.jsonl --verifier math-verify --num-rollouts 16 --output runs/mine/rollouts"
    )
    shares = ("sample", "the part files")
    model: Path = Field(description="the policy: a Hugging Face folder")
    prompts: str = Field(description=PROMPTS_HELP)
    verifier: str | None = Field(default=None, description=NO_VERIFIER_HELP)
    workers: int | None = Field(default=None, ge=1, description=WORKERS_HELP)
    settings: SampleSettings = Field(default=SampleSettings(), title="sampling")
    num_prompts: int | None = Field(default=None, ge=1, description=COUNT_HELP)
    first_prompt: int = Field(
        default=0,
        ge=0,
        description="where they begin, counted from 0; after the last prompt comes the first again",
    )

    @property
    def artifact(self) -> Path:
        return self.output / self.slice.hidden_folder if self.slice else self.output

    @property
    def gpus_per_process(self) -> int:
        return self.settings.tensor_parallel

    @property
    def inputs(self) -> dict[str, Path]:
        return {"model": self.model, **prompts_identity(self.prompts)[1]}

    @property
    def identity(self) -> dict[str, Any]:
        """Over how many GPUs the policy is spread is no part of what its rollouts are, and neither is who scored them:
        that identifies the rewards (`Score`)."""
        more = prompts_identity(self.prompts)[0] | ({"first_prompt": self.first_prompt} if self.first_prompt else {})
        values = self.settings.model_dump(mode="json", exclude={"tensor_parallel"})
        return self._of_slice(settings_identity(values, num_prompts=self.num_prompts, **more))


class Score(Request):
    """Scores sampled rollouts: rewards apart from them, for the trainings' --rewards. What the same verifier has scored
    already, for the same answers, is taken over; tokens and log-probs stay as they are."""

    command = "score"
    example = "--rollouts runs/mine/rollouts --prompts train.jsonl --verifier math-verify --output runs/mine/rewards"
    rollouts: Path = Field(description="artifact that `megatron-erpd sample` wrote")
    prompts: str = Field(description=f"those that they were sampled from: {PROMPTS_HELP}")
    verifier: str = Field(description=VERIFIER_HELP)
    workers: int | None = Field(default=None, ge=1, description=WORKERS_HELP)

    @property
    def inputs(self) -> dict[str, Path]:
        return {"rollouts": self.rollouts, **task_identity(self.prompts, self.verifier)[1]}

    @property
    def identity(self) -> dict[str, Any]:
        more = task_identity(self.prompts, self.verifier)[0]
        return settings_identity(more, scorer=scorer_version(self.verifier))


class ReplayRequest(TrainingRequest):
    """Of a training on fixed rollouts."""

    settings: OptimizerSettings
    rollouts: Path = Field(description=ROLLOUTS_HELP)
    base_log_probs: Path | None = Field(
        default=None, description="cache with the base policy's log-probs; only --loss sft can do without"
    )
    rewards: Path | None = Field(default=None, description=REWARDS_HELP)

    @property
    def inputs(self) -> dict[str, Path]:
        return _given(base=self.base, rollouts=self.rollouts, base_log_probs=self.base_log_probs, rewards=self.rewards)


class TrainTeacher(ReplayRequest):
    """Stage 1: optimises a replay loss on fixed, scored rollouts, from the base policy, for many epochs.

    The same command trains a teacher, the unlearned policy (--unlearn), and policies on demonstrations (--loss sft).
    """

    command = "train-teacher"
    example = (
        "--base runs/a/base --rollouts runs/a/rollouts --base-log-probs runs/a/base-log-probs --output runs/a/teacher "
        "--loss ce --epochs 16"
    )
    settings: ReplaySettings = Field(default=ReplaySettings(), title="training")

    @property
    def inputs(self) -> dict[str, Path]:
        return super().inputs | _given(loss=self.settings.loss_file)


class TrainOnPolicy(TrainingRequest):
    """A baseline: GRPO on policy. Every optimizer step samples rollouts from the policy as it is and makes one update.

    Nothing is replayed and nothing distilled, so the importance ratio is 1 and no clip matters.
    """

    command = "train-on-policy"
    example = "--base runs/a/base --prompts train.jsonl --verifier math-verify --updates 200 --output runs/a/grpo"
    prompts: str = Field(description=PROMPTS_HELP)
    verifier: str = Field(description=VERIFIER_HELP)
    settings: OnPolicySettings = Field(default=OnPolicySettings(), title="training")
    num_prompts: int | None = Field(default=None, ge=1, description=COUNT_HELP)

    @property
    def inputs(self) -> dict[str, Path]:
        return {"base": self.base, **task_identity(self.prompts, self.verifier)[1]}

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity(num_prompts=self.num_prompts, **task_identity(self.prompts, self.verifier)[0])


class Precompute(SlicedRequest, ModelRequest):
    """Writes a teacher cache: log-probs of the rollouts' tokens and, for --kind topk, the target distribution.

    With --kind token and no --policy it holds the base policy's log-probs, which every training stage needs; with
    --signal none the base policy's top-k rows besides, which an exact KL penalty needs. An interrupted run goes on with
    the rollouts that it has not written.
    """

    command = "precompute"
    example = (
        "--base runs/a/base --policy teacher=runs/a/teacher --rollouts runs/a/rollouts --output runs/a/cache "
        "--signal strong --delta 0.5"
    )
    shares = ("score", "the rollouts")
    base: Path = Field(description=BASE_HELP)
    rollouts: Path = Field(description=ROLLOUTS_HELP)
    policies: Annotated[dict[str, Path], _POLICY] = Field(default={}, description="teacher=DIR, unlearned=DIR")
    selection: Path | None = Field(
        default=None, description="what `megatron-erpd select` wrote: reported here, and read by --signal auto"
    )
    hidden: Path | None = Field(
        default=None,
        description="a cache of the same policies that was made with --keep-hidden: q is made from its hidden states, "
        "without a forward pass",
    )
    settings: PrecomputeSettings = Field(default=PrecomputeSettings(), title="cache")

    @property
    def artifact(self) -> Path:
        return self.output / self.slice.folder if self.slice else self.output

    @property
    def inputs(self) -> dict[str, Path]:
        own = {"base": self.base, "rollouts": self.rollouts, **_policy_inputs(self.policies)}
        return own | _given(selection=self.selection, hidden=self.hidden)

    @property
    def identity(self) -> dict[str, Any]:
        return self._of_slice(self._identity())


class Distill(ReplayRequest):
    """Stage 2: from the base policy to the student, along the teacher's token-level signal, under a trust region."""

    command = "distill"
    example = (
        "--base runs/a/base --rollouts runs/a/rollouts --base-log-probs runs/a/base-log-probs --cache runs/a/cache "
        "--output runs/a/student --divergence reverse_kl"
    )
    cache: Path | None = Field(default=None, description="teacher cache (--teacher cache)")
    policies: Annotated[dict[str, Path], _POLICY] = Field(
        default={}, description="teacher=DIR, unlearned=DIR (--teacher live)"
    )
    settings: DistillSettings = Field(default=DistillSettings(), title="distillation")

    @property
    def inputs(self) -> dict[str, Path]:
        """Without what the settings do not read."""
        cache = _given(cache=self.cache if self.settings.reads_cache else None)
        return super().inputs | cache | (_policy_inputs(self.policies) if self.settings.makes_target else {})


class Select(Request):
    """Makes one of a teacher's checkpoints the teacher, by validation prompts; says whether it is strong or weak."""

    command = "select"
    example = (
        "--model Qwen3-4B --teacher runs/mine/round-01/teacher --candidates runs/mine/round-01/candidates "
        "--prompts validation.jsonl --verifier math-verify --output runs/mine/round-01/selection"
    )
    model: Path = Field(description="the base policy: a Hugging Face folder")
    teacher: Path = Field(description="artifact with the checkpoints to choose from")
    candidates: Path = Field(description="their export (`export --checkpoint ...@all`)")
    prompts: str = Field(description=f"validation prompts: {PROMPTS_HELP}")
    verifier: str = Field(description=VERIFIER_HELP)
    workers: int | None = Field(default=None, ge=1, description=WORKERS_HELP)
    rollouts: Path | None = Field(
        default=None, description="what the teacher was trained on: warns of prompts that are there"
    )
    unlearned: bool = Field(
        default=False, description="there will be an unlearned policy: signals with it may be recommended"
    )
    settings: SelectSettings = Field(default=SelectSettings(), title="selection")

    @property
    def inputs(self) -> dict[str, Path]:
        task = task_identity(self.prompts, self.verifier)[1]
        return {**task, "model": self.model, "teacher": self.teacher, "candidates": self.candidates}

    @property
    def identity(self) -> dict[str, Any]:
        more = task_identity(self.prompts, self.verifier)[0]
        return settings_identity(self.settings, has_unlearned=self.unlearned, **more)


class Evaluate(Request):
    """Measures policies on held-out prompts: accuracy, and how far they are from the base policy."""

    command = "evaluate"
    example = (
        "--model base=Qwen3-4B --exported runs/mine/round-01/export --prompts heldout.jsonl "
        "--rollouts runs/mine/round-01/rollouts --verifier math-verify --output runs/mine/round-01/evaluation"
    )
    models: Annotated[dict[str, Path], _MODEL] = Field(
        description="a policy's name and Hugging Face folder; repeatable, `base` must be among them"
    )
    exported: Path | None = Field(default=None, description="evaluate every policy of this export too")
    prompts: str = Field(description=f"held-out prompts: {PROMPTS_HELP}")
    rollouts: Path = Field(description="the fixed data, for the exact divergences")
    verifier: str | None = Field(default=None, description=NO_VERIFIER_HELP)
    workers: int | None = Field(default=None, ge=1, description=WORKERS_HELP)
    settings: EvaluateSettings = Field(default=EvaluateSettings(), title="evaluation")
    origin: Path | None = Field(
        default=None,
        description="the first round's base, in later rounds: how far all rounds together have come; default: the base",
    )

    @property
    def inputs(self) -> dict[str, Path]:
        models = {f"model-{name}": path for name, path in self.models.items()}
        given = _given(rollouts=self.rollouts, exported=self.exported, origin=self.origin)
        return task_identity(self.prompts, self.verifier)[1] | models | given

    @property
    def identity(self) -> dict[str, Any]:
        return settings_identity(self.settings, **task_identity(self.prompts, self.verifier)[0])


class Report(Request):
    """The report of a run, in its folder `root`; `artifacts` are all others of the run."""

    command = "report"
    root: Path
    artifacts: dict[str, Path]

    @property
    def inputs(self) -> dict[str, Path]:
        return self.artifacts

    @property
    def identity(self) -> dict[str, Any]:
        return {}


REQUESTS: dict[str, type[Request]] = {
    request.command: request
    for request in (
        *(Prepare, Import, Export, ImportRollouts, Sample, Score, TrainTeacher, TrainOnPolicy),
        *(Precompute, Distill, Select, Evaluate, Report),
    )
}
"""By their commands."""
