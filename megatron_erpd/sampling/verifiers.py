"""Verifiers: from a prompt's record and a response to a reward, or to None where no verdict could be reached.

An error inside a verifier is never read as a wrong answer: the rollout stays unverified, the error is counted and the
first one is kept for the report.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.prompts import REASONING_GYM, PromptRecord, prompt_text, reasoning_gym_task

MATH_VERIFY = "math-verify"
PYTHON = "python:"
MATH_SECONDS = 15.0
"""Time limit for one answer; simplifying a hostile expression can take for ever."""

ScoreFunction = Callable[[PromptRecord, str], float | None]
_log = logging.getLogger(__name__)


class Verifier:
    """Scores responses; callable as `verifier(record, response)`.

    Attributes:
        spec: what it was made from.
        num_errors: how many responses it failed on.
        first_error: the first of those errors, as text.
        last_error: the error on the last response, as text; None where it was scored, or no verdict was given.
    """

    def __init__(self, spec: str, function: ScoreFunction) -> None:
        self.spec = spec
        self.num_errors = 0
        self.first_error: str | None = None
        self.last_error: str | None = None
        self._function = function

    def __call__(self, record: PromptRecord, response: str) -> float | None:
        """The reward, or None (unverified) where the verifier failed or gave no verdict.

        Raises:
            RecipeError: the verifier returned something that is no reward.
        """
        self.last_error = None
        try:
            reward = self._function(record, response)
        except RecipeError:
            raise
        except Exception as error:
            self.num_errors += 1
            self.last_error = f"{type(error).__name__}: {error}"
            if self.first_error is None:
                self.first_error = self.last_error
                _log.warning("%s failed on a response, which stays unverified: %s", self.spec, self.last_error)
            return None
        if reward is None:
            return None
        if not isinstance(reward, bool | int | float) and not hasattr(reward, "__float__"):
            raise RecipeError(f"verifier {self.spec} returned {reward!r}; it must return a number or None")
        value = float(reward)
        return value if math.isfinite(value) else None


def get_verifier(spec: str) -> Verifier:
    """Makes a verifier.

    Args:
        spec: one of
            `math-verify`: the record's `answer` against the last mathematical answer in the response, 1.0 or 0.0;
            `reasoning-gym:TASK`: the task's own scorer, on the text between the last <answer> and </answer>, or on the
            whole response where there is none;
            `python:path/to/file.py:function` or `python:package.module:function`: `function(record, response)` gives a
            number, or None for no verdict.

    Raises:
        RecipeError: the spec names nothing that can be loaded.
    """
    if spec == MATH_VERIFY:
        return Verifier(spec, MathVerifier())
    if spec.startswith(REASONING_GYM):
        return Verifier(spec, _reasoning_gym_scorer(spec.removeprefix(REASONING_GYM)))
    if spec.startswith(PYTHON):
        return Verifier(spec, _python_function(spec))
    raise RecipeError(
        f"verifier {spec!r} is unknown; use {MATH_VERIFY}, {REASONING_GYM}TASK, {PYTHON}path/to/file.py:function "
        f"or {PYTHON}package.module:function"
    )


def _reasoning_gym_scorer(task: str) -> ScoreFunction:
    dataset = reasoning_gym_task(task.partition("?")[0])(size=1, seed=0)
    from reasoning_gym.utils import extract_answer

    def score(record: PromptRecord, response: str) -> float:
        entry = {"question": prompt_text(record), "answer": record["answer"], "metadata": record["metadata"]}
        answer = extract_answer(response)
        return dataset.score_answer(answer=response.strip() if answer is None else answer, entry=entry)

    return score


def _python_function(spec: str) -> ScoreFunction:
    place, _, name = spec.removeprefix(PYTHON).rpartition(":")
    if not place or not name:
        raise RecipeError(f"verifier {spec!r}: write {PYTHON}file.py:function or {PYTHON}package.module:function")
    module = _module_from_file(spec, Path(place)) if place.endswith(".py") else _module_by_name(spec, place)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise RecipeError(f"verifier {spec!r}: {place} has no function {name!r}; it has {names or 'none'}")
    return function


def _module_from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"verifier {spec!r}: no such file {path.absolute()}; paths start from the working directory")
    # A name of its own: a file called like a library must not take the library's place.
    name = f"erpd_verifier_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses look their module up by name while the file runs.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"verifier {spec!r}: {path} can't be imported: {type(error).__name__}: {error}") from error
    return module


def _module_by_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        hint = "is it installed, or on PYTHONPATH? A file ends in .py"
        raise RecipeError(f"verifier {spec!r}: can't import {name}: {type(error).__name__}: {error}; {hint}") from error


class MathVerifier:
    """math-verify in a process of its own (`math_worker.py`), one question at a time.

    math-verify limits its time with SIGALRM, which works in the main thread only and not inside C code. Here the limit
    is kept from outside: a worker that is late, or that died, is replaced, and its question gets no verdict.
    """

    def __init__(self, seconds: float = MATH_SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def __call__(self, record: PromptRecord, response: str) -> float:
        """1.0 or 0.0; raises RuntimeError or TimeoutError where there is no verdict."""
        if record["answer"] is None:
            raise ValueError("the prompt has no answer to compare with")
        reply = self._ask({"gold": str(record["answer"]), "response": response})
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return float(reply["score"])

    def close(self) -> None:
        """End the worker; the next question starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            return self._reply(process, self._seconds)
        except (TimeoutError, OSError):
            self.close()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps this folder off the worker's import path: its file names are ordinary words.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        # Importing a computer algebra system on a busy machine takes a while.
        hello = self._reply(self._process, 120.0)
        if "error" in hello:
            self.close()
            raise RecipeError(f"{MATH_VERIFY}: {hello['error']}; pip install math-verify")
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        deadline, received = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while not received.endswith(b"\n"):
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise TimeoutError(f"no verdict within {seconds:g} s")
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise BrokenPipeError("the math-verify process ended without a verdict")
            received += chunk
        return json.loads(received)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
