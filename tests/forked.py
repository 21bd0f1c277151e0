"""Processes that are forked from one that has imported Megatron, in place of interpreters that import it anew.

    done = forked.run([sys.executable, "tools/train_teacher.py", "--base", ...], timeout=120)
    process = forked.Popen([sys.executable, "-m", "megatron_erpd.commands.cli", "sample", ...], stdout=log, stderr=log)

They take a command line of Python, and are what `subprocess` would start: `sys.argv`, environment, working directory,
standard streams, session, signals and exit codes, and they leave through the end of the interpreter. Only the
seconds of the imports are missing. What torchrun starts from such a process is forked as well. What is tested of the
start itself needs `subprocess`.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]

CONTEXT = multiprocessing.get_context("forkserver")
"""Starts processes from the server, which begins with the first of them."""
CONTEXT.set_forkserver_preload(["tests.preload"])


class Popen:
    """`subprocess.Popen`, as far as the tests need it."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        stdin: IO[Any] | int = subprocess.DEVNULL,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert args[0] == sys.executable and (stdin == subprocess.DEVNULL or not isinstance(stdin, int)), args
        out = 1 if stdout is None else stdout.fileno()
        error = 2 if stderr is None else out if isinstance(stderr, int) else stderr.fileno()
        with open(os.devnull) as nothing:
            given = nothing if isinstance(stdin, int) else stdin
            files = _Files(given.fileno(), out, error)
            environment = dict(os.environ if env is None else env)
            words = (list(args[1:]), environment, cwd or Path.cwd(), start_new_session, files)
            process: Any = CONTEXT.Process(target=_main, args=words)
            process.start()
        self.args, self._process, self.pid = list(args), process, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str],
    *,
    timeout: float,
    input: str = "",
    capture_output: Literal[True] = True,
    text: Literal[True] = True,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with `capture_output` and `text`; a process that does not end in time is killed."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as error,
    ):
        given.write(input)
        given.seek(0)
        process = Popen(command, stdin=given, stdout=out, stderr=error, **options)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(list(command), code, out.read(), error.read())


class _Files:
    """File descriptors that travel to a process when it is started, for its standard input, output and error."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, tuple(map(DupFd, self.numbers))


def _received(*files: Any) -> _Files:
    return _Files(*(file.detach() for file in files))


def _main(words: list[str], environment: dict[str, str], cwd: Path, new_session: bool, files: _Files) -> None:
    """The life of a process: as that of an interpreter with this command line."""
    for number, file in enumerate(files.numbers):
        os.dup2(file, number)
        os.close(file)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED")) or words[0] == "-u"
    stream = os.fdopen(1, "wb", 0 if unbuffered else -1, closefd=False)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = TextIOWrapper(stream, write_through=unbuffered)
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # Its own forks come from the same server; it would start another, as this one is no child of its own.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined, method-assign]
    try:
        _run(words)
        code = 0
    except SystemExit as ending:
        code = _exit_code(ending)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    # The server would leave with `os._exit`, before threads, destructors and exit functions have had their turn.
    ctypes.pythonapi.Py_Exit(code)


def _run(words: list[str]) -> None:
    how, *rest = words = words[words[0] == "-u" :]
    if how == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # it becomes `__main__`
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(how).parent))
        runpy.run_path(how, run_name="__main__")


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    with contextlib.suppress(OSError):
        print(ending.code, file=sys.stderr)
    return 1
