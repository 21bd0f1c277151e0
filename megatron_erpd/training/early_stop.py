"""Ends a training when the policy has gone far enough: a ceiling on its KL to the base, a floor under its entropy.

The rank that decides writes the reason into the stage's folder and sends itself Megatron's exit signal. Megatron
gathers signals over all ranks at the end of every step, saves a checkpoint and leaves its loop, on all ranks alike.
Whoever finds a reason whose iteration is that of the latest checkpoint knows that the training is complete; a signal
from outside leaves no reason.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_erpd.errors import StageError
from megatron_erpd.files import write_json

RECORD = "early_stop.json"


@dataclass(frozen=True)
class Stop:
    """Why a training ended before its last step."""

    iteration: int
    reason: str
    """`max_kl 0.31 > 0.3`; NAME MEASURED > or < BOUND, in nats per token."""

    def __str__(self) -> str:
        return f"{self.reason} at iteration {self.iteration}"


def read_stop(output: Path) -> Stop | None:
    """The reason that a stage's folder holds; it counts only if the latest checkpoint is of its iteration.

    Raises:
        StageError: the file holds no reason.
    """
    path = output / RECORD
    if not path.is_file():
        return None
    try:
        return Stop(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise StageError(f"{path}: not a reason to stop ({error}); delete it and run the stage again") from None


class EarlyStop:
    """Watches the bounds, once per step on the step's global batch (a `Watcher`); on last pipeline stages.

    Args:
        max_kl: ceiling on KL(policy || base), nats per token; None for none.
        min_entropy: floor under the policy's entropy, nats per token; None for none.
        output: the stage's folder.
        iteration: steps done before the first one that is measured.
        decides: whether this rank writes the reason and sends the signal; one rank of the run does.
        exit_signal: what Megatron's handler waits for.
    """

    def __init__(
        self,
        max_kl: float | None,
        min_entropy: float | None,
        output: Path,
        iteration: int,
        decides: bool,
        exit_signal: signal.Signals,
    ) -> None:
        self.max_kl = max_kl
        self.min_entropy = min_entropy
        self.output = output
        self.iteration = iteration
        self.decides = decides
        self.exit_signal = exit_signal
        if decides:  # of a step whose checkpoint a kill prevented; the step comes again
            (output / RECORD).unlink(missing_ok=True)

    def after_step(self, means: Mapping[str, float]) -> None:
        """May end the training, by the step's `entropy` and `policy_base_kl` (which a `max_kl` needs)."""
        self.iteration += 1
        reason = self._crossed(means["entropy"], means.get("policy_base_kl"))
        if reason is not None and self.decides:
            self._stop(reason)

    def _crossed(self, entropy: float, kl: float | None) -> str | None:
        if self.max_kl is not None:
            assert kl is not None, "a ceiling on the KL needs the base policy's log-probs"
            if kl > self.max_kl:
                return f"max_kl {kl:.4g} > {self.max_kl:g}"
        if self.min_entropy is not None and entropy < self.min_entropy:
            return f"min_entropy {entropy:.4g} < {self.min_entropy:g}"
        return None

    def _stop(self, reason: str) -> None:
        write_json(self.output / RECORD, {"iteration": self.iteration, "reason": reason})
        signal.raise_signal(self.exit_signal)
