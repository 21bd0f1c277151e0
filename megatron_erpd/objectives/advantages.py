"""From the rewards of a group of rollouts to their advantages."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError, RecipeError

AdvantageKind = Literal["group_norm", "group_mean", "leave_one_out", "raw"]
ADVANTAGE_KINDS: tuple[AdvantageKind, ...] = ("group_norm", "group_mean", "leave_one_out", "raw")


def compute_advantages[Array: (np.ndarray, Tensor)](
    rewards: Array, group_ids: Array, kind: AdvantageKind, eps: float = 1e-6
) -> Array:
    """Advantages of N rollouts that are grouped by prompt.

    | kind            | A_ij                                                            |
    |-----------------|-----------------------------------------------------------------|
    | `group_norm`    | (r_ij - mean_i) / (std_i + eps)  (GRPO, arXiv 2402.03300)       |
    | `group_mean`    | r_ij - mean_i                    (Dr. GRPO, arXiv 2503.20783)   |
    | `leave_one_out` | r_ij - mean of the group's other rewards  (RLOO, arXiv 2402.14740) |
    | `raw`           | r_ij                                                            |

    std is the population's (divided by the group's size: this project's choice, finite for a group of one). Unverified
    rollouts (reward NaN) enter no mean or std and get the advantage NaN under every kind: leave them out of training. A
    group whose verified rewards are all equal has advantages of exactly 0 under the first three kinds.

    Args:
        rewards: [N] float; NaN for unverified.
        group_ids: [N] integers in any order; groups may have any size.
        kind: one of `ADVANTAGE_KINDS`.
        eps: in units of the reward, for `group_norm` only.

    Returns:
        [N], of the container and floating dtype of `rewards`. Computed in float64.

    Raises:
        RecipeError: unknown kind.
        ErpdError: shapes that differ.
    """
    if kind not in ADVANTAGE_KINDS:
        raise RecipeError(f"advantage kind {kind!r} is unknown; use one of {', '.join(ADVANTAGE_KINDS)}")
    values, groups = _as_numpy(rewards, group_ids)
    advantages = values.copy() if kind == "raw" else _grouped(values, groups, kind, eps)
    return _like(advantages, rewards)


def zero_variance_groups[Array: (np.ndarray, Tensor)](rewards: Array, group_ids: Array) -> Array:
    """Which rollouts belong to a group without signal: its verified rewards are all equal, or it has none.

    Args:
        rewards: [N] float; NaN for unverified.
        group_ids: [N] integers.

    Returns:
        [N] bool, of the container of `rewards`: the same for all rows of a group, unverified ones too.
    """
    values, groups = _as_numpy(rewards, group_ids)
    constant = _Groups(values, groups).constant
    return torch.from_numpy(constant).to(rewards.device) if isinstance(rewards, Tensor) else constant


class _Groups:
    """Per-row statistics of the verified rewards of the row's group, all [N]."""

    def __init__(self, values: np.ndarray, groups: np.ndarray) -> None:
        _, self.index = np.unique(groups, return_inverse=True)
        self.num_groups = int(self.index.max()) + 1 if len(groups) else 0
        self.verified = ~np.isnan(values)
        self.values = np.where(self.verified, values, 0.0)
        self.size = self.per_row_sum(self.verified.astype(np.float64))
        self.sum = self.per_row_sum(self.values)
        self.constant = self._constant()

    def per_row_sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.index, weights=values, minlength=self.num_groups)[self.index]

    def _constant(self) -> np.ndarray:
        """Compared, not subtracted: a mean of equal rewards can differ from them by rounding."""
        low = np.full(self.num_groups, np.inf)
        high = np.full(self.num_groups, -np.inf)
        np.minimum.at(low, self.index[self.verified], self.values[self.verified])
        np.maximum.at(high, self.index[self.verified], self.values[self.verified])
        return (low >= high)[self.index]


def _grouped(values: np.ndarray, groups: np.ndarray, kind: AdvantageKind, eps: float) -> np.ndarray:
    stats = _Groups(values, groups)
    centred = stats.values - stats.sum / np.maximum(stats.size, 1)
    if kind == "group_norm":
        squares = stats.per_row_sum(np.where(stats.verified, centred**2, 0.0))
        std = np.sqrt(squares / np.maximum(stats.size, 1))
        # Constant groups are set to 0 below; here they would be 0 / 0 when eps is 0.
        centred = centred / np.where(stats.constant, 1.0, std + eps)
    elif kind == "leave_one_out":
        # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1); a group of one is constant and set to 0 below.
        centred = centred * stats.size / np.maximum(stats.size - 1, 1)
    advantages = np.where(stats.constant, 0.0, centred)
    return np.where(stats.verified, advantages, np.nan)


def _as_numpy(rewards: np.ndarray | Tensor, group_ids: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    values, groups = (
        item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item) for item in (rewards, group_ids)
    )
    if values.ndim != 1 or values.shape != groups.shape:
        raise ErpdError(f"rewards and group_ids must both be [N], not {list(values.shape)} and {list(groups.shape)}")
    return values.astype(np.float64), groups


def _like[Array: (np.ndarray, Tensor)](values: np.ndarray, rewards: Array) -> Array:
    """`values` in the container of `rewards`, with its dtype if that is floating, else in 32 bits."""
    if isinstance(rewards, Tensor):
        dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
        return torch.from_numpy(values).to(device=rewards.device, dtype=dtype)
    floating = np.issubdtype(np.asarray(rewards).dtype, np.floating)
    return values.astype(np.asarray(rewards).dtype if floating else np.float32)
