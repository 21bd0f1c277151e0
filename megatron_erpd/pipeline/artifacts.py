"""What a stage's output folder holds, and how a folder that holds something else is put out of the way."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import (
    MANIFEST,
    Manifest,
    begin_artifact,
    differences,
    former_digests,
    read_manifest,
    read_request,
    verify_manifest,
)
from megatron_erpd.pipeline.stages import Stage, settings_of
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

    def digests(self, stage: Stage) -> dict[str, str]:
        """Digests of the inputs of a stage, all of which must be there."""
        readings = {name: (path, reading(stage.command, name)) for name, path in stage.inputs.items()}
        for path, how in readings.values():
            if (path, how) not in self._digests:
                self._digests[path, how] = read_digest(path, how)
        found = {name: self._digests[key] for name, key in readings.items()}
        return {name: digest for name, digest in found.items() if digest is not None}

    def forget(self, stage: Stage) -> None:
        """The output of `stage` changed: what was computed from it counts no more."""
        self._digests = {k: d for k, d in self._digests.items() if not k[0].is_relative_to(stage.output)}

    def assess(self, stage: Stage, checksums: bool | None = None) -> Assessment:
        """Compares the folder of a stage with what the stage would write. Its inputs must be there."""
        return self._assess(stage.output, stage, self.checksums if checksums is None else checksums)

    def make_way(self, stage: Stage) -> bool:
        """Moves an artifact that is not the one asked for to `replaced/` in the run's folder.

        It is kept there until the new one is complete (`settle`), so that a setting changed in error loses nothing:
        when the artifact in `replaced/` is the one asked for, it comes back. One is kept for each stage, a complete one
        rather than the beginning of one.

        Returns:
            Whether the one asked for came back.
        """
        replaced = self.replaced(stage)
        back = replaced.is_dir() and self._assess(replaced, stage, self.checksums).found in ("complete", "interrupted")
        if not back and (replaced / MANIFEST).is_file() and not (stage.output / MANIFEST).is_file():
            shutil.rmtree(stage.output)
            return False
        away = replaced.with_name(replaced.name + ".incoming")
        replaced.parent.mkdir(parents=True, exist_ok=True)
        stage.output.rename(away)
        if back:
            replaced.rename(stage.output)
        elif replaced.is_dir():
            shutil.rmtree(replaced)
        away.rename(replaced)
        self.forget(stage)
        return back

    def begin(self, stage: Stage) -> None:
        """Takes the folder for a stage whose command knows nothing of manifests. It begins empty."""
        if stage.output.is_dir():
            shutil.rmtree(stage.output)
        begin_artifact(stage.output, stage.command, stage.settings, self.digests(stage))

    def settle(self, stage: Stage) -> None:
        """Checks that a stage which ended has left its artifact, and removes the one that it replaces.

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
        shutil.rmtree(self.replaced(stage), ignore_errors=True)

    def replaced(self, stage: Stage) -> Path:
        """Where the former artifact of a stage is kept while a new one is made."""
        return self.root / "replaced" / stage.name.replace("/", "-")

    def _assess(self, folder: Path, stage: Stage, checksums: bool) -> Assessment:
        inputs, settings = self.digests(stage), settings_of(stage)
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
