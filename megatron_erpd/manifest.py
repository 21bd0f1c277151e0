"""Artifacts and their manifests.

A stage writes one folder, its artifact. The artifact is complete when `manifest.json` is in it: written last, by
rename. The manifest names the stage, its settings, the digests of its inputs' manifests and every file with its
size and SHA-256. "Done" means that the manifest verifies and that settings and inputs are those asked for.

An artifact that is not complete yet says in `request.json` what was asked for, so that an interrupted stage is resumed
only with the same settings and inputs. The plan of a run and the stage itself compute both with `settings_identity` and
`sampling.inputs.input_digests`, so that they agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePath
from typing import Annotated, Any, TypedDict

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from megatron_erpd.content import files_below, identifying_files, is_junk
from megatron_erpd.errors import StageError
from megatron_erpd.files import finite, write_json

MANIFEST = "manifest.json"
REQUEST = "request.json"
CONTENT = "content.json"
"""In an artifact that is an input by what it holds and not by how it was made: `digest` of that, or null where it adds
nothing to the other inputs."""
METRICS = "metrics.jsonl"
"""How the stage went, step by step. No part of what it made, as it holds times."""
SCHEMA_VERSION = 1
_COPIED_SECONDS = 60.0
"""A request whose file was written so long after its stage began is a copy."""
WARNINGS = "warnings"
"""In a manifest's summary: sentences for people."""
_CHECKSUM = "checksum"
"""Key of the digest of stage, settings, inputs and files, by which a manifest shows that it is whole."""
_VERSIONED = ("megatron-erpd", "megatron-core", "torch", "transformers")


