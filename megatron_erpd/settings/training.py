"""Settings of what trains on rewards: the optimizer, replay, and the on-policy baseline."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from megatron_erpd.settings.base import Settings, refuse_unread
from megatron_erpd.settings.learning_rates import chosen_rates
from megatron_erpd.settings.sampling import ChatSettings


class TrainingSettings(Settings):
    """Learning rate, Adam and checkpoints, for every stage that trains."""

    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate; default: by the number of parameters of the base policy, 1e-4 below 10M, 5e-6 "
        "below 400M, else 1e-6",
    )
    min_learning_rate: float | None = Field(
        default=None, ge=0, description="final rate of the cosine; default: constant rate"
    )
    warmup_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="fraction of the steps with a rising learning rate; default: 0.1 where learning_rate is not given, "
        "else 0",
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
        if self.learning_rate is None:
            if self.min_learning_rate:
                raise ValueError(
                    f"min_learning_rate {self.min_learning_rate}: the rate falls to it from learning_rate, whose "
                    "default follows the model's size; give learning_rate too"
                )
        elif self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}; the rate "
                "falls from the one to the other"
            )
        return self

    def with_rates(self, num_parameters: Callable[[], int]) -> Self:
        """The same with numbers for `learning_rate` and `warmup_fraction`; see `learning_rates`."""
        return self.model_copy(update=chosen_rates(self.learning_rate, self.warmup_fraction, num_parameters))


class OptimizerSettings(TrainingSettings):
    """The same, in passes over fixed rollouts."""

    epochs: float = Field(default=8, gt=0, description="passes over the rollouts")
    global_batch_size: int = Field(default=256, ge=1, description="rollouts in one optimizer step")

    def num_batches(self, num_rollouts: int) -> int:
        """Whole batches that hold at least `epochs` passes over so many rollouts."""
        return max(1, math.ceil(self.epochs * num_rollouts / self.global_batch_size))


Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"]
AdvantageKind = Literal["group_norm", "group_mean", "leave_one_out", "raw"]
ReplayLoss = Literal["ppo", "gspo", "cispo", "sapo", "ce", "mse", "sft"]
_PLUG_IN = r"python:(.+\.py):\w+"


class ReplaySettings(OptimizerSettings):
    """Stage 1: off-policy replay on a fixed set of scored rollouts."""

    loss: str = Field(
        default="ce",
        description=f"the replay loss: {', '.join(get_args(ReplayLoss))}, or python:FILE.py:FUNCTION, one of your own",
    )
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

    @field_validator("loss")
    @classmethod
    def _is_a_loss(cls, loss: str) -> str:
        if loss not in get_args(ReplayLoss) and not re.fullmatch(_PLUG_IN, loss):
            raise ValueError(
                f"{loss} is unknown; choose one of {', '.join(get_args(ReplayLoss))}, or write python:FILE.py:FUNCTION"
            )
        return loss

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        loss, choice = self.loss, f"loss: {self.loss}"
        refuse_unread(self, choice, ("clip_low",), loss in ("ppo", "gspo"))
        refuse_unread(self, choice, ("clip_high",), loss in ("ppo", "gspo", "cispo"))
        refuse_unread(self, choice, ("dual_clip",), loss == "ppo")
        refuse_unread(self, choice, ("tau_positive", "tau_negative"), loss == "sapo")
        refuse_unread(self, choice, ("beta", "sequence_log_ratio"), loss in ("ce", "mse"))
        refuse_unread(self, choice, ("sft_threshold",), loss == "sft")
        refuse_unread(self, "kl_coefficient: 0", ("kl_estimator",), self.kl_coefficient > 0)
        refuse_unread(self, f"kl_estimator: {self.kl_estimator}", ("kl_topk",), self.has_exact_kl)
        refuse_unread(self, "importance_correction: none", ("importance_cap",), self.importance_correction != "none")
        return self

    @property
    def loss_file(self) -> Path | None:
        """The program of a `python:FILE.py:FUNCTION` loss; None for those of the package."""
        match = re.fullmatch(_PLUG_IN, self.loss)
        return Path(match[1]) if match else None

    @property
    def has_exact_kl(self) -> bool:
        """Whether the base's top-k rows are read."""
        return self.kl_estimator == "exact"

    @property
    def advantages_for(self) -> str | None:
        """The setting that learns from advantages, as `loss sapo`; None where they are only measured with."""
        return None if self.loss in ("ce", "sft") else f"loss {self.loss}"


class OnPolicySettings(ChatSettings, TrainingSettings):
    """GRPO on policy: each optimizer step is one update on fresh rollouts of the policy as it is (a baseline)."""

    updates: int = Field(default=100, ge=1, description="optimizer steps, each on rollouts of its own")
    prompts_per_update: int = Field(default=16, ge=1, description="prompts in one step")
    num_rollouts: int = Field(default=16, ge=1, description="rollouts per prompt (G)")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response, in tokens")
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature; the update takes the samples for the policy's own at 1"
    )
    batch_size: int = Field(default=512, ge=1, description="sequences decoded at once by a process")
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
