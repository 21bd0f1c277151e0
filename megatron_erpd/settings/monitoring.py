"""Where a training's metrics go besides its own files."""

from __future__ import annotations

import importlib.util
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_erpd.settings.base import Settings, refuse_unread


class Monitoring(Settings):
    """Weights & Biases, beside the JSON lines and TensorBoard files of every training. It changes no result."""

    wandb_project: str | None = Field(default=None, description="project of Weights & Biases; default: none")
    wandb_entity: str | None = Field(default=None, description="user or team of the project; default: the user's own")
    wandb_mode: Literal["online", "offline"] | None = Field(
        default=None, description="offline keeps runs on disk, for `wandb sync`; default: as WANDB_MODE says"
    )
    wandb_dir: str | None = Field(default=None, description="folder of its files; default: wandb/ beside the output")

    @model_validator(mode="after")
    def _has_a_project(self) -> Self:
        refuse_unread(
            self, "wandb_project: none", ("wandb_entity", "wandb_mode", "wandb_dir"), bool(self.wandb_project)
        )
        return self

    @property
    def problem(self) -> str | None:
        """Why it can't be done here, and what to do; None where it can."""
        if self.wandb_project is None or importlib.util.find_spec("wandb") is not None:
            return None
        return "wandb_project: wandb isn't installed; pip install wandb, or leave it out"
