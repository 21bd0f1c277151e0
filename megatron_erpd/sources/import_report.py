"""What an import did, for machines (`as_dict`) and for people (`render`)."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_erpd.objectives.advantages import zero_variance_groups

if TYPE_CHECKING:
    from rich.table import Table


_LISTED = 20
"""Files that are printed by name."""


@dataclass
class ImportReport:
    """The outcome of `import_rollouts`.

    Attributes:
        sources, output, preset: what was read, how, and what was written.
        accepted: rollouts written.
        rejected: reason -> number of rollouts left out (only with on_reject='skip').
        first_rejected: reason -> the first message, with file and row.
        excluded: mark -> number of rollouts left out because the other framework excludes them by it.
        first_excluded: mark -> where it was met first.
        not_read: files of a source folder that were not read.
        unverified: accepted rollouts without a reward.
        encoded_prompts, encoded_responses: made from text, as the source had no token ids.
        assumed_ended: of the encoded responses, those without a finish reason that were given the end token.
        with_behavior_log_probs: accepted rollouts that carry the sampler's log-probs.
        repetitions: accepted rollouts whose tokens are those of an earlier one (two draws may well be alike).
        groups, zero_variance_groups: groups, and those whose scored rewards are all equal, which carry no signal
            under group-normalised advantages.
        group_size, prompt_length, response_length, reward: `min`, `mean`, `max`.
        notes: sentences a user should read.
    """

    sources: list[str]
    output: str
    preset: str
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejected: dict[str, str] = field(default_factory=dict)
    excluded: Counter[str] = field(default_factory=Counter)
    first_excluded: dict[str, str] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)
    unverified: int = 0
    encoded_prompts: int = 0
    encoded_responses: int = 0
    assumed_ended: int = 0
    with_behavior_log_probs: int = 0
    repetitions: int = 0
    groups: int = 0
    zero_variance_groups: int = 0
    group_size: dict[str, float] = field(default_factory=dict)
    prompt_length: dict[str, float] = field(default_factory=dict)
    response_length: dict[str, float] = field(default_factory=dict)
    reward: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def reject(self, reason: str, message: str) -> None:
        """Counts a rollout that is left out."""
        self.rejected[reason] += 1
        self.first_rejected.setdefault(reason, message)

    def exclude(self, mark: str, place: str) -> None:
        """Counts a rollout that the other framework excludes."""
        self.excluded[mark] += 1
        self.first_excluded.setdefault(mark, place)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self) | {"rejected": dict(self.rejected), "excluded": dict(self.excluded)}


def summary(values: np.ndarray) -> dict[str, float]:
    """`min`, `mean`, `max` of the finite values; empty when there are none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {}
    return {"min": float(finite.min()), "mean": float(finite.mean(dtype=np.float64)), "max": float(finite.max())}


def constant_groups(group_ids: np.ndarray, rewards: np.ndarray) -> int:
    """How many groups have scored rewards that are all equal (a group of one included); NaN is unscored."""
    scored = np.isfinite(rewards)
    rewards, group_ids = rewards[scored], group_ids[scored]
    return len(np.unique(group_ids[zero_variance_groups(rewards, group_ids)]))


def render(report: ImportReport) -> "Table":
    """The report as a rich table."""
    from rich.table import Table

    table = Table(title=f"Imported rollouts: {report.output}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def spread(values: dict[str, float]) -> str:
        return " / ".join(f"{values[key]:.4g}" for key in ("min", "mean", "max")) if values else "-"

    table.add_row("accepted", str(report.accepted))
    table.add_row("rejected", str(sum(report.rejected.values())))
    for reason, count in report.rejected.most_common():
        table.add_row(f"  {reason}", f"{count}; first: {report.first_rejected[reason]}")
    if report.excluded:
        table.add_row("excluded by their marks", str(sum(report.excluded.values())))
    for mark, count in report.excluded.most_common():
        table.add_row(f"  {mark}", f"{count}; first: {report.first_excluded[mark]}")
    if report.not_read:
        listed = ", ".join(report.not_read[:_LISTED])
        more = f" and {len(report.not_read) - _LISTED} more (in report.json)" if len(report.not_read) > _LISTED else ""
        table.add_row("not read", listed + more)
    table.add_row("unverified", str(report.unverified))
    table.add_row("with behaviour log-probs", str(report.with_behavior_log_probs))
    table.add_row("encoded from text", f"{report.encoded_prompts} prompts, {report.encoded_responses} responses")
    table.add_row("repetitions", str(report.repetitions))
    table.add_row("groups", f"{report.groups}, {report.zero_variance_groups} of them without reward variance")
    table.add_row("group size (min / mean / max)", spread(report.group_size))
    table.add_row("prompt tokens", spread(report.prompt_length))
    table.add_row("response tokens", spread(report.response_length))
    table.add_row("reward", spread(report.reward))
    for note in report.notes:
        table.add_row("note", note)
    return table
