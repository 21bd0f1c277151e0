"""Running a command as a program: what becomes of its errors."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from megatron_erpd.errors import ErpdError, StageInterrupted

_INTERRUPTED = 75
"""Exit code for "try again", as sysexits.h has it."""
_OTHER_RANKS_WAIT = 3.0
"""Seconds; after them an error of another rank than the first must be one of its own, and is shown."""


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command as a program: an `ErpdError` becomes one message on stderr and exit code 2, or 75 when the same
    command would go on.

    `--debug` among the arguments shows the traceback instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    debug = "--debug" in own
    try:
        command([word for word in own if word != "--debug"] + argv[len(own) :])
    except ErpdError as error:
        if debug:
            raise
        if int(os.environ.get("RANK", "0")) > 0:
            # All ranks find the same error in bad input; the first one's message is enough, and ends this rank.
            time.sleep(_OTHER_RANKS_WAIT)
        # Further lines are indented: whoever reads a log can tell where the message ends.
        print("error: " + "\n".join(_indented(str(error))), file=sys.stderr, flush=True)
        sys.exit(_INTERRUPTED if isinstance(error, StageInterrupted) else 2)


def _indented(message: str) -> list[str]:
    first, *others = message.splitlines() or [""]
    return [first, *(line if line.startswith("  ") else "  " + line for line in others)]
