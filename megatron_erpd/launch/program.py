"""Runs a command as a program: an error becomes one message and an exit code."""

from __future__ import annotations

import argparse
import atexit
import errno
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from megatron_erpd.errors import ErpdError, NoRoom, StageError, StageInterrupted, full_disk
from megatron_erpd.launch.results import output_folders, say_written, stamps
from megatron_erpd.launcher import said_rank

_INTERRUPTED = 75
"""Exit code for "try again", as sysexits.h has it."""
_NOBODY_READS = 128 + signal.SIGPIPE
"""Exit code of a program whose output is read no further, by `| head` say, as shells have it."""
_KEPT_FROM_US = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_OTHER_RANKS_WAIT = 3.0
"""Seconds; after them an error of another rank than the first must be one of its own, and is shown."""


LAUNCHED = "launched"
"""What a command returns that has started others to do its work; these say what came of it."""


def run_command(command: Callable[[list[str]], object], argv: list[str] | None = None) -> None:
    """Runs a command as a program: an `ErpdError` becomes one message on stderr and exit code 2, or 75 when the same
    command would go on. So does a full disk, wherever it was met. A command that leaves an artifact in its `--output`
    ends with a line on it.

    `--debug` among the arguments shows the traceback instead. Where what reads the output has ended, so does the
    command, without a word.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    debug = "--debug" in own
    if not debug:
        threading.excepthook = _end_of_thread
    folders = output_folders(own)
    before = stamps(folders)
    try:
        done = command([word for word in own if word != "--debug"] + argv[len(own) :])
        if done is not LAUNCHED and said_rank() == 0:
            say_written(before, folders)
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            sys.exit(_NOBODY_READS)
        shown = error if isinstance(error, ErpdError) else _no_room(error, own) or _refused(error)
        if debug or shown is None:
            raise
        if said_rank() > 0:
            # All ranks find the same error in bad input; the first one's message is enough, and ends this rank.
            time.sleep(_OTHER_RANKS_WAIT)
        with suppress(OSError):  # the disk that is full may be the log's
            # Further lines are indented: whoever reads a log can tell where the message ends.
            print("error: " + "\n".join(_indented(str(shown))), file=sys.stderr, flush=True)
        if isinstance(shown, StageInterrupted):  # by all ranks together
            sys.exit(_INTERRUPTED)
        _end_at_once_in_a_stage(2, clean=not isinstance(shown, NoRoom))
        sys.exit(2)


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more. What is still to be written to it is dropped then, as
    Python would try again, and complain, when it ends."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except OSError:  # no file, as where a test or a notebook catches the output
        return False
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True


def _end_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A full disk also ends threads of libraries, the one that writes for TensorBoard say: a line will do, as the
    command says the same when it comes to it."""
    full = full_disk(failed.exc_value)
    if full is None:
        threading.__excepthook__(failed)
    else:
        with suppress(OSError):
            print(f"a thread that writes ended: {full.strerror}", file=sys.stderr, flush=True)


def _end_at_once_in_a_stage(code: int, clean: bool) -> None:
    """Ends a process with process groups. Python's usual end would crash where other ranks still wait for this one, and
    hang where helper processes of a checkpoint could not write it.

    `clean` does what libraries have registered for the end (W&B marks its run as failed), which may write.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    for child in multiprocessing.active_children():
        child.kill()
    if clean:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _no_room(error: Exception, argv: list[str]) -> NoRoom | None:
    """What to say of an error behind which there is a full disk; None for another."""
    full = full_disk(error)
    if full is None:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    # A copy's error names where it comes from and where it goes; that of a write names nothing.
    place = full.filename2 or full.filename or parser.parse_known_args(argv)[0].output or Path.cwd()
    return NoRoom(f"{place}: can't be written ({full.strerror}); make room and run the same command again")


def _refused(error: Exception) -> StageError | None:
    """What to say of a file or folder that the file system keeps from us; None for another error."""
    if not isinstance(error, OSError) or error.errno not in _KEPT_FROM_US or error.filename is None:
        return None
    return StageError(f"{error.filename2 or error.filename}: {error.strerror}; change its permissions or give another")


def _indented(message: str) -> list[str]:
    first, *others = message.splitlines() or [""]
    return [first, *(line if line.startswith("  ") else "  " + line for line in others)]
