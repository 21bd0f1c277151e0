"""What each stage can be told: one validated model per stage, the single source of recipe keys and flags.

A recipe's sections are these models; the tools' command lines are generated from them (`settings_arguments`), so a
key, its default, its check and its help text have one home.
`Layout` says how a stage runs and never changes its result; everything else is part of an artifact's identity.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_erpd.errors import RecipeError


class Settings(BaseModel):
    """Base of all settings: an unknown key is an error, a value can't be changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Settings):
    """How a stage is spread over processes: speed and memory. Only `precision` changes the result, and it counts as a
    setting does."""

    tensor_parallel: int = Field(default=1, ge=1, description="shards of every layer (TP)")
    pipeline_parallel: int = Field(default=1, ge=1, description="stages of layers (PP)")
    context_parallel: int = Field(default=1, ge=1, description="shards of the sequence (CP); needs Transformer Engine")
    data_parallel: int = Field(default=1, ge=1, description="copies of the model (DP)")
    sequence_parallel: bool = Field(default=False, description="shard activations between layers over TP")
    micro_batch_size: int = Field(default=32, ge=1, description="rollouts in one forward pass of one rank")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="dtype of weights and activations")

    @property
    def num_processes(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel


class TrainingSettings(Settings):
    """Learning rate, Adam and checkpoints, for every stage that trains."""

    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate")
    min_learning_rate: float | None = Field(
        default=None, ge=0, description="final rate of the cosine; default: constant rate"
    )
    warmup_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of the steps with a rising learning rate"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    adam_beta1: float = Field(default=0.9, gt=0, lt=1, description="Adam's first decay")
    adam_beta2: float = Field(default=0.95, gt=0, lt=1, description="Adam's second decay")
    clip_gradient: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    seed: int = Field(default=1, ge=1, description="decides the order of the data")
    checkpoints: int = Field(
        default=1, ge=1, description="checkpoints kept over the run, at equal distances; the last is the result"
    )
    save_interval: int | None = Field(
        default=None,
        ge=1,
        description="save at least every so many steps, in case of a crash; what lies between the kept checkpoints is "
        "removed; default: only the kept ones are saved",
    )

    @model_validator(mode="after")
    def _learning_rate_falls(self) -> Self:
        if self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}; the rate "
                "falls from the one to the other"
            )
        return self


class OptimizerSettings(TrainingSettings):
    """The same, in passes over fixed rollouts."""

    epochs: float = Field(default=8, gt=0, description="passes over the rollouts")
    global_batch_size: int = Field(default=256, ge=1, description="rollouts in one optimizer step")


Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"]
AdvantageKind = Literal["group_norm", "group_mean", "leave_one_out", "raw"]
ReplayLoss = Literal["ppo", "gspo", "cispo", "sapo", "ce", "mse", "sft"]


