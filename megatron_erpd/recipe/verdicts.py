"""What a run does with each of its stages, and why: the one answer of `run`, `submit`, `status` and `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_erpd.errors import ErpdError
from megatron_erpd.manifest import MANIFEST, differences, read_manifest, read_request
from megatron_erpd.recipe.artifacts import Artifacts
from megatron_erpd.recipe.stages import Stage, dependencies
from megatron_erpd.sampling.inputs import reading
from megatron_erpd.sources.names import is_there

Word = Literal["done", "undecided", "again", "resumed", "new", "blocked"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a stage.

    done: its artifact is the one asked for. undecided: there is one, and it is kept if inputs that are still to be made
    come out the same. again: there is one of other settings or inputs, or a damaged one, or the beginning of one; it is
    put aside. resumed: an interrupted one goes on. new: there is none. blocked: an input of
    the user's is missing.
    """

    word: Word
    because: list[str] = field(default_factory=list)
    folder: Path | None = None
    """Where the artifact lies that is done: in the stage's folder, or in `replaced/`, from where it comes back."""
    is_other: bool = False
    """Whether what the stage leaves will surely not be what those that read it were made from."""

    @property
    def is_done(self) -> bool:
        return self.word == "done"

    def describe(self) -> str:
        """`again, because epochs: 1.0 -> 2.0`; `undecided, kept if its input rewards comes out the same`."""
        return f"{self.word}, {self.why}" if self.because else self.word

    @property
    def why(self) -> str:
        """The reasons in a line."""
        reasons = "; ".join(self.because)
        return reasons if self.word == "undecided" else f"because {reasons}"


def judge_all(stages: Sequence[Stage], artifacts: Artifacts) -> dict[str, Verdict]:
    """The verdicts on all stages by their names, each after those that it depends on."""
    found: dict[str, Verdict] = {}
    for stage in stages:
        before = {name: found[name] for name in dependencies(stage, list(stages))}
        found[stage.name] = judge(stage, artifacts, before)
    return found


def judge(stage: Stage, artifacts: Artifacts, before: Mapping[str, Verdict]) -> Verdict:
    """The verdict on a stage.

    A stage that reads what will be made anew is `again` when that has other settings or inputs than before. When it may
    come out the same, to the bit (rewards of an edited verifier, an artifact that was lost), a run keeps the stage in
    that case, and it is `undecided`.

    Args:
        before: the verdicts on the stages that it depends on.
    """
    pending = [name for name, verdict in before.items() if not verdict.is_done]
    if not _has_begun(stage.output):
        missing = [path for path in stage.inputs.values() if not is_there(path)]
        if missing and not pending:
            return Verdict("blocked", [f"{path}: no such file or folder; check the path" for path in missing])
        return (None if pending else _coming_back(stage, artifacts)) or Verdict("new")
    if pending:
        differs = _other_settings(stage)
        sure = differs or any(before[name].is_other or before[name].word == "blocked" for name in pending)
        if sure or not _could_be_kept(stage):
            because = [*differs, *_pending(pending, before)]
            return Verdict("again", because, is_other=bool(sure) and stage.command not in _MAY_BE_SAME)
        return Verdict(
            "undecided", [f"kept if {_inputs(pending)} {'comes' if len(pending) == 1 else 'come'} out the same"]
        )
    try:
        found = artifacts.assess(stage)
    except ErpdError as error:  # an input of the user's own is gone
        return Verdict("blocked", [str(error)])
    if found.found == "complete":
        return Verdict("done", ["settings, inputs and files are those that its manifest records"], stage.output)
    if found.found in ("other", "damaged"):
        is_other = found.found == "other" and stage.command not in _MAY_BE_SAME
        return _coming_back(stage, artifacts) or Verdict("again", found.reasons, is_other=is_other)
    if not stage.is_tool:
        return Verdict("again", ["it did not end, and starts over"])
    return Verdict("resumed", ["it did not end, and resumes from what is there"])


def _coming_back(stage: Stage, artifacts: Artifacts) -> Verdict | None:
    """The verdict on a stage whose artifact, or its beginning, was replaced earlier and is asked for again."""
    try:
        folder = artifacts.comes_back(stage)
    except ErpdError:  # an input of the user's own can't be read
        return None
    if folder is None:
        return None
    artifacts.expect(stage, folder)
    if (folder / MANIFEST).is_file():
        return Verdict("done", [f"the one asked for is kept in {folder} and comes back"], folder)
    return Verdict("resumed", [f"its beginning is kept in {folder} and comes back"])


_MAY_BE_SAME = ("prepare", "score")
"""Commands that often leave the same when something about them changed: a program was edited, to no effect."""
_WILL: Mapping[Word, str] = {
    "blocked": "can't be made",
    "again": "will be made anew",
    "new": "will be made",
    "resumed": "is not finished",
    "undecided": "may be made anew",
}
_NAMED = 3


def _pending(names: Sequence[str], before: Mapping[str, Verdict]) -> list[str]:
    """`its input teacher will be made anew`, a line for each of the words."""
    lines = []
    for word, will in _WILL.items():
        found = [name for name in names if before[name].word == word]
        if found:
            lines.append(f"{_inputs(found)} {will if len(found) == 1 else will.replace('is ', 'are ')}")
    return lines


def _inputs(names: Sequence[str]) -> str:
    """`its input teacher`, `its inputs teacher, cache, student and 5 more`."""
    if len(names) == 1:
        return f"its input {names[0]}"
    shown = names if len(names) <= _NAMED + 1 else [*names[:_NAMED], f"{len(names) - _NAMED} more"]
    return f"its inputs {', '.join(shown[:-1])} and {shown[-1]}"


def _could_be_kept(stage: Stage) -> bool:
    """Whether a stage's folder holds an artifact that is not made from other inputs by their names."""
    try:
        made = read_manifest(stage.output) if (stage.output / MANIFEST).is_file() else None
    except ErpdError:
        return False
    if made is None:
        return False
    # Rewards that are the rollouts' own are no input.
    return all(name in made.inputs or reading(stage.command, name) == "rewards" for name in stage.inputs)


def _has_begun(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _other_settings(stage: Stage) -> list[str]:
    """What differs from the settings that a folder's artifact was made or begun with, whatever its inputs."""
    try:
        has_ended = (stage.output / MANIFEST).is_file()
        made = read_manifest(stage.output) if has_ended else read_request(stage.output)
    except ErpdError as error:
        return [str(error)]
    if made is None:
        return []
    try:
        settings = stage.request.recorded.identity
    except ErpdError:  # what follows the size of a base that is to be made is not known yet
        settings = {key: made.settings.get(key) if value is None else value for key, value in stage.identity.items()}
    return differences(made, stage.command, settings, made.inputs)
