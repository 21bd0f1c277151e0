"""The records that losses take and return, and the names of their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from megatron_erpd.errors import ErpdError

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"]
"""How per-token losses become one number (see `per_token.aggregate`)."""

SequenceAggregation = Literal["sum", "mean"]
"""How the token log-ratios of a response become one sequence log-ratio."""

KlEstimator = Literal["k1", "k2", "k3"]
CorrectionLevel = Literal["token", "sequence"]
DivergenceKind = Literal["forward_kl", "reverse_kl", "js"]

Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count), both detached scalars. The mean is taken once, after both were summed over all ranks."""


class LossOutput(NamedTuple):
    """A loss before its one, global division.

    Attributes:
        loss_sum: scalar, differentiable: the numerator over this micro-batch.
        count: scalar int64: the denominator over this micro-batch (tokens or sequences, as the loss says).
            Both are summed over micro-batches and data-parallel ranks before they are divided.
        metrics: name -> (sum, count), detached; reduced in the same way.
        loss_mask: [b, s] bool, the tokens that `count` counts where they are fewer than the inputs' (`sft`), else None.
            A penalty that is divided by `count` has to be summed over the same tokens.
    """

    loss_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody calls on a loss
    metrics: Metrics
    loss_mask: Tensor | None = None


@dataclass(frozen=True)
class ReplayInputs:
    """What a replay loss sees of a micro-batch of `b` rollouts on a label-aligned grid of `s` positions.

    Position t predicts label t. Values where `loss_mask` is 0 are never used: they may be anything, also NaN.

    Attributes:
        policy_log_probs: [b, s] nats, log pi_theta(y_t | y_<t). The only field through which gradients flow.
        old_log_probs: [b, s] nats, log pi_old(y_t | y_<t): the trainer's own log-probs of the round's base policy.
        loss_mask: [b, s], 1 (> 0) where the label is a response token, else 0. Binary: weights are not supported.
        advantages: [b] one per sequence, or [b, s] one per token.
        rewards: [b] verifier outcomes; NaN for an unverified rollout.
        importance_weights: [b, s] or None: constant factors on the token losses that correct for data sampled
            from mu instead of pi_old (see `importance_correction`).
    """

    policy_log_probs: Tensor
    old_log_probs: Tensor
    loss_mask: Tensor
    advantages: Tensor
    rewards: Tensor
    importance_weights: Tensor | None = None

    def __post_init__(self) -> None:
        grid = tuple(self.policy_log_probs.shape)
        if len(grid) != 2:
            raise ErpdError(f"policy_log_probs must have the shape [b, s], not {list(grid)}")
        rows = grid[:1]
        self._check("old_log_probs", self.old_log_probs, grid)
        self._check("loss_mask", self.loss_mask, grid)
        self._check("advantages", self.advantages, rows, grid)
        self._check("rewards", self.rewards, rows)
        if self.importance_weights is not None:
            self._check("importance_weights", self.importance_weights, grid)

    @staticmethod
    def _check(name: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
        if tuple(value.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ErpdError(f"{name} must have the shape {expected} to match policy_log_probs, not {list(value.shape)}")