class ReplaySettings(OptimizerSettings):
    """Stage 1: off-policy replay on a fixed set of scored rollouts."""

    loss: ReplayLoss = Field(default="ce", description="the replay loss")
    unlearn: bool = Field(
        default=False, description="flip the sign of the advantage (or the label): the unlearned policy"
    )
    advantage: AdvantageKind = Field(default="group_norm", description="how rewards become advantages")
    aggregation: Aggregation | None = Field(
        default=None, description="how token losses are averaged; default: token_mean (gspo: seq_mean_token_mean)"
    )
    clip_low: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="ppo, gspo: lower clip distance from 1; 0.9 is loose; default 0.2 (gspo 3e-4)",
    )
    clip_high: float | None = Field(
        default=None,
        gt=0,
        description="ppo, gspo, cispo: upper clip distance from 1; 9 is loose; default 0.2 (gspo 4e-4)",
    )
    dual_clip: float | None = Field(default=None, gt=1, description="ppo: bound on the ratio for negative advantages")
    tau_positive: float = Field(default=1.0, gt=0, description="sapo: temperature for positive advantages")
    tau_negative: float = Field(default=1.05, gt=0, description="sapo: temperature for negative advantages")
    beta: float = Field(default=1.0, gt=0, description="ce, mse: scale of the implicit reward")
    sequence_log_ratio: Literal["sum", "mean"] = Field(default="sum", description="ce, mse: aggregate of the log-ratio")
    sft_threshold: float = Field(default=0.5, description="sft: train on rollouts with a reward above this")
    kl_coefficient: float = Field(default=0.0, ge=0, description="weight of the KL estimate to the base policy")
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = Field(
        default="k3", description="estimator of that KL from the sampled tokens; or exact, over the vocabulary"
    )
    kl_topk: int = Field(
        default=64,
        ge=1,
        description="exact: entries of the base's rows, the rest is one tail mass: a lower bound below the vocabulary",
    )
    importance_correction: Literal["none", "token", "sequence"] = Field(
        default="none", description="truncated weights for rollouts sampled by another engine"
    )
    importance_cap: float = Field(default=2.0, gt=0, description="truncation of those weights")
    max_kl: float | None = Field(
        default=None, gt=0, description="end after the step whose KL(policy || base) per token is above this, in nats"
    )
    min_entropy: float | None = Field(
        default=None, gt=0, description="end after the step whose entropy per token is below this, in nats"
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        loss, choice = self.loss, f"loss: {self.loss}"
        _refuse_unread(self, choice, ("clip_low",), loss in ("ppo", "gspo"))
        _refuse_unread(self, choice, ("clip_high",), loss in ("ppo", "gspo", "cispo"))
        _refuse_unread(self, choice, ("dual_clip",), loss == "ppo")
        _refuse_unread(self, choice, ("tau_positive", "tau_negative"), loss == "sapo")
        _refuse_unread(self, choice, ("beta", "sequence_log_ratio"), loss in ("ce", "mse"))
        _refuse_unread(self, choice, ("sft_threshold",), loss == "sft")
        _refuse_unread(self, "kl_coefficient: 0", ("kl_estimator",), self.kl_coefficient > 0)
        _refuse_unread(self, f"kl_estimator: {self.kl_estimator}", ("kl_topk",), self.has_exact_kl)
        _refuse_unread(self, "importance_correction: none", ("importance_cap",), self.importance_correction != "none")
        return self

    @property
    def has_exact_kl(self) -> bool:
        """Whether the base's top-k rows are read."""
        return self.kl_estimator == "exact"


class SampleSettings(Settings):
    """Sampling rollouts from a policy and scoring them."""

    num_rollouts: int = Field(default=16, ge=1, description="rollouts per prompt (G)")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response, in tokens")
    batch_size: int = Field(default=512, ge=1, description="sequences decoded at once")
    seed: int = Field(default=1, ge=0, description="seed of the sampler")
    chat_template: bool = Field(default=False, description="wrap the prompt in the tokenizer's chat template")
    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="what generates")


class OnPolicySettings(TrainingSettings):
    """GRPO on policy: each optimizer step is one update on fresh rollouts of the policy as it is (a baseline)."""

    updates: int = Field(default=100, ge=1, description="optimizer steps, each on rollouts of its own")
    prompts_per_update: int = Field(default=16, ge=1, description="prompts in one step")
    num_rollouts: int = Field(default=16, ge=1, description="rollouts per prompt (G)")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response, in tokens")
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature; the update takes the samples for the policy's own at 1"
    )
    batch_size: int = Field(default=512, ge=1, description="sequences decoded at once by a process")
    chat_template: bool = Field(default=False, description="wrap the prompt in the tokenizer's chat template")
    advantage: AdvantageKind = Field(default="group_norm", description="how rewards become advantages")
    aggregation: Aggregation = Field(default="token_mean", description="how token losses are averaged")
    kl_coefficient: float = Field(
        default=0.0, ge=0, description="weight of the exact KL(policy || base) on the rollouts; 0 needs no base beside"
    )

    @property
    def global_batch_size(self) -> int:
        """Rollouts in one optimizer step."""
        return self.prompts_per_update * self.num_rollouts

    @model_validator(mode="after")
    def _groups_have_a_signal(self) -> Self:
        if self.num_rollouts == 1 and self.advantage != "raw":
            raise ValueError(
                f"advantage {self.advantage} compares the rollouts of a prompt, and num_rollouts is 1: all advantages "
                "would be 0; sample more, or use raw"
            )
        return self


class ImportSettings(Settings):
    """Reading rollouts that another program wrote."""

    format: Literal["plain", "verl", "slime", "trl", "openr1"] = Field(
        default="plain", description="who wrote the file; plain: our own column names"
    )
    on_reject: Literal["error", "skip"] = Field(
        default="error", description="a row that can't be used: end with an error, or leave it out and count it"
    )
    allow_unverified: bool = Field(default=False, description="keep rollouts without a reward, as unverified")
    duplicates: Literal["number", "reject"] = Field(
        default="number", description="a rollout whose tokens equal an earlier one's: another draw, or an error"
    )
    append_eos: bool = Field(default=True, description="end responses encoded from text with the end token")
    user_message: bool | None = Field(
        default=None, description="put plain-text prompts into the chat template; default: as the format says"
    )


