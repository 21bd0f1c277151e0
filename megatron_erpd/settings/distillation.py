"""Settings of stage 2: the teacher cache and the student."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_erpd.settings.base import Settings, refuse_unread
from megatron_erpd.settings.training import AdvantageKind, OptimizerSettings

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
    topk_dtype: Literal["float16", "float32"] = Field(
        default="float16", description="topk: type of the entries' log-probs, 2 or 4 bytes each"
    )
    keep_hidden: bool = Field(
        default=False,
        description="keep every policy's final hidden states too (2 bytes x hidden size per token and policy): another "
        "signal, delta or eta_max then needs no forward pass (precompute --hidden)",
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        projection = ("projection", "delta", "eta_max", "projection_clip")
        refuse_unread(self, "kind: token", (*projection, "k", "topk_dtype"), self.kind == "topk")
        refuse_unread(self, "signal: none", projection, self.signal != NO_SIGNAL)
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
    teacher: Literal["cache", "hidden", "live"] = Field(
        default="cache",
        description="read the cache's rows, make the target of its hidden states (projection), or run the teachers "
        "beside the student (projection)",
    )
    divergence: Literal["forward_kl", "reverse_kl", "js"] = Field(
        default="reverse_kl", description="projection: what is minimised"
    )
    gather_teacher: bool = Field(
        default=False, description="projection, live or hidden: gather the target over the tensor-parallel shards"
    )
    signal: str = Field(
        default="strong",
        description="as in precompute; read by policy_gradient (auto: the cache's) and by teacher live or hidden",
    )
    delta: float = Field(default=0.5, gt=0, description="projection, live or hidden: KL budget per token")
    eta_max: float = Field(default=1.0, gt=0, description="projection, live or hidden: largest step along the signal")
    projection_clip: float | None = Field(
        default=None,
        gt=0,
        description="projection, live or hidden: clip the signal to +- this many nats; default: no clip",
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
        gradient, live = self.form == "policy_gradient", self.makes_target
        form = f"form: {self.form}"
        source = form if gradient else f"{form} and teacher: {self.teacher} (the cache's own settings count)"
        refuse_unread(self, form, ("divergence",), not gradient)
        refuse_unread(self, source, ("gather_teacher", "delta", "eta_max", "projection_clip"), live)
        refuse_unread(self, source, ("signal",), gradient or live)
        refuse_unread(self, form, _POLICY_GRADIENT_FIELDS, gradient)
        if gradient:
            surrogate = f"loss: {self.loss}"
            refuse_unread(self, surrogate, ("clip_low", "clip_high"), self.loss == "ppo")
            refuse_unread(self, surrogate, ("tau_positive", "tau_negative"), self.loss == "sapo")
        return self

    @model_validator(mode="after")
    def _has_a_signal(self) -> Self:
        if self.makes_target and self.signal == AUTO_SIGNAL:
            raise ValueError(
                f"signal: auto is decided where a teacher cache is made, and teacher: {self.teacher} reads no signal "
                "from there; name the signal"
            )
        if self.form != "policy_gradient":
            return self
        if self.signal_weight == 0 and self.advantage_weight == 0:
            raise ValueError("signal_weight and advantage_weight are both 0: nothing to learn from; set one of them")
        if self.signal_weight == 0 and self.sign_agreement:
            raise ValueError("sign_agreement compares the signal with the advantage, and signal_weight is 0; unset one")
        if self.signal_weight == 0 and self.shuffle_signal:
            raise ValueError("shuffle_signal permutes the signal, and signal_weight is 0; unset one")
        if self.teacher != "cache":
            raise ValueError(
                f"teacher: {self.teacher} is for the projection; the policy gradient reads the teacher's log-probs of "
                "fixed tokens, which never change: precompute them and use teacher: cache"
            )
        return self

    @property
    def makes_target(self) -> bool:
        """Whether the target is made beside the student, along a signal of the settings' own."""
        return self.form == "projection" and self.teacher != "cache"

    @property
    def reads_cache(self) -> bool:
        """Whether a teacher cache is read."""
        return self.needs_teacher and self.teacher != "live"

    @property
    def needs_teacher(self) -> bool:
        """False only for the sequence-advantage control."""
        return self.form == "projection" or self.signal_weight > 0

    @property
    def advantages_for(self) -> str | None:
        """The setting that learns from the rollouts' advantages, as `advantage_weight 0.5`; None where none does."""
        if self.sign_agreement:
            return "sign_agreement"
        return f"advantage_weight {self.advantage_weight}" if self.advantage_weight > 0 else None
