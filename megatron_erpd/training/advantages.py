"""Advantages of the rollouts being trained on; data that gives a training nothing to learn from is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import RolloutError
from megatron_erpd.objectives.advantages import compute_advantages, zero_variance_groups
from megatron_erpd.settings import AdvantageKind, DistillSettings, ReplaySettings


@dataclass(frozen=True)
class Advantages:
    """Advantages of N scored rollouts, and how many of their groups have any.

    Attributes:
        values: float32 `[N]`.
        groups: groups among the rollouts.
        without_signal: those whose rewards are all equal; the advantages that compare within a group are 0 there.
        single: those of these with one rollout.
    """

    values: np.ndarray
    groups: int
    without_signal: int
    single: int

    def figures(self) -> dict[str, int]:
        """For the manifest's summary."""
        return {"groups": self.groups, "groups_without_signal": self.without_signal, "groups_of_one": self.single}

    def describe(self) -> str:
        """A line for people."""
        return (
            f"{self.without_signal} of {self.groups} groups carry no signal: their rewards are all equal "
            f"({self.single} of them hold one scored rollout)"
        )


def advantages_of(rollouts: Rollouts, settings: ReplaySettings | DistillSettings, path: Path) -> Advantages:
    """The advantages that the settings ask for.

    Args:
        rollouts: all scored; a group's unscored rollouts are left out.
        path: where they come from, for messages.

    Raises:
        RolloutError: all advantages are 0 and the training learns from them; says why they are, and names the flags.
    """
    kind = settings.advantage
    values = np.asarray(compute_advantages(rollouts.rewards, rollouts.group_ids, kind), dtype=np.float32)
    _, first, sizes = np.unique(rollouts.group_ids, return_index=True, return_counts=True)
    constant = zero_variance_groups(rollouts.rewards, rollouts.group_ids)[first]
    found = Advantages(values, len(sizes), int(constant.sum()), int((sizes == 1).sum()))
    if settings.advantages_for is not None and not values.any():
        raise RolloutError(
            f"{path}: {_why_zero(kind, found)}; so --advantage {kind} is 0 for every rollout, and "
            f"{_as_flag(settings.advantages_for)} has nothing to learn from: {_remedy(kind, found)}"
        )
    return found


def _why_zero(kind: AdvantageKind, found: Advantages) -> str:
    if kind == "raw":
        return "all rewards are 0"
    if found.single == found.groups:
        return f"each of the {found.groups} groups holds one scored rollout (group_id)"
    return f"in none of the {found.groups} groups do the rewards differ"


def _remedy(kind: AdvantageKind, found: Advantages) -> str:
    if kind == "raw":
        return "check the verifier, or take prompts that are solved now and then"
    if found.single == found.groups:
        return "sample more rollouts per prompt, or use --advantage raw"
    return "take prompts that are solved now and then, or more rollouts of each"


def _as_flag(setting: str) -> str:
    """`advantage_weight 0.5` as it stands on a command line."""
    name, _, value = setting.partition(" ")
    return f"--{name.replace('_', '-')} {value}".rstrip()
