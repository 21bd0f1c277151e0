import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.prompts import PromptRecord, load_prompts
from megatron_erpd.sampling.verifiers import QUESTIONS_PER_WORKER, Verifier


def record(answer: object, prompt: str = "?", **metadata: object) -> PromptRecord:
    return PromptRecord(prompt=prompt, answer=answer, metadata=metadata)


@pytest.fixture(scope="module")
def math_verify() -> Verifier:
    return Verifier("math-verify")


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("1/2", r"so it is \boxed{0.5}", 1.0),
        (r"\frac{1}{2}", "The answer is 1/2.", 1.0),
        (r"$\frac{1}{2}$", r"$\frac{2}{4}$", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        (42, "The answer is 42.", 1.0),
        ("42", "The answer is 43.", 0.0),
        ("42", "I don't know", 0.0),
        ("42", "", 0.0),
    ],
)
def test_math_verdicts(math_verify, answer, response, reward):
    assert math_verify(record(answer), response) == reward


def test_math_works_in_a_thread(math_verify):
    """SIGALRM, which math-verify would use by itself, only works in the main one."""
    rewards: list[float | None] = []
    thread = threading.Thread(target=lambda: rewards.append(math_verify(record("3"), r"\boxed{3}")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_math_without_a_readable_answer_gives_no_verdict():
    verifier = Verifier("math-verify")
    assert verifier(record("$"), "1") is None
    assert verifier(record(None), "1") is None
    assert verifier.num_errors == 2 and "can't be read" in (verifier.first_error or "")


def test_math_that_takes_too_long_gives_no_verdict_and_the_next_one_does():
    verifier = Verifier("math-verify")
    assert verifier(record("3"), "3") == 1.0
    verifier._workers[0].seconds = 0.2
    ((reward, error),) = verifier.scores([(record("1"), r"\boxed{9^{9^{9^9}}}")])
    assert reward is None and error == "TimeoutError: no answer within 0.2 s"
    assert verifier(record("4"), "4") == 1.0  # a new process, with the usual time


def test_a_process_that_died_gives_no_verdict_and_is_replaced():
    verifier = Verifier("math-verify")
    assert verifier(record("3"), "3") == 1.0
    process = verifier._workers[0]._process
    assert process is not None
    process.kill()
    process.wait()
    ((reward, error),) = verifier.scores([(record("3"), "3")])
    assert reward is None and "BrokenPipeError" in (error or "")
    assert verifier(record("3"), "3") == 1.0


def test_reasoning_gym_scores_its_own_tasks():
    verifier = Verifier("reasoning-gym:chain_sum")
    for prompt in load_prompts("reasoning-gym:chain_sum?size=3&seed=5"):
        assert verifier(prompt, str(prompt["answer"])) == 1.0
        assert verifier(prompt, f"<answer> 0 </answer> no, <answer>{prompt['answer']}</answer>, I think") == 1.0
        wrong = verifier(prompt, "<answer>-123456</answer>")
        assert wrong is not None and wrong < 0.1


def test_a_reasoning_gym_scorer_that_takes_too_long_gives_no_verdict():
    """This task's evaluates whatever expression it is given."""
    verifier = Verifier("reasoning-gym:countdown")
    (prompt,) = load_prompts("reasoning-gym:countdown?size=1")
    assert verifier(prompt, str(prompt["answer"])) == 1.0
    verifier._workers[0].seconds = 0.5
    ((reward, error),) = verifier.scores([(prompt, "9**9**9**9")])
    assert reward is None and "TimeoutError" in (error or "")


def test_a_reasoning_gym_scorer_gets_its_own_metadata():
    """This task's answer is a tuple of tuples, which JSON would make lists."""
    verifier = Verifier("reasoning-gym:rearc")
    (prompt,) = load_prompts("reasoning-gym:rearc?size=1")
    assert verifier(prompt, str(prompt["answer"])) == 1.0


def test_unknown_reasoning_gym_task_suggests():
    with pytest.raises(RecipeError, match="did you mean .*chain_sum"):
        Verifier("reasoning-gym:chain")
    with pytest.raises(RecipeError, match="no task"):
        Verifier("reasoning-gym:")


def test_functions_from_files_and_modules(tmp_path):
    file = tmp_path / "scorers.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n    value: float\n"
        "def length(record, response):\n    return Box(len(response)).value\n"
        "def flag(record, response):\n    return response == record['answer']\n"
        "def silent(record, response):\n    return None\n"
        "def infinite(record, response):\n    return float('nan')\n"
        "def broken(record, response):\n    raise KeyError('x')\n"
        "def text(record, response):\n    return 'good'\n"
    )
    make = {name: Verifier(f"python:{file}:{name}") for name in ("length", "flag", "silent", "infinite", "broken")}
    assert make["length"](record(""), "abc") == 3.0
    assert make["flag"](record("a"), "a") == 1.0 and make["flag"](record("a"), "b") == 0.0
    assert make["silent"](record(""), "a") is None and make["silent"].num_errors == 0
    assert make["infinite"](record(""), "a") is None
    assert make["broken"](record(""), "a") is None
    assert make["broken"].num_errors == 1 and "KeyError" in (make["broken"].first_error or "")
    with pytest.raises(RecipeError, match="must return a number or None"):
        Verifier(f"python:{file}:text")(record(""), "a")
    with pytest.raises(RecipeError, match="no function 'lenth'.*length"):
        Verifier(f"python:{file}:lenth")
    assert Verifier("python:operator:eq").spec == "python:operator:eq"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mathverify", "math-verify"),
        ("python:score", "file.py:function"),
        ("python:no/such/file.py:score", "no such file"),
        ("python:no_such_package.module:score", "can't import no_such_package"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(RecipeError, match=message):
        Verifier(spec)


def test_a_file_that_fails_on_import_is_named(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("1 / 0\n")
    with pytest.raises(RecipeError, match=r"bad\.py can't be imported: ZeroDivisionError"):
        Verifier(f"python:{file}:score")


FAULTY = """
import ctypes, os, subprocess, sys, time
VERIFIER_SECONDS = 1.5
def score(record, response):
    print("to standard output")
    if response == "sleep":
        time.sleep(600)
    if response == "sleep in a program":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)", record["metadata"]["mark"]])
    if response == "read":
        return len(subprocess.run([sys.executable, "-c", "print(input())"], stderr=subprocess.DEVNULL).args)
    if response == "sleep in C":  # where no other thread of Python can run
        ctypes.PyDLL(None).sleep(600)
    if response == "exit":
        sys.exit(0)
    if response == "exit at once":
        os._exit(0)
    if response == "crash":
        ctypes.string_at(0)
    return float(response)
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    file = tmp_path_factory.mktemp("faulty") / "faulty.py"
    file.write_text(FAULTY)
    return Verifier(f"python:{file}:score")


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("sleep", "TimeoutError: no answer within 1.5 s"),
        ("sleep in C", "TimeoutError: no answer within 1.5 s"),
        ("exit", "SystemExit: 0"),
        ("exit at once", "BrokenPipeError: its process ended (exit code 0) without an answer"),
        ("crash", "BrokenPipeError: its process ended (exit code -11) without an answer"),
    ],
)
def test_a_function_that_never_returns_gives_no_verdict_and_the_next_one_does(faulty, response, error):
    assert faulty.scores([(record(None), response), (record(None), "0.5")]) == [(None, error), (0.5, None)]


def test_the_programs_of_a_function_have_nothing_to_read(faulty):
    """Above all not the next question."""
    assert faulty(record(None), "read") == 3.0 and faulty(record(None), "0.5") == 0.5


def running(mark: str) -> list[int]:
    """Processes with a word in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def eventually(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_the_programs_of_a_late_function_end_with_it(faulty):
    mark = f"late-verifier-{os.getpid()}"
    assert faulty(record(None, mark=mark), "sleep in a program") is None
    assert eventually(lambda: not running(mark))


PARENT = """
import sys
from megatron_erpd.sampling.verifiers import Verifier
verifier = Verifier(sys.argv[1])
verifier({"prompt": "?", "answer": None, "metadata": {"mark": "orphan"}}, sys.argv[2])
"""


@pytest.mark.parametrize(("response", "seconds"), [("sleep", 2), ("sleep in a program", 2), ("sleep in C", 10)])
def test_a_worker_without_its_parent_ends(faulty, response, seconds):
    """The parent is killed while the function sleeps, so that nobody is left to keep its time."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, faulty.spec, response], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stderr is not None
    assert parent.stderr.readline() == "to standard output\n"
    parent.kill()
    parent.communicate(timeout=seconds)  # until nobody has its streams open
    assert eventually(lambda: not running("orphan"))


@pytest.mark.parametrize("value", ["0", "-1", "'long'", "float('inf')", "True"])
def test_times_that_are_none_are_refused(tmp_path, value):
    file = tmp_path / "timed.py"
    file.write_text(f"VERIFIER_SECONDS = {value}\ndef score(record, response):\n    return 1.0\n")
    with pytest.raises(RecipeError, match="VERIFIER_SECONDS is .*; give the seconds for one answer"):
        Verifier(f"python:{file}:score")


SHARED = """
import os, time
def score(record, response):
    if response == "text":
        return "a word"
    if response == "crash":
        os._exit(1)
    time.sleep(float(response) / 1000)
    return os.getpid() if record["answer"] == "who" else float(response)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """Of up to three processes."""
    file = tmp_path_factory.mktemp("shared") / "shared.py"
    file.write_text(SHARED)
    return Verifier(f"python:{file}:score", workers=3)


def test_workers_share_many_responses_and_verdicts_keep_their_order(shared: Verifier) -> None:
    lengths = [(7 * number) % 13 for number in range(3 * QUESTIONS_PER_WORKER)]
    assert shared.scores([(record(None), str(length)) for length in lengths]) == [(length, None) for length in lengths]
    who = [reward for reward, _ in shared.scores([(record("who"), "5")] * len(lengths))]
    assert 1 < len(set(who)) <= 3 and os.getpid() not in who
    # Fewer are not worth another process.
    alone = shared.scores([(record("who"), "0")] * (2 * QUESTIONS_PER_WORKER - 1))
    assert len({reward for reward, _ in alone}) == 1


def test_of_a_worker_that_dies_one_response_gets_no_verdict(shared: Verifier) -> None:
    responses = ["1"] * (2 * QUESTIONS_PER_WORKER)
    responses[5] = responses[40] = "crash"
    before = shared.num_errors
    verdicts = shared.scores([(record(None), response) for response in responses])
    assert [number for number, (reward, _) in enumerate(verdicts) if reward is None] == [5, 40]
    assert shared.num_errors == before + 2 and "BrokenPipeError" in (shared.first_error or "")


def test_what_is_no_reward_ends_all_workers(shared: Verifier) -> None:
    responses = ["text"] + ["50"] * (2 * QUESTIONS_PER_WORKER)
    started = time.monotonic()
    with pytest.raises(RecipeError, match="returned 'a word'; it must return a number or None"):
        shared.scores([(record(None), response) for response in responses])
    assert time.monotonic() - started < 0.05 * len(responses) / 2  # the others were not asked
