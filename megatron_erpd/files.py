"""Files that are seen whole or not at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
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
    """Writes a value as JSON for people to read too; `default` as in `json.dumps`."""
    write_text(path, json.dumps(value, indent=1, default=default) + "\n")
