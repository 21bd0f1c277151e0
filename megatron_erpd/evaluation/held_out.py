"""Whether prompts are held out: none of them may be among those that were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_erpd.data.rollout_warnings import MANY
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.evaluation.metrics import PolicyMetrics
from megatron_erpd.sampling.prompts import PromptRecord, prompt_text


def prompt_warnings(
    records: Sequence[PromptRecord],
    token_ids: Sequence[Sequence[int]],
    rollouts: Rollouts | None,
    asked: int | None,
    place: str,
) -> list[str]:
    """What is wrong with the prompts of a measurement.

    Args:
        records, token_ids: the prompts, and as the policy sees them.
        rollouts: what was trained on; None where that isn't known.
        asked: how many prompts were asked for; None for as many as there are.
        place: the recipe's section of the prompts, for messages.
    """
    found = too_few(asked, len(records), f"{place}.num_prompts")
    shared = 0 if rollouts is None else num_shared(records, token_ids, rollouts)
    if shared:
        found.append(
            f"{shared} of {len(records)} held-out prompts are among those of the rollouts: what was trained on is no "
            f"measure; give {place}.prompts that the training has not seen"
        )
    return found


def too_few(asked: int | None, there: int, setting: str) -> list[str]:
    """A warning where fewer prompts are there than were asked for."""
    if asked is None or asked <= there:
        return []
    return [f"{setting} is {asked}, and there are {there} prompts: these are all that is used"]


def num_shared(records: Sequence[PromptRecord], token_ids: Sequence[Sequence[int]], rollouts: Rollouts) -> int:
    """How many of the prompts are the prompt of a rollout, by their tokens or by their text (whose template may be
    another one)."""
    tokens, texts = set(), set()
    for i in _one_of_each_group(rollouts):
        tokens.add(tuple(rollouts.prompt_tokens(i).tolist()))
        if text := rollouts.prompt_text(i):
            texts.add(text.strip())
    both = zip(records, token_ids, strict=True)
    return sum(tuple(ids) in tokens or prompt_text(record).strip() in texts for record, ids in both)


def _one_of_each_group(rollouts: Rollouts) -> list[int]:
    """A group's rollouts share their prompt."""
    first: dict[int, int] = {}
    for i, group in enumerate(rollouts.group_ids.tolist()):
        first.setdefault(group, i)
    return list(first.values())


def metrics_warnings(metrics: Mapping[str, PolicyMetrics]) -> list[str]:
    """What the figures of a measurement themselves say against it."""
    found = []
    unverified = _from_half(metrics, "unverified")
    if unverified:
        found.append(f"responses without a verdict, which no accuracy counts: {unverified}; check the verifier")
    cut = _from_half(metrics, "truncated")
    if cut:
        found.append(f"responses that were cut off before their end: {cut}; raise evaluation.max_new_tokens")
    return found


def _from_half(metrics: Mapping[str, PolicyMetrics], figure: str) -> str:
    """The policies of which a share is so large, as `base 100%, student 62%`."""
    shares = {name: getattr(policy, figure) for name, policy in metrics.items()}
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= MANY)
