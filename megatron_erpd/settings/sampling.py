"""Settings of what samples, reads and measures rollouts."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_erpd.settings.base import Settings


def _iso_date(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        raise ValueError(f"{text!r} is no date; write it as 2026-11-29")
    date.fromisoformat(text)
    return text


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; values are those of JSON, and a date is text in quotes") from None
    return values


class TemplateSettings(Settings):
    """What the tokenizer's chat template is given besides the messages."""

    # Left out where they aren't given: artifacts that were made before there were such settings are the same.
    system_prompt: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description="a system message before those of every prompt",
    )
    template_arguments: Annotated[dict[str, Any], AfterValidator(_json_values)] = Field(
        default={},
        exclude_if=lambda value: not value,
        description="values that the chat template reads, as {enable_thinking: false}; JSON",
    )
    template_date: Annotated[
        str | None,
        BeforeValidator(lambda value: value.isoformat() if type(value) is date else value),  # as YAML reads it
        AfterValidator(lambda value: value if value is None else _iso_date(value)),
    ] = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="the date that a chat template with a clock shows, as 2026-11-29; such a template needs one",
    )

    @property
    def given(self) -> list[str]:
        """The names of those that are given."""
        return [name for name in TemplateSettings.model_fields if getattr(self, name) not in (None, {})]


class ChatSettings(TemplateSettings):
    """Whether and how prompts go through the chat template."""

    chat_template: bool = Field(default=False, description="wrap the prompt in the tokenizer's chat template")

    @model_validator(mode="after")
    def _template_is_used(self) -> Self:
        if self.given and not self.chat_template:
            raise ValueError(f"{self.given[0]} has no effect without chat_template; set that to true, or remove it")
        return self


class SampleSettings(ChatSettings):
    """Sampling rollouts from a policy and scoring them."""

    num_rollouts: int = Field(default=16, ge=1, description="rollouts per prompt (G)")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response, in tokens")
    batch_size: int = Field(default=512, ge=1, description="sequences decoded at once")
    seed: int = Field(default=1, ge=0, description="seed of the sampler")
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


class ImportSettings(TemplateSettings):
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


class HeldOutSettings(ChatSettings):
    """Sampling on held-out prompts."""

    num_prompts: int = Field(default=256, ge=1, description="held-out prompts used")
    num_samples: int = Field(default=4, ge=1, description="samples per prompt at temperature 1")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response, in tokens")
    batch_size: int = Field(default=512, ge=1, description="sequences at once")
    seed: int = Field(default=7, ge=0, description="seed of the sampler")


class EvaluateSettings(HeldOutSettings):
    """What is measured on held-out prompts."""

    num_rollouts: int = Field(default=512, ge=1, description="rows of the fixed data on which the exact KL is computed")


class SelectSettings(HeldOutSettings):
    """Which of the teacher's kept checkpoints becomes the teacher."""

    num_prompts: int = Field(default=256, ge=2, description="validation prompts used")
    by: Literal["best_reward", "last"] = Field(
        default="best_reward", description="the checkpoint with the highest mean reward of its samples, or the last one"
    )
