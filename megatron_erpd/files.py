"""Files that are seen whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_erpd.errors import RecipeError, full_disk


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name of this process's own to write to, which takes the place of `path` in the end; its folder is made.

    Readers see the former content or the new one, and several processes, on several nodes too, may write the same file.

    Raises:
        OSError: it can't be written; names `path`, which the errors of a write don't.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None or Path(error.filename) == temporary:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_output(folder: Path) -> None:
    """Refuses a folder that can't be written to, or made, before there is anything to write.

    Permissions alone don't tell: a mount may be read-only, and root is refused by some file systems. So it is tried.

    Raises:
        RecipeError: it can't; names the folder and why.
        OSError: the disk is full, which `run_command` tells.
    """
    if why := _why_unwritable(folder):
        raise RecipeError(f"{folder}: can't be written ({why}); give another folder")


def check_output_file(path: Path) -> None:
    """The same for a file, in a folder that must be there; what is there already is overwritten."""
    why: str | None = None
    if path.is_dir():
        why = os.strerror(errno.EISDIR)
    elif path.exists():  # a pipe or a device too, which is not tried
        why = None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    else:
        why = _why_unwritable(path.parent) if path.parent.is_dir() else f"{path.parent} is no folder"
    if why:
        raise RecipeError(f"{path}: can't be written ({why}); give another file")


def _why_unwritable(folder: Path) -> str | None:
    """Why a folder can't be written to, or made; None where it can."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with suppress(FileNotFoundError):
            os.lstat(folder)  # a name that no folder can have
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=there))
    except OSError as error:
        if full_disk(error) is not None:
            raise
        return f"{error.strerror} in {there}" if there != folder.absolute() else str(error.strerror)
    return None


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of new files in a folder, into which nobody may be writing."""
    for left in folder.glob(".*.tmp"):
        left.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8; see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object, *, default: Callable[[object], object] | None = None) -> None:
    """Writes a value as JSON for people to read too; `default` as in `json.dumps`, NaN and infinities as null."""
    write_text(path, json.dumps(finite(value), indent=1, default=default, allow_nan=False) + "\n")


def json_line(value: Mapping[str, object]) -> str:
    """A line of a JSON-lines file. JSON has no NaN and no infinity: they are written as null."""
    return json.dumps(finite(value), allow_nan=False) + "\n"


def finite(value: object) -> object:
    """A value as JSON can hold it: NaN and infinities as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
