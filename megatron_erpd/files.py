"""Files that are seen whole or not at all."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


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
    write_text(path, json.dumps(_finite(value), indent=1, default=default, allow_nan=False) + "\n")


def json_line(value: Mapping[str, object]) -> str:
    """A line of a JSON-lines file. JSON has no NaN and no infinity: they are written as null."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
