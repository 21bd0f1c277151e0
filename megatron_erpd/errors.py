"""The errors that a user of the project can meet.

Every message names the file, row, field or flag that is wrong and says what to do about it.
All of them are `ValueError`s, so that a caller who knows nothing of this module can still catch them.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path


class ErpdError(ValueError):
    """Base of all errors that are the input's fault, not the program's."""


class RecipeError(ErpdError):
    """A recipe or a flag is wrong: an unknown key, a bad value, a contradiction."""


class RolloutError(ErpdError):
    """A rollout file or one of its rows can't be used."""


class CheckpointError(ErpdError):
    """A Hugging Face folder or a Megatron checkpoint is missing, incomplete or of an unsupported kind."""


class CacheError(ErpdError):
    """A teacher cache is missing rows or was made from other tokens or another policy."""


class LayoutError(ErpdError):
    """The parallel layout doesn't fit the model or the number of processes."""


class StageError(ErpdError):
    """A stage ended without what it promised; its artifact isn't complete."""


class NoRoom(StageError):
    """A disk is full; with room on it, the same command goes on."""


class StageInterrupted(StageError):
    """A stage was stopped before its end, by a signal say; started again, it goes on. Its exit code is its own."""


class TokenError(ErpdError):
    """What was computed for some tokens is no number, or can't be computed.

    Attributes:
        tokens: which they are, by their place in what was computed.
    """

    def __init__(self, message: str, tokens: list[int]) -> None:
        super().__init__(message)
        self.tokens = tokens


def raise_problems(where: object, problems: Sequence[str], limit: int = 20) -> None:
    """Raises if there are problems, and shows up to `limit` of them, each once.

    Raises:
        CheckpointError: `where` and the problems.
    """
    lines = list(dict.fromkeys(problems))
    if not lines:
        return
    if len(lines) == 1:
        raise CheckpointError(lines[0] if lines[0].startswith(str(where)) else f"{where}: {lines[0]}")
    rest = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    raise CheckpointError(f"{where}:\n  " + "\n  ".join([*lines[:limit], *rest]))


def first_line(error: BaseException) -> str:
    """What another library's error says first, for a message of one's own; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SMALL_FILE = 64 * 1024


def full_disk(error: BaseException | None) -> OSError | None:
    """The full disk, or the used-up quota, behind an error; None where the error has another reason.

    Libraries hide it behind errors of their own, and some leave only its text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error
        for number in _NO_ROOM:
            if os.strerror(number) in str(error):
                return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def has_no_room(folder: Path) -> bool:
    """Whether less is free on the disk of a folder than a small file takes, for errors that lost what they were."""
    return shutil.disk_usage(folder).free < _SMALL_FILE
