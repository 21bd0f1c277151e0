"""What a set of rollouts holds that a training will learn little from, in sentences for people."""

from __future__ import annotations

import numpy as np

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.objectives.advantages import zero_variance_groups

MANY = 0.5
"""Of the rollouts or groups: from this share on it is worth a warning."""


def rollout_warnings(rollouts: Rollouts) -> list[str]:
    """All that is worth a warning; empty where all is well."""
    return [*scoring_warnings(rollouts), *length_warnings(rollouts)]


def scoring_warnings(rollouts: Rollouts) -> list[str]:
    """Unverified rollouts, rewards that are all equal, groups without variance."""
    total, rewards = len(rollouts), rollouts.rewards
    scored = ~np.isnan(rewards)
    found = []
    if not scored.any():
        found.append(f"all {total} rollouts are unverified: no training can learn from them; check the verifier")
    elif np.mean(~scored) >= MANY:
        found.append(f"{(~scored).sum()} of {total} rollouts are unverified and are not trained on; check the verifier")
    if scored.any():
        found += reward_warnings(rewards[scored], rollouts.group_ids[scored])
    return found


def length_warnings(rollouts: Rollouts) -> list[str]:
    """Responses that were cut off."""
    total, cut = len(rollouts), rollouts.finish_reasons.count("length")
    which = "all" if cut == total else f"{cut} of"
    text = f"{which} {total} responses were cut off before their end; raise max_new_tokens"
    return [text] if cut >= MANY * total else []


def reward_warnings(rewards: np.ndarray, group_ids: np.ndarray) -> list[str]:
    """The same of scored rewards `[N]` and their groups."""
    if len(rewards) > 1 and (rewards == rewards[0]).all():
        return [
            f"all {len(rewards)} rewards are {rewards[0]:g}: they tell no rollout from another; check the verifier, or "
            "take prompts that are solved now and then"
        ]
    _, first, sizes = np.unique(group_ids, return_index=True, return_counts=True)
    constant = zero_variance_groups(rewards, group_ids)[first]
    return groups_warning(len(sizes), int(constant.sum()), int((sizes == 1).sum()))


def groups_warning(groups: int, without_signal: int, single: int) -> list[str]:
    """Of so many groups, how many have equal rewards, and how many of these hold one scored rollout."""
    if without_signal < MANY * groups:
        return []
    if single == groups:
        why = "they hold one scored rollout each; sample more per prompt, or use advantage raw"
    else:
        why = "their rewards are all equal; take prompts that are solved now and then, or more rollouts of each"
    which = "all" if without_signal == groups else f"{without_signal} of"
    return [f"{which} {groups} groups teach nothing where rewards are compared within a group: {why}"]
