"""Who scored the rollouts of a part file, and asking a verifier for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.sampling.prompts import PromptRecord, prompts_digest
from megatron_erpd.sampling.task import verifier_file, verifier_identity
from megatron_erpd.sampling.verifiers import Verifier

VERIFIER_ERROR = "verifier_error"
"""In the metadata of a rollout on which the verifier failed: with what."""
_SCORED_BY, _ANSWERS = "scored_by", "answers"


class Scorer:
    """A verifier that is started when it is first asked, and what it says of the part files that it scores.

    Args:
        spec: as in `Verifier`.

    Attributes:
        num_asked: responses that it was asked about.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.num_asked = 0
        self._identity = verifier_identity(spec)

    @property
    def name(self) -> str:
        """The spec, a file's without its folder."""
        file = verifier_file(self.spec)
        return self.spec if file is None else f"python:{file.name}:{self.spec.rpartition(':')[2]}"

    @cached_property
    def verifier(self) -> Verifier:
        """Its process. Raises `RecipeError` where the spec names nothing that can be loaded."""
        return Verifier(self.spec)

    @property
    def has_always_failed(self) -> bool:
        return 0 < self.num_asked == self.verifier.num_errors

    def __call__(self, record: PromptRecord, response: str) -> tuple[float | None, str | None]:
        """The reward, None where there is none, and the error, where the verifier failed."""
        self.num_asked += 1
        reward = self.verifier(record, response)
        return reward, self.verifier.last_error

    def file_metadata(self, records: Sequence[PromptRecord]) -> dict[str, str]:
        """What a part file of the rollouts of `records` says of its rewards."""
        return {_SCORED_BY: self._identity, _ANSWERS: prompts_digest(records)}

    def has_scored(self, part: Rollouts, records: Sequence[PromptRecord]) -> bool:
        """Whether the rewards of a part file are this verifier's for these records, and it didn't fail on all."""
        said = part.file_metadata
        if any(said.get(name) != value for name, value in self.file_metadata(records).items()):
            return False
        return any(error is None for error in errors_of(part))


def errors_of(rollouts: Rollouts) -> list[str | None]:
    """With what the verifier failed on each rollout, None where it did not."""
    status = rollouts.reward_status
    found = [None if s == "scored" else rollouts.metadata(i).get(VERIFIER_ERROR) for i, s in enumerate(status)]
    return [None if error is None else str(error) for error in found]
