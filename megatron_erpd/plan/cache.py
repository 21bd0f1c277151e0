"""Size and data rates of a run's teacher cache and of its alternatives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.teacher_cache.sizes import CacheSize, cache_size


@dataclass(frozen=True)
class CacheOption:
    """One way to keep the cache.

    Attributes:
        name: as `topk float16`.
        chosen: whether the recipe asks for it.
        bytes_per_token: of all tables, per response token.
        read_per_token: of what stage 2 reads.
        total_bytes: the whole data set; None where its size isn't known.
        read_bytes: what stage 2 reads in one epoch.
        written_per_second, read_per_second: bytes, at the speed of the forward passes and of the training.
    """

    name: str
    chosen: bool
    bytes_per_token: int
    read_per_token: int
    total_bytes: int | None
    read_bytes: int | None
    written_per_second: float
    read_per_second: float | None


@dataclass(frozen=True)
class Speed:
    """Response tokens per second.

    Attributes:
        forward: of the stage that makes the cache: all of its policies, one after another.
        training: of the stage that reads it; None where none does.
    """

    forward: float
    training: float | None


def forward_flop(parameters: int, num_policies: int = 1) -> int:
    """Floating-point operations per token of the forward passes: a multiplication and an addition per parameter."""
    return 2 * parameters * num_policies


def training_flop(parameters: int, num_frozen: int = 0) -> int:
    """The same of a training step: forward, and twice that backward; and the frozen policies beside it, forward."""
    return 6 * parameters + forward_flop(parameters, num_frozen)


def cache_options(
    policies: Collection[str],
    settings: PrecomputeSettings,
    vocab_size: int,
    hidden_size: int,
    counts: tuple[int, int] | None,
    speed: Speed,
    reads_hidden: bool = False,
) -> list[CacheOption]:
    """The recipe's cache and its alternatives, side by side.

    Args:
        policies: whose log-probs the cache holds.
        counts: rollouts and response tokens, where they are known.
        reads_hidden: stage 2 makes its target of the hidden states, if they are kept.

    Returns:
        `token`, `topk float16`, `topk float32`, and the recipe's (else the first) target with hidden states.
    """
    topk_dtype: str = settings.topk_dtype
    keeps_hidden = settings.keep_hidden
    asked = (settings.kind, topk_dtype, keeps_hidden)
    float16, float32 = ("topk", "float16", False), ("topk", "float32", False)
    hidden = asked if keeps_hidden else ("topk", topk_dtype, True)
    options = []
    for kind, dtype, keep_hidden in [("token", topk_dtype, False), float16, float32, hidden]:
        size = cache_size(
            policies,
            kind,
            vocab_size=vocab_size,
            k=settings.k,
            topk_dtype=dtype,
            keep_hidden=keep_hidden,
            hidden_size=hidden_size,
        )
        read = _read_by_stage_2(size, "hidden." if keep_hidden and reads_hidden else _TABLES[kind])
        name = "token" if kind == "token" else f"topk {dtype}"
        options.append(
            CacheOption(
                name=name + " + hidden states" * keep_hidden,
                chosen=asked == (kind, dtype, keep_hidden) if kind == "topk" else asked[::2] == (kind, keep_hidden),
                bytes_per_token=size.bytes_per_token,
                read_per_token=read.bytes_per_token,
                total_bytes=size.total(*counts) if counts else None,
                read_bytes=read.total(*counts) if counts else None,
                written_per_second=size.bytes_per_token * speed.forward,
                read_per_second=None if speed.training is None else read.bytes_per_token * speed.training,
            )
        )
    return options


_TABLES = {"topk": "topk", "token": "log_probs."}


def _read_by_stage_2(size: CacheSize, prefix: str) -> CacheSize:
    """The tables that a training opens: the target, the log-probs that a signal is made of, or the hidden states."""
    tables = [name for name in size.token_bytes if name.startswith(prefix)]
    return CacheSize({t: size.token_bytes[t] for t in tables}, {t: size.row_bytes[t] for t in tables})


def recommendation(form: str | None, options: list[CacheOption], needed: int | None, free: int) -> str:
    """Which kind to keep, in a sentence.

    Args:
        form: of the stage that reads it: `projection`, `policy_gradient`, or None where none does.
        needed: bytes of everything else that the run is still to write; None where that isn't known.
        free: of the file system, in bytes.
    """
    if form is None:
        return "No stage of this recipe reads a teacher cache, so none is made."
    if form == "policy_gradient":
        return "token: a policy gradient reads the log-probs of the response tokens and nothing else."
    hidden = options[-1]
    first = "topk float16: the smallest target that the projection can read"
    if hidden.total_bytes is None or needed is None:
        return f"{first}; add keep_hidden to try several deltas or signals, once the size of the data is known to fit."
    if hidden.total_bytes + needed <= free:
        return f"{first}; to try several deltas or signals add keep_hidden, which would fit the free disk too."
    return f"{first}; keep_hidden, for trying several deltas or signals, would not fit the free disk."
