"""Files that are seen whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_erpd.errors import RecipeError, full_disk


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary name to write to; the file gets the name `path`, on disk, when the context ends without an error.

    Readers see the former content or the new one, also after a power cut, and several processes, on several nodes too,
    may write the same file. The folder is made. An error leaves nothing of the temporary file.

    Args:
        replace: take the place of a file that has the name; otherwise that is a `FileExistsError`.

    Raises:
        OSError: it can't be written; names `path`, which the errors of a write don't.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        publish(temporary, path, replace=replace)
    except OSError as error:
        if error.filename is None or Path(error.filename) == temporary:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer has; `remove_unfinished` knows it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def publish(temporary: Path, path: Path, *, replace: bool = True) -> None:
    """Gives a file that was written and closed its name, when its bytes are on disk; see `new_file`.

    Without `replace` the name is given by a hard link, of which one alone succeeds on every file system of a cluster.
    """
    sync(temporary)
    if replace:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # a file system without hard links: the name comes first
            os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems can't do it for folders
            raise
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of new files in a folder, into which nobody may be writing."""
    for left in folder.glob(".*.tmp"):
        left.unlink()


def partial_folder(path: Path) -> Path:
    """Where a folder is filled before it gets the name `path`."""
    return path.with_name(f".{path.name}.partial")


def publish_folder(path: Path) -> None:
    """Gives the partial folder, all of it on disk, its name `path`, which must be free."""
    partial = partial_folder(path)
    for item in (*partial.rglob("*"), partial):
        if not item.is_symlink():
            sync(item)
    partial.rename(path)
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A name to make a folder under, which gets the name `path` when the context ends without an error, and is removed
    otherwise. What an interrupted process left of it is removed first."""
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        publish_folder(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, or a copy where links can't be made (another file system)."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        with new_file(target) as temporary:
            shutil.copy2(source, temporary)


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
