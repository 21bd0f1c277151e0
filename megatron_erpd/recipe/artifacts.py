"""What a stage's output folder holds, and how a folder that holds something else is put out of the way."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import (
    MANIFEST,
    METRICS,
    REQUEST,
    Manifest,
    begin_artifact,
    differences,
    former_digests,
    read_manifest,
    read_request,
    verify_manifest,
)
from megatron_erpd.recipe.replaced import KEPT, is_artifact, kept, replaced_folder
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.sampling.inputs import Reading, read_digest, reading

Found = Literal["complete", "interrupted", "other", "damaged", "absent"]


@dataclass(frozen=True)
class Assessment:
    """What was found where a stage's artifact should be.

    complete: the artifact asked for. interrupted: its beginning, to go on with. other: an artifact (or the beginning of
    one) with other settings or inputs. damaged: its files are not those of its manifest. absent: nothing.
    """

    found: Found
    reasons: list[str] = field(default_factory=list)


class Artifacts:
    """The artifacts of one run; digests of inputs are computed once as long as nothing below them is made anew."""

    def __init__(self, root: Path, checksums: bool = True) -> None:
        """`checksums`: verify the content of every file, not its presence and size alone."""
        self.root = root
        self.checksums = checksums
        self._digests: dict[tuple[Path, Reading], str | None] = {}
        self._returning: dict[Path, Path] = {}

    def digests(self, stage: Stage) -> dict[str, str]:
        """Digests of the inputs of a stage, all of which must be there."""
        readings = {name: (path, reading(stage.command, name)) for name, path in stage.inputs.items()}
        for path, how in readings.values():
            if (path, how) not in self._digests:
                self._digests[path, how] = read_digest(self._now_at(path), how)
        found = {name: self._digests[key] for name, key in readings.items()}
        return {name: digest for name, digest in found.items() if digest is not None}

    def expect(self, stage: Stage, folder: Path) -> None:
        """Takes the artifact of `stage` from where it lies before it comes back, to judge those that read it."""
        self.forget(stage)
        self._returning[stage.output] = folder

    def _now_at(self, path: Path) -> Path:
        for output, folder in self._returning.items():
            if path.is_relative_to(output):
                return folder / path.relative_to(output)
        return path

    def forget(self, stage: Stage) -> None:
        """The output of `stage` changed: what was computed from it counts no more."""
        self._digests = {k: d for k, d in self._digests.items() if not k[0].is_relative_to(stage.output)}

    def assess(self, stage: Stage, checksums: bool | None = None) -> Assessment:
        """Compares the folder of a stage with what the stage would write. Its inputs must be there."""
        return self._assess(stage.output, stage, self.checksums if checksums is None else checksums)

    def ready(self, stage: Stage) -> tuple[Assessment, list[str]]:
        """What is in a stage's folder after anything that is not the artifact asked for was put aside, and what to say
        of that.

        What is put aside goes to `replaced/NAME/` in the run's folder, where there may be several. When one of them is
        the artifact asked for, or its beginning, it comes back.
        """
        found, lines = self.assess(stage), list[str]()
        if found.found in ("complete", "interrupted"):
            return found, lines
        back = self.comes_back(stage)
        if found.found != "absent":
            why = "settings or inputs differ" if found.found == "other" else "it is damaged"
            lines.append("\n  ".join([f"made anew, {why}:", *found.reasons]))
            if aside := self._put_aside(stage):
                until = "" if stage.command in KEPT else " until the new one is complete"
                lines.append(f"the former one is kept in {aside}{until}")
                back = back and self.comes_back(stage)  # where a folder of an earlier version was moved to
        if back:
            back.rename(stage.output)
            lines.append(f"the one with these settings and inputs was still in {back} and is taken back")
        self.forget(stage)
        return self.assess(stage), lines

    def comes_back(self, stage: Stage) -> Path | None:
        """The folder of the artifact asked for, or else of its beginning, among those that others have replaced."""
        found = {self._assess(folder, stage, self.checksums).found: folder for folder in kept(self.replaced(stage))}
        return found.get("complete") or found.get("interrupted")

    def _put_aside(self, stage: Stage) -> Path | None:
        """Moves a stage's folder out of the way; a beginning without any work in it is removed."""
        if not (stage.output / MANIFEST).is_file() and not _has_work(stage.output):
            shutil.rmtree(stage.output)
            return None
        place = self.replaced(stage)
        if is_artifact(place):  # as the version before kept it: one, without a number
            former = place.with_name(f".{place.name}.moving")
            place.rename(former)
            place.mkdir()
            former.rename(place / _number(1))
        place.mkdir(parents=True, exist_ok=True)
        aside = place / _number(1 + max((int(folder.name) for folder in kept(place)), default=0))
        stage.output.rename(aside)
        return aside

    def begin(self, stage: Stage) -> None:
        """Takes the folder for a stage whose command knows nothing of manifests. It begins empty."""
        if stage.output.is_dir():
            shutil.rmtree(stage.output)
        begin_artifact(stage.output, stage.command, stage.identity, self.digests(stage))

    def settle(self, stage: Stage) -> None:
        """Checks that a stage which ended has left its artifact. What that replaces is removed where it can be made
        again from other artifacts; what was sampled or trained stays (`replaced.discard`).

        Raises:
            StageError: there is no artifact, or it is not the one that was planned.
        """
        self.forget(stage)
        assessment = self.assess(stage, checksums=False)
        if assessment.found != "complete":
            why = "; ".join(assessment.reasons) or f"{stage.output} has no {MANIFEST}"
            raise StageError(
                f"{stage.name}: the command ended without an error, but its artifact is not complete: {why}"
            )
        if stage.command not in KEPT:
            shutil.rmtree(self.replaced(stage), ignore_errors=True)

    def replaced(self, stage: Stage) -> Path:
        """Where the former artifacts of a stage are kept, each in a folder of its own."""
        return replaced_folder(self.root) / stage.name.replace("/", "-")

    def _assess(self, folder: Path, stage: Stage, checksums: bool) -> Assessment:
        inputs, settings = self.digests(stage), stage.request.recorded.identity
        try:
            if (folder / MANIFEST).is_file():
                manifest = _renewed(read_manifest(folder), stage, inputs)
                lines = differences(manifest, stage.command, settings, inputs)
                if lines:
                    return Assessment("other", lines)
                verify_manifest(folder, checksums)
                return Assessment("complete")
            request = read_request(folder)
        except StageError as error:
            return Assessment("damaged", [str(error)])
        if request is None:
            nothing = not folder.is_dir() or not any(folder.iterdir())
            return Assessment("absent" if nothing else "interrupted")
        lines = differences(request, stage.command, settings, inputs)
        return Assessment("other", lines) if lines else Assessment("interrupted")


def _number(number: int) -> str:
    return f"{number:04d}"


def _has_work(folder: Path) -> bool:
    """Whether an unfinished artifact holds more than its request and logs: part files, slices, checkpoints."""
    aside = {"logs", "tensorboard", REQUEST, METRICS}
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return any(path.parts[0] not in aside and path.name != ".begin" and path.suffix != ".tmp" for path in files)


def _renewed(manifest: Manifest, stage: Stage, inputs: dict[str, str]) -> Manifest:
    """A manifest of the version that took all bytes of an input for what it is, in the terms of this one."""
    found = dict(manifest.inputs)
    if stage.command == "sample":  # what scored its rollouts was part of it, and is the rewards' business now
        manifest = replace(manifest, settings={k: v for k, v in manifest.settings.items() if k != "verifier"})
        found.pop("verifier", None)
    for name, now in inputs.items():
        path = stage.inputs[name]
        if name == "verifier" and name not in found:  # a module's, which was no input
            found[name] = now
        elif found.get(name, now) != now and path.exists() and not (path / MANIFEST).is_file():
            found[name] = now if found[name] in former_digests(path) else found[name]
    return replace(manifest, inputs=found)