AUTO_SIGNAL = "auto"
"""The signal that the teacher's selection recommends; known when the teacher cache is made."""
NO_SIGNAL = "none"
"""The signal of a top-k cache whose q is the base policy itself."""


class PrecomputeSettings(Settings):
    """The teacher cache: which policies' rows, and for `topk` which target distribution."""

    kind: Literal["token", "topk"] = Field(
        default="topk", description="token: log-probs of the response tokens; topk: the target q"
    )
    signal: str = Field(
        default="strong",
        description="strong, unlearned, contrast, or e.g. '0.7*teacher/base + 0.3*base/unlearned'; auto: the one that "
        "the teacher's selection recommends; none: q is the base",
    )
    projection: Literal["per_token", "global"] = Field(
        default="per_token", description="one eta per token, or one for all"
    )
    delta: float = Field(default=0.5, gt=0, description="KL budget per response token, in nats")
    eta_max: float = Field(default=1.0, gt=0, description="largest step along the signal")
    projection_clip: float | None = Field(
        default=None, gt=0, description="clip the signal to +- this many nats before the projection; default: no clip"
    )
    k: int = Field(default=64, ge=1, description="topk: entries kept per token; the rest is one exact tail mass")

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        projection = ("projection", "delta", "eta_max", "projection_clip")
        _refuse_unread(self, "kind: token", (*projection, "k"), self.kind == "topk")
        _refuse_unread(self, "signal: none", projection, self.signal != NO_SIGNAL)
        return self

    @property
    def has_signal(self) -> bool:
        """Whether q is a projection along a signal, for which the signal's policies are needed."""
        return self.kind == "topk" and self.signal != NO_SIGNAL


_POLICY_GRADIENT_FIELDS = (
    *("loss", "clip_low", "clip_high", "tau_positive", "tau_negative"),
    *("signal_weight", "signal_scale", "signal_clip", "shuffle_signal", "advantage_weight", "sign_agreement"),
    *("kl_budget", "kl_coefficient"),
)


class DistillSettings(OptimizerSettings):
    """Stage 2: from the base policy to the student, under a trust region."""

    epochs: float = Field(default=8, gt=0, description="passes over the rollouts")
    form: Literal["projection", "policy_gradient"] = Field(
        default="projection", description="(B) divergence to q, or (A) token advantages"
    )
    teacher: Literal["cache", "live"] = Field(
        default="cache", description="read the cache, or run the teachers beside the student"
    )
    divergence: Literal["forward_kl", "reverse_kl", "js"] = Field(
        default="reverse_kl", description="projection: what is minimised"
    )
    gather_teacher: bool = Field(
        default=False, description="projection, live: gather the target over the tensor-parallel shards"
    )
    signal: str = Field(
        default="strong",
        description="as in precompute; read by policy_gradient (auto: the cache's) and by a live teacher",
    )
    delta: float = Field(default=0.5, gt=0, description="projection, live: KL budget per token")
    eta_max: float = Field(default=1.0, gt=0, description="projection, live: largest step along the signal")
    projection_clip: float | None = Field(
        default=None, gt=0, description="projection, live: clip the signal to +- this many nats; default: no clip"
    )
    loss: Literal["ppo", "sapo"] = Field(default="ppo", description="policy_gradient: the surrogate")
    clip_low: float = Field(default=0.9, gt=0, le=1, description="policy_gradient, ppo: lower clip distance from 1")
    clip_high: float = Field(default=9.0, gt=0, description="policy_gradient, ppo: upper clip distance from 1")
    tau_positive: float = Field(
        default=1.0, gt=0, description="policy_gradient, sapo: temperature for positive advantages"
    )
    tau_negative: float = Field(
        default=1.05, gt=0, description="policy_gradient, sapo: temperature for negative advantages"
    )
    signal_weight: float = Field(
        default=1.0, ge=0, description="policy_gradient: weight of the token signal; 0 needs no teacher"
    )
    signal_scale: float = Field(default=1.0, gt=0, description="policy_gradient: the signal is divided by this")
    signal_clip: float = Field(default=5.0, gt=0, description="policy_gradient: and clipped to +- this")
    shuffle_signal: bool = Field(
        default=False,
        description="policy_gradient: a control: the signal permuted over all response tokens, by the seed",
    )
    advantage_weight: float = Field(
        default=0.0, ge=0, description="policy_gradient: alpha, weight of the rollout's advantage"
    )
    sign_agreement: bool = Field(
        default=False, description="policy_gradient: keep the signal only where it agrees with the advantage"
    )
    kl_budget: float = Field(
        default=0.05, gt=0, description="policy_gradient: KL(policy || base) per token that the controller holds"
    )
    kl_coefficient: float = Field(
        default=1.0, ge=1e-3, le=1e3, description="policy_gradient: where the controller's coefficient starts"
    )
    advantage: AdvantageKind = Field(default="group_norm", description="how rewards become advantages")

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        gradient, live = self.form == "policy_gradient", self.reads_live_teacher
        form = f"form: {self.form}"
        source = form if gradient else f"{form} and teacher: {self.teacher} (the cache's own settings count)"
        _refuse_unread(self, form, ("divergence",), not gradient)
        _refuse_unread(self, source, ("gather_teacher", "delta", "eta_max", "projection_clip"), live)
        _refuse_unread(self, source, ("signal",), gradient or live)
        _refuse_unread(self, form, _POLICY_GRADIENT_FIELDS, gradient)
        if gradient:
            surrogate = f"loss: {self.loss}"
            _refuse_unread(self, surrogate, ("clip_low", "clip_high"), self.loss == "ppo")
            _refuse_unread(self, surrogate, ("tau_positive", "tau_negative"), self.loss == "sapo")
        return self

    @model_validator(mode="after")
    def _has_a_signal(self) -> Self:
        if self.reads_live_teacher and self.signal == AUTO_SIGNAL:
            raise ValueError(
                "signal: auto is decided where a teacher cache is made, and teacher: live reads none; name the signal"
            )
        if self.form != "policy_gradient":
            return self
        if self.signal_weight == 0 and self.advantage_weight == 0:
            raise ValueError("signal_weight and advantage_weight are both 0: nothing to learn from; set one of them")
        if self.signal_weight == 0 and self.sign_agreement:
            raise ValueError("sign_agreement compares the signal with the advantage, and signal_weight is 0; unset one")
        if self.signal_weight == 0 and self.shuffle_signal:
            raise ValueError("shuffle_signal permutes the signal, and signal_weight is 0; unset one")
        if self.teacher == "live":
            raise ValueError(
                "teacher: live is for the projection; the policy gradient reads the teacher's log-probs of fixed "
                "tokens, which never change: precompute them and use teacher: cache"
            )
        return self

    @property
    def reads_live_teacher(self) -> bool:
        """Whether the teachers run beside the student."""
        return self.form == "projection" and self.teacher == "live"

    @property
    def reads_cache(self) -> bool:
        """Whether a teacher cache is read."""
        return self.needs_teacher and self.teacher == "cache"

    @property
    def needs_teacher(self) -> bool:
        """False only for the sequence-advantage control."""
        return self.form == "projection" or self.signal_weight > 0


