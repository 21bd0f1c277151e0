"""What all settings are, and how a stage is spread over processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_erpd.errors import RecipeError


class Settings(BaseModel):
    """Base of all settings: an unknown key is an error and so is a number that isn't finite (neither a manifest nor a
    recipe could keep it); a value can't be changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Layout(Settings):
    """How a stage is spread over processes: speed and memory. Only `precision` changes the result, and it counts as a
    setting does."""

    tensor_parallel: int = Field(default=1, ge=1, description="shards of every layer (TP)")
    pipeline_parallel: int = Field(default=1, ge=1, description="stages of layers (PP)")
    context_parallel: int = Field(default=1, ge=1, description="shards of the sequence (CP)")
    data_parallel: int = Field(default=1, ge=1, description="copies of the model (DP)")
    expert_parallel: int = Field(
        default=1,
        ge=1,
        description="groups of a mixture's experts (EP); takes its processes from TP x CP x DP, adds none",
    )
    sequence_parallel: bool = Field(default=False, description="shard activations between layers over TP")
    micro_batch_size: int = Field(default=32, ge=1, description="rollouts in one forward pass of one rank")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="dtype of weights and activations")
    head_chunk_mib: int = Field(
        default=256, ge=1, description="memory of the output layer's logits: they are made in chunks of tokens"
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        default="auto", description="passes over the logits: auto is Triton on GPUs and PyTorch on CPUs"
    )

    async_save: bool = Field(
        default=False,
        description="trainings go on while a process beside each of theirs writes their checkpoints, from a copy in "
        "the host's memory",
    )

    @property
    def num_processes(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel


def refuse_unread(settings: Settings, choice: str, names: tuple[str, ...], read: bool) -> None:
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