class FileRecord(TypedDict):
    """What a manifest says of a file."""

    size: Annotated[int, Field(ge=0, strict=True)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


Reads = Callable[[Path, list[str]], list[str]]
"""Of an input's path and its files' paths in it, those that a stage reads."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and what it was made from."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Name of an input to the digest of its manifest (or of the file, for an input that is not an artifact)."""
    files: dict[str, FileRecord]
    """By their paths in the artifact."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures of the stage for people; not part of the digest."""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the stage, settings, inputs and files: equal digests are equal artifacts."""
        identity = [self.stage, self.settings, self.inputs, self.files]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


_MANIFEST_TYPE = TypeAdapter(Manifest)


def settings_identity(
    settings: BaseModel | Mapping[str, Any], megatron: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """The settings that are part of an artifact's identity, as JSON values.

    Args:
        settings: the stage's settings; all of them count, defaults too. A layout is never among them.
        megatron: Megatron flags of the user's own, as they stand after `--`. They count as they are written.
        more: what else decides the result and has no settings model of its own.
    """
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
    if megatron:
        values["megatron"] = list(megatron)
    return json.loads(json.dumps({**values, **more}))


def begin_artifact(folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Takes a folder for a stage that writes its artifact there, or refuses it.

    A finished artifact is never overwritten. An unfinished one is resumed only by the same stage with the same settings
    and inputs (digests).

    Returns:
        Whether the folder holds the work of an interrupted run to resume.

    Raises:
        StageError: the folder holds a finished artifact, an unfinished one of another request, or foreign files.
    """
    if (folder / MANIFEST).is_file():
        lines = differences(read_manifest(folder), stage, settings, inputs)
        what = "the same one" if not lines else "another one:\n  " + "\n  ".join(lines)
        raise StageError(f"{folder}: already holds a finished artifact, {what}; give another --output or delete it")
    if (request := read_request(folder)) is not None:
        if lines := differences(request, stage, settings, inputs):
            raise StageError(
                f"{folder}: was begun with other settings or inputs and can't be continued with these; give another "
                "--output or delete it:\n  " + "\n  ".join(lines)
            )
        _write_request(folder, request)
        return True
    if folder.is_dir() and any(_is_content(path.relative_to(folder)) for path in folder.iterdir()):
        raise StageError(f"{folder}: holds files that no stage left there; give an empty or new folder as --output")
    folder.mkdir(parents=True, exist_ok=True)
    _write_request(folder, Manifest(stage, dict(settings), dict(inputs), files={}))
    return False


def finish_artifact(
    folder: Path,
    summary: dict[str, Any] | None = None,
    checksums: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> Manifest:
    """Publishes the manifest of what `begin_artifact` was asked for. Call once, when all else is written.

    The summary gets `seconds`, the time that the stage has worked in all its starts, and with several their number as
    `starts`. Of a start that was killed, the time until its last file counts.

    Args:
        checksums: SHA-256 of files that are known, by their path in the folder; the others are read.
        warnings: what people should know of the artifact. Printed, and kept in the summary, from where a run and its
            report show them.
    """
    request = read_request(folder)
    if request is None:
        raise StageError(f"{folder}: has no {REQUEST}, so no stage has begun it")
    record = json.loads((folder / REQUEST).read_text())
    started = record.get("started", (folder / REQUEST).stat().st_mtime)
    times = {"seconds": round(record.get("seconds", 0.0) + time.time() - started, 1)}
    times |= {"starts": record["starts"]} if record.get("starts", 1) > 1 else {}
    summary = {**times, **(summary or {})}
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    summary |= {WARNINGS: list(warnings)} if warnings else {}
    manifest = write_manifest(folder, request.stage, request.settings, request.inputs, summary, checksums)
    (folder / REQUEST).unlink()
    return manifest


def _write_request(folder: Path, request: Manifest) -> None:
    """Notes what is wanted, that a start begins now, and how long those before worked, each until its last file."""
    path = folder / REQUEST
    starts, seconds = 1, 0.0
    if path.is_file():
        record, written = json.loads(path.read_text()), path.stat().st_mtime
        starts, seconds = record.get("starts", 1) + 1, record.get("seconds", 0.0)
        started = record.get("started", written)
        if abs(written - started) <= _COPIED_SECONDS:  # otherwise the times of its files are those of the copying
            last = max(file.stat().st_mtime for file in folder.rglob("*") if file.is_file())
            seconds += max(0.0, min(last, time.time()) - started)
    wanted = {"stage": request.stage, "settings": request.settings, "inputs": request.inputs}
    write_json(path, wanted | {"started": time.time(), "starts": starts, "seconds": seconds})


def read_request(folder: Path) -> Manifest | None:
    """What an unfinished artifact was begun with, as a manifest without files; None where nothing was begun."""
    path = folder / REQUEST
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        return _parsed({**{key: record[key] for key in ("stage", "settings", "inputs")}, "files": {}})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise StageError(f"{path}: not a request ({error}); delete the folder and run the stage again") from None


def write_manifest(
    folder: Path,
    stage: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    summary: dict[str, Any] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> Manifest:
    """Hashes every file of `folder` (but for known `checksums`) and publishes its manifest by rename. Call when all
    else is written."""
    known = checksums or {}
    files: dict[str, FileRecord] = {
        name: {"size": size, "sha256": known.get(name) or file_digest(folder / name)}
        for name, size in content_files(folder).items()
    }
    manifest = Manifest(
        stage=stage,
        settings=json.loads(json.dumps(finite(settings))),
        inputs=inputs,
        files=files,
        summary=summary or {},
        versions={name: _version(name) for name in _VERSIONED},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    write_json(folder / MANIFEST, {"schema": SCHEMA_VERSION, **manifest.__dict__, _CHECKSUM: manifest.digest})
    return manifest


def content_files(folder: Path) -> dict[str, int]:
    """The files that an artifact in this folder has, by their paths in it, and their sizes."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(name): (folder / name).stat().st_size for name in names if _is_content(name)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact.

    Raises:
        StageError: the folder or its manifest is missing (the stage has not finished) or unreadable.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise StageError(f"{folder}: no such folder; give the folder that the stage before wrote")
    if not path.is_file():
        raise StageError(f"{folder}: has no {MANIFEST}, so the stage that writes it has not finished; run it again")
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise StageError(f"{path}: can't be read ({error.strerror}); give this user the right to read it") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is cut off or no JSON ({error})") from None
    if not isinstance(record, dict):
        raise _damaged(path, "is no JSON object")
    if (schema := record.pop("schema", None)) != SCHEMA_VERSION:
        if schema is None and not record.keys() >= {"stage", "files"}:
            raise StageError(f"{path}: was not written by this project; give a folder that one of its stages wrote")
        what = "says nothing of its schema" if schema is None else f"has schema {schema!r}, not {SCHEMA_VERSION}"
        raise StageError(f"{path}: {what}: it is damaged, or of another version of this project; run the stage again")
    checksum = record.pop(_CHECKSUM, None)  # the version before wrote none
    try:
        manifest = _parsed(record)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if checksum is not None and checksum != manifest.digest:
        raise _damaged(path, "its stage, settings, inputs or files were changed after it was written")
    return manifest


def _damaged(path: Path, what: str) -> StageError:
    return StageError(
        f"{path}: damaged: {what}; put back the file that the stage wrote, or delete the folder and run the stage again"
    )


def _parsed(record: Mapping[str, Any]) -> Manifest:
    """A manifest from JSON; raises `ValueError` that names a key that is missing, unknown or of a wrong type."""
    known = [entry.name for entry in fields(Manifest)]
    if unknown := [name for name in record if name not in known]:
        raise ValueError(f"{unknown[0]}: unknown key")
    try:
        manifest = _MANIFEST_TYPE.validate_python(record)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from None
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"files: {name!r} is outside of the artifact")
    return manifest


def verify_manifest(folder: Path, checksums: bool = True) -> Manifest:
    """Checks that every file of the artifact is there, of the recorded size and, with `checksums`, content.

    Raises:
        StageError: names the first file that differs.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        if problem := _difference(folder / name, record["size"], record["sha256"] if checksums else None):
            raise StageError(problem)
    return manifest


def recorded_files(path: Path) -> dict[str, FileRecord]:
    """What the manifest of the artifact that `path` is, or lies in, records of its files: by their paths in `path`, ""
    for a file itself. Empty for what is in no artifact.

    Raises:
        StageError: the manifest is damaged.
    """
    for folder in (path, *path.parents):
        if not (folder / MANIFEST).is_file():
            continue
        try:
            files = read_manifest(folder).files
        except StageError:
            if folder == path or _is_ours(folder / MANIFEST):
                raise
            return {}
        inside = path.relative_to(folder)
        return {
            "" if Path(name) == inside else str(Path(name).relative_to(inside)): record
            for name, record in files.items()
            if Path(name).is_relative_to(inside)
        }
    return {}


def _is_ours(path: Path) -> bool:
    """Whether a damaged manifest is this project's; other programs have files of this name too."""
    try:
        return b'"sha256"' in path.read_bytes()
    except OSError:
        return False


def files_of_inputs(inputs: Iterable[Path], reads: Reads | None = None) -> dict[str, FileRecord]:
    """What the manifests record of the files that a stage reads, by the files' paths. Inputs that are no artifact and
    in none have no manifest to be compared with, and are left out.

    Args:
        inputs: artifacts, or files or folders in them.
        reads: which of an input's files are read; default: all.

    Raises:
        StageError: a manifest is damaged.
    """
    files: dict[str, FileRecord] = {}
    for path in inputs:
        found = recorded_files(path)
        names = list(found) if reads is None else reads(path, list(found))
        files |= {str(path / name if name else path): found[name] for name in names}
    return files


def verify_inputs(inputs: Iterable[Path], reads: Reads | None = None) -> None:
    """Compares the files that a stage reads (`files_of_inputs`) with what their artifacts' manifests recorded: whether
    they are there, their sizes and their content.

    Raises:
        StageError: names the files that differ and says what to do.
    """
    files = files_of_inputs(inputs, reads)
    problems = differing_files((file, record["size"], record["sha256"]) for file, record in files.items())
    if problems:
        raise StageError("\n  ".join(problems))


def differing_files(files: Iterable[tuple[str, int, str]]) -> list[str]:
    """What is wrong with files, given by path, size and SHA-256: a message for each that differs or can't be read."""
    return [problem for path, size, digest in files if (problem := _difference(Path(path), size, digest))]


def _difference(path: Path, size: int, digest: str | None) -> str:
    try:
        if not path.is_file():
            return f"{path}: named in {MANIFEST} but missing; run the stage again"
        if path.stat().st_size == size and (digest is None or file_digest(path) == digest):
            return ""
    except OSError as error:
        return f"{path}: can't be read ({error.strerror}); run the stage again"
    return f"{path}: differs from what {MANIFEST} recorded; run the stage again"


def differences(manifest: Manifest, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """What keeps an artifact from being the one asked for, a line each; empty when it is."""
    lines = [] if manifest.stage == stage else [f"stage: {manifest.stage} -> {stage}"]
    wanted = json.loads(json.dumps(finite(dict(settings))))
    for name in sorted({*manifest.settings, *wanted}):
        before, now = manifest.settings.get(name), wanted.get(name)
        same_program = name in ("verifier", "loss") and _without_folder(before) == _without_folder(now)
        if before != now and not same_program:
            lines.append(f"{name}: {before} -> {now}")
    for name in sorted({*manifest.inputs, *inputs}):
        if manifest.inputs.get(name) != inputs.get(name):
            lines.append(f"input {name} changed")
    return lines


def _without_folder(program: object) -> str:
    """The file of a verifier or a loss is an input, identified by its content: the folder it lies in doesn't count."""
    return re.sub(r"^python:.*/([^/]+\.py:\w+)$", r"python:\1", str(program))


def input_digest(path: Path, counts: Callable[[Iterable[PurePath]], list[PurePath]] = identifying_files) -> str:
    """Identifies an input: an artifact by its manifest, a file by its content, another folder by those of its files
    that count.

    A folder that is not an artifact (a Hugging Face folder, say) is identified by the names and contents of its files.
    For files and folders inside an artifact, its manifest's checksums are taken instead of reading everything again.

    Args:
        counts: which of a folder's files, by their paths in it, are part of what it is.

    Raises:
        StageError: the path does not exist.
    """
    if (path / MANIFEST).is_file():
        return read_manifest(path).digest
    recorded = _recorded_digests(path)
    if path.is_file():
        return recorded.get("") or file_digest(path)
    if not path.is_dir():
        raise StageError(f"{path}: no such file or folder; check the path")
    digests = recorded or _content_digests(path, counts(files_below(path)))
    return _digest_of(digests, counts(map(PurePath, digests)))


def former_digests(path: Path) -> set[str]:
    """What `input_digest` could have given a path that is no artifact before it knew which files count: digests of all
    files, with junk and without.

    Raises:
        StageError: the path does not exist.
    """
    if not path.is_dir():
        return {input_digest(path)}
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    digests = _recorded_digests(path) or _content_digests(path, files)
    names = [PurePath(name) for name in digests]
    return {_digest_of(digests, names), _digest_of(digests, [name for name in names if not is_junk(name)])}


def _content_digests(folder: Path, names: Sequence[PurePath]) -> dict[str, str]:
    # Hashing lets other threads run; a model's files are large enough for it to matter.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = threads.map(file_digest, [folder / name for name in names])
        return {str(name): digest for name, digest in zip(names, digests, strict=True)}


def _digest_of(files: Mapping[str, str], names: Iterable[PurePath]) -> str:
    items = sorted((str(name), files[str(name)]) for name in names)
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def _recorded_digests(path: Path) -> dict[str, str]:
    """SHA-256 of the files that the artifact around `path` has recorded (`recorded_files`)."""
    return {name: record["sha256"] for name, record in recorded_files(path).items()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_content(path: Path) -> bool:
    """Logs, metrics, TensorBoard files, the request, and hidden and temporary names are no part of an artifact."""
    first, aside = path.parts[0], ("logs", "tensorboard", MANIFEST, REQUEST)
    return first not in aside and first[0] != "." and path.suffix != ".tmp" and path.name != METRICS


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
