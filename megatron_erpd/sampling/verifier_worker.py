"""The process behind a verifier: it loads what the verifier names, answers one question after another, and ends
with the process that asks, which keeps the time.

In, over the pipe that was standard input, pickled by the process that started this one: the verifier's spec, then one
pair (record, response) after another. Out, one line of JSON each: `{"seconds": 60, "trial": null}` once it is loaded,
with the time to wait for an answer, then `{"score": 1.0}`; `{"score": null}` is no verdict, `{"error": "..."}` a
verifier that failed, and `{"refused": "..."}` one that can't be used.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import logging
import math
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.math_answers import MATH_VERIFY, math_scorer
from megatron_erpd.sampling.prompts import REASONING_GYM, PromptRecord, prompt_text, reasoning_gym_task

PYTHON = "python:"
OWN_SECONDS = 15.0
"""Time for one answer of math-verify and reasoning-gym; simplifying a hostile expression can take for ever."""
PYTHON_SECONDS = 60.0
"""Time for one answer of a function, unless its module says otherwise."""
SECONDS_NAME = "VERIFIER_SECONDS"
TRIAL_NAME = "VERIFIER_TRIAL"

ScoreFunction = Callable[[PromptRecord, str], object]


def main(questions: BinaryIO) -> None:
    """Answers until the questions end. They are no standard stream: a verifier's own programs would read them."""
    # Replies get a descriptor of their own too: whatever a verifier prints must not garble them.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    threading.Thread(target=_end_with_parent, args=(questions.fileno(),), daemon=True).start()
    spec = pickle.load(questions)
    try:
        score, seconds, trial = load(spec)
    except RecipeError as error:
        reply({"refused": str(error)})
        return
    reply({"seconds": seconds, "trial": trial})
    while True:
        try:
            record, response = pickle.load(questions)
        except EOFError:
            return
        # In code that keeps the interpreter, `_end_with_parent` has to wait.
        faulthandler.dump_traceback_later(2 * seconds, exit=True)
        message = _answer(spec, score, record, response)
        faulthandler.cancel_dump_traceback_later()
        reply(message)


def _end_with_parent(questions: int) -> None:
    """Ends this process, and what a verifier has started, when the one that asks is gone: nobody keeps its time then,
    and it would keep the log open."""
    gone = select.poll()
    gone.register(questions, 0)  # of the events, only that nobody can write any more
    gone.poll()
    os.killpg(0, signal.SIGKILL)


def load(spec: str) -> tuple[ScoreFunction, float, str | None]:
    """The function of a verifier, as `Verifier` knows it, the seconds to wait for its answer, and a response that it
    scores, where its module has one.

    Raises:
        RecipeError: the spec names nothing that can be loaded.
    """
    if spec == MATH_VERIFY:
        return _math_scorer(), OWN_SECONDS, None
    if spec.startswith(REASONING_GYM):
        return _reasoning_gym_scorer(spec.removeprefix(REASONING_GYM)), OWN_SECONDS, None
    if spec.startswith(PYTHON):
        return _python_function(spec)
    raise RecipeError(
        f"verifier {spec!r} is unknown; use {MATH_VERIFY}, {REASONING_GYM}TASK, {PYTHON}path/to/file.py:function "
        f"or {PYTHON}package.module:function"
    )


def _answer(spec: str, score: ScoreFunction, record: PromptRecord, response: str) -> dict[str, Any]:
    try:
        reward: Any = score(record, response)
        if reward is None:
            return {"score": None}
        if not isinstance(reward, bool | int | float) and not hasattr(reward, "__float__"):
            return {"refused": f"verifier {spec} returned {reward!r}; it must return a number or None"}
        value = float(reward)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"score": value if math.isfinite(value) else None}


def _math_scorer() -> ScoreFunction:
    try:
        compare = math_scorer()
    except ImportError as error:
        raise RecipeError(f"{MATH_VERIFY}: {error}; pip install math-verify") from None
    # It warns of every expression that it can't read, and its parser writes to the descriptor.
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return lambda record, response: compare(record["answer"], response)


def _reasoning_gym_scorer(task: str) -> ScoreFunction:
    dataset = reasoning_gym_task(task.partition("?")[0])(size=1, seed=0)
    from reasoning_gym.utils import extract_answer

    def score(record: PromptRecord, response: str) -> object:
        entry = {"question": prompt_text(record), "answer": record["answer"], "metadata": record["metadata"]}
        answer = extract_answer(response)
        return dataset.score_answer(answer=response.strip() if answer is None else answer, entry=entry)

    return score


def _python_function(spec: str) -> tuple[ScoreFunction, float, str | None]:
    place, _, name = spec.removeprefix(PYTHON).rpartition(":")
    if not place or not name:
        raise RecipeError(f"verifier {spec!r}: write {PYTHON}file.py:function or {PYTHON}package.module:function")
    module = _module_from_file(spec, Path(place)) if place.endswith(".py") else _module_by_name(spec, place)
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise RecipeError(f"verifier {spec!r}: {place} has no function {name!r}; it has {names or 'none'}")
    seconds = getattr(module, SECONDS_NAME, PYTHON_SECONDS)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise RecipeError(f"verifier {spec!r}: {SECONDS_NAME} is {seconds!r}; give the seconds for one answer")
    trial = getattr(module, TRIAL_NAME, None)
    if trial is not None and not isinstance(trial, str):
        raise RecipeError(f"verifier {spec!r}: {TRIAL_NAME} is {trial!r}; give a response as text")
    return function, float(seconds), trial


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
    except (Exception, SystemExit) as error:
        raise RecipeError(f"verifier {spec!r}: {path} can't be imported: {type(error).__name__}: {error}") from error
    return module


def _module_by_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        hint = "is it installed, or on PYTHONPATH? A file ends in .py"
        raise RecipeError(f"verifier {spec!r}: can't import {name}: {type(error).__name__}: {error}; {hint}") from error
