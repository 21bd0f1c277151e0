"""Verifiers: from a prompt's record and a response to a reward, or to None where no verdict could be reached.

An error inside a verifier is never read as a wrong answer, nor is a verifier that never returns: the rollout stays
unverified, the error is counted and the first one is kept for the report.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from megatron_erpd.errors import RecipeError
from megatron_erpd.launcher import without_launcher
from megatron_erpd.sampling.prompts import PromptRecord

_START_SECONDS = 300.0
"""Importing a computer algebra system on a busy machine takes a while, and so does a reward model."""
_START = """
import os, pickle, sys
questions = os.fdopen(os.dup(0), "rb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.path[:] = pickle.load(questions)
from megatron_erpd.sampling.verifier_worker import main
main(questions)
"""
QUESTIONS_PER_WORKER = 32
"""Fewer aren't worth another worker, which takes a second or two to start."""
_log = logging.getLogger(__name__)


Question = tuple[PromptRecord, str]
"""A prompt's record and a response to it."""
Verdict = tuple[float | None, str | None]
"""The reward, or None (unverified), and the error where the verifier failed or was late."""


class Verifier:
    """Scores responses, in processes of its own, which end with it.

    Args:
        spec: one of
            `math-verify`: the record's `answer` against the response's, as `math_answers.py` finds it, 1.0 or 0.0;
            `reasoning-gym:TASK`: the task's own scorer, on the text between the last <answer> and </answer>, or on the
            whole response where there is none;
            `python:path/to/file.py:function` or `python:package.module:function`: `function(record, response)` gives a
            number, or None for no verdict, within 60 seconds, or within the `VERIFIER_SECONDS` that its module sets.
        workers: processes at the most, each with the verifier loaded; None: as many as this process has cores. There is
            one for every `QUESTIONS_PER_WORKER` responses that are scored at once.

    Raises:
        RecipeError: the spec names nothing that can be loaded.

    Attributes:
        num_errors: how many responses it failed on.
        first_error: the first of those errors, as text.
    """

    def __init__(self, spec: str, workers: int | None = None) -> None:
        self.spec = spec
        self.num_errors = 0
        self.first_error: str | None = None
        self._most = len(os.sched_getaffinity(0)) if workers is None else workers
        self._workers = {0: _Worker(spec)}

    def __call__(self, record: PromptRecord, response: str) -> float | None:
        """The reward, or None (unverified) where the verifier failed, was late or gave no verdict."""
        return self.scores([(record, response)])[0][0]

    def scores(self, questions: Sequence[Question]) -> list[Verdict]:
        """The verdicts on many responses, in their order; shared among the workers. Errors are counted and told.

        Raises:
            RecipeError: the verifier returned something that is no reward.
        """
        verdicts = self.judge(questions)
        for _, error in verdicts:
            if error is not None:
                self.num_errors += 1
                if self.first_error is None:
                    self.first_error = error
                    _log.warning("%s failed on a response, which stays unverified: %s", self.spec, error)
        return verdicts

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """As `scores`, without counting."""
        count = max(1, min(self._most, len(questions) // QUESTIONS_PER_WORKER))
        if count == 1:
            return [_verdict(self._workers[0], question) for question in questions]
        verdicts: dict[int, Verdict] = {}
        left = iter(enumerate(questions))  # one thread after another takes the next
        taking = threading.Lock()

        def work(place: int) -> None:
            if place not in self._workers:
                self._workers[place] = _Worker(self.spec)
            worker = self._workers[place]
            while True:
                with taking:
                    taken = next(left, None)
                if taken is None:
                    return
                number, question = taken
                try:
                    verdicts[number] = _verdict(worker, question)
                except BaseException:
                    with taking:
                        deque(left, maxlen=0)  # nothing is left for the others
                    raise

        with ThreadPoolExecutor(count, thread_name_prefix="verifier") as pool:
            for done in [pool.submit(work, place) for place in range(count)]:
                done.result()
        return [verdicts[number] for number in range(len(questions))]

    @property
    def trial(self) -> str | None:
        """A response that it scores, by its own account, with `{answer}` in the answer's place."""
        return self._workers[0].trial


def _verdict(worker: _Worker, question: Question) -> Verdict:
    try:
        reply = worker.ask(*question)
    except OSError as problem:  # a TimeoutError is one
        return None, f"{type(problem).__name__}: {problem}"
    error = reply.get("error")
    return (reply.get("score") if error is None else None), error


class _Worker:
    """A `verifier_worker` and its time limit, which holds in C code and for programs that a verifier starts.

    A worker that is late, or that died, is replaced at the next question, and its own question gets no verdict.

    Attributes:
        seconds: how long an answer may take.
        trial: as in `Verifier`.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None
        self._start()

    def ask(self, record: PromptRecord, response: str) -> dict[str, Any]:
        """The worker's reply; raises OSError where there is none, RecipeError where the verifier can't be used."""
        if self._process is None:
            self._start()
        return self._say((record, response), self.seconds)

    def close(self) -> None:
        """Ends the process; the next question starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _start(self) -> None:
        # -P keeps the working directory off its import path, where file names are ordinary words.
        # A session of its own: the programs that a verifier starts end with it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=without_launcher(os.environ),  # it may be one of several ranks' own
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        try:
            self._write(sys.path)
            loaded = self._say(self._spec, _START_SECONDS)
            self.seconds: float = loaded["seconds"]
            self.trial: str | None = loaded["trial"]
        except OSError as error:
            raise RecipeError(f"verifier {self._spec!r} could not be loaded: {error}") from None

    def _say(self, message: object, seconds: float) -> dict[str, Any]:
        try:
            self._write(message)
            reply = self._reply(seconds)
        except OSError:
            self.close()
            raise
        if "refused" in reply:
            self.close()
            raise RecipeError(reply["refused"])
        return reply

    def _write(self, message: object) -> None:
        """Pickled: scorers of reasoning-gym depend on tuples in the metadata. What comes back, from code that saw a
        model's text, is JSON."""
        assert self._process is not None and self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _reply(self, seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        deadline, received = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while not received.endswith(b"\n"):
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise TimeoutError(f"no answer within {seconds:g} s")
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5.0)
                raise BrokenPipeError(f"its process ended (exit code {process.returncode}) without an answer")
            received += chunk
        return json.loads(received)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # a question that a dead process didn't take
                stream.close()