class HeldOutSettings(Settings):
    """Sampling on held-out prompts."""

    num_prompts: int = Field(default=256, ge=1, description="held-out prompts used")
    num_samples: int = Field(default=4, ge=1, description="samples per prompt at temperature 1")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response, in tokens")
    batch_size: int = Field(default=512, ge=1, description="sequences at once")
    seed: int = Field(default=7, ge=0, description="seed of the sampler")
    chat_template: bool = Field(default=False, description="wrap the prompt in the tokenizer's chat template")


class EvaluateSettings(HeldOutSettings):
    """What is measured on held-out prompts."""

    num_rollouts: int = Field(default=512, ge=1, description="rows of the fixed data on which the exact KL is computed")


class SelectSettings(HeldOutSettings):
    """Which of the teacher's kept checkpoints becomes the teacher."""

    num_prompts: int = Field(default=256, ge=2, description="validation prompts used")
    by: Literal["best_reward", "last"] = Field(
        default="best_reward", description="the checkpoint with the highest mean reward of its samples, or the last one"
    )


def _refuse_unread(settings: Settings, choice: str, names: tuple[str, ...], read: bool) -> None:
    """Refuses a changed value that nothing would read: most often it was meant for another choice."""
    for name in names:
        value = getattr(settings, name)
        if not read and value != type(settings).model_fields[name].default:
            raise ValueError(f"{name} {value} has no effect with {choice}; remove it or change the choice")


def parse_settings[S: Settings](model: type[S], values: dict[str, Any]) -> S:
    """Validates `values`; all that is wrong is told at once, each with its place.

    Raises:
        RecipeError: with a line for each unknown key and bad value.
    """
    try:
        return model(**values)
    except ValidationError as error:
        lines = [f"\n  {where}: {what}" if where else f"\n  {what}" for where, what in error_lines(error)]
        raise RecipeError(f"invalid {model.__name__}:{''.join(lines)}") from None


def error_lines(error: ValidationError) -> list[tuple[str, str]]:
    """The place (`student.epochs`) and the reason of everything that a validation found wrong."""
    return [(".".join(str(part) for part in e["loc"]), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
