"""What all settings are, and how a stage is spread over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_erpd.errors import RecipeError


class Settings(BaseModel):
    """Base of all settings: an unknown key is an error and so is a number that isn't finite (neither a manifest nor a
    recipe could keep it); a value can't be changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


DEFAULT_MICRO_BATCH_SIZE = 32


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
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="rollouts in one forward pass of one rank, padded to the longest of them; default: 32, on a GPU "
        "micro_batch_tokens",
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens in one forward pass of one rank, in place of micro_batch_size: rollouts are packed one "
        "after another, without padding between them; default: on a GPU, what its memory is planned to hold",
    )
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

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} counts rollouts, micro_batch_tokens "
                f"{self.micro_batch_tokens} counts tokens; give one of them"
            )
        return self

    @property
    def num_processes(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def rows(self) -> int:
        """Rollouts of a micro-batch, as Megatron counts them: of packs, which hold any number, 1."""
        return (self.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE) if self.micro_batch_tokens is None else 1

    @property
    def batch_unit(self) -> int:
        """What a global batch is a multiple of."""
        return self.rows * self.data_parallel

    @property
    def batch_unit_words(self) -> str:
        """The same, as a message has it."""
        if self.micro_batch_tokens is not None:
            return f"data_parallel {self.data_parallel}"
        return f"micro_batch_size {self.rows} x data_parallel {self.data_parallel} = {self.batch_unit}"

    @property
    def pack_tokens(self) -> int | None:
        """Tokens that a pack may hold before context parallelism splits it; None for padded micro-batches."""
        return None if self.micro_batch_tokens is None else self.micro_batch_tokens * self.context_parallel

    def changed(self, given: Mapping[str, Any]) -> Self:
        """The same with these fields over its own."""
        return self.model_copy(update=over_layout(given))


def over_layout(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are put over those of another layout: of `micro_batch_size` and `micro_batch_tokens`, what is given
    takes the place of the other."""
    other = {"micro_batch_size": "micro_batch_tokens", "micro_batch_tokens": "micro_batch_size"}
    return {**{other[name]: None for name in given if name in other and given[name] is not None}, **given}


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
