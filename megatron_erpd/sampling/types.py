"""What every sampling engine takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length"]
Progress = Callable[[int, int], None]
"""Called with (finished, total) as work goes on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of a policy.

    Attributes:
        response_token_ids: int64 `[R]`, R >= 1; the stop token is the last one where there is one.
        log_probs: float32 `[R]`, nats, of those tokens under the distribution that they were drawn from.
        finish_reason: `stop` (a stop token was drawn) or `length` (`max_new_tokens` were drawn without one).
    """

    response_token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: FinishReason


class SamplingEngine(Protocol):
    """Draws responses from one policy.

    Prompts are token ids, so no engine decides how text is encoded. The result for a prompt depends on `seed`, on the
    prompt's index and on the sampling settings, not on the other prompts nor on how many are decoded at once.
    """

    def sample(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 512,
        prompt_indices: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """`num_samples` responses to every prompt, in the order of the prompts.

        Args:
            prompt_token_ids: N prompts of any lengths >= 1.
            num_samples: G >= 1.
            max_new_tokens: the longest response.
            temperature: > 0; logits are divided by it.
            top_p: in (0, 1]; below 1, draws come from the smallest set of most likely tokens that holds this mass,
                and the log-probs are those of that truncated, renormalised distribution. The trainer's own log-probs
                are not truncated, so with `top_p` < 1 the two differ by more than engine noise.
            seed: >= 0.
            batch_size: sequences decoded at once.
            prompt_indices: N numbers that stand for the prompts in the noise; default 0..N-1. Give a prompt's place
                in the whole set when sampling a part of it.
            progress: told the number of finished responses.

        Returns:
            N lists of G `Sample`s.
        """
        ...
