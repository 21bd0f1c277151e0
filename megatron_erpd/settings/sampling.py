"""Settings of what samples, reads and measures rollouts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_erpd.settings.base import Settings


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
    tensor_parallel: int = Field(
        default=1, ge=1, description="GPUs that hold the policy together, of one node; more than 1 needs engine vllm"
    )

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel}: engine {self.engine} holds the policy on one GPU; take "
                "engine vllm, or 1"
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
