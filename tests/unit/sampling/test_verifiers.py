import threading

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.prompts import PromptRecord, load_prompts
from megatron_erpd.sampling.verifiers import MathVerifier, Verifier, get_verifier


def record(answer: object, prompt: str = "?", **metadata: object) -> PromptRecord:
    return PromptRecord(prompt=prompt, answer=answer, metadata=metadata)


@pytest.fixture(scope="module")
def math_verify() -> Verifier:
    return get_verifier("math-verify")


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
    verifier = get_verifier("math-verify")
    assert verifier(record("$"), "1") is None
    assert verifier(record(None), "1") is None
    assert verifier.num_errors == 2 and "can't be read" in (verifier.first_error or "")


def test_math_that_takes_too_long_gives_no_verdict_and_the_next_one_does():
    scorer = MathVerifier()
    verifier = Verifier("math-verify", scorer)
    assert verifier(record("3"), "3") == 1.0
    scorer._seconds = 0.2
    assert verifier(record("1"), r"\boxed{9^{9^{9^9}}}") is None
    assert "TimeoutError" in (verifier.first_error or "")
    scorer._seconds = 20.0
    assert verifier(record("4"), "4") == 1.0


def test_a_math_process_that_died_gives_no_verdict_and_is_replaced():
    scorer = MathVerifier()
    verifier = Verifier("math-verify", scorer)
    assert verifier(record("3"), "3") == 1.0
    assert scorer._process is not None
    scorer._process.kill()
    scorer._process.wait()
    assert verifier(record("3"), "3") is None
    assert verifier(record("3"), "3") == 1.0
    scorer.close()


def test_reasoning_gym_scores_its_own_tasks():
    verifier = get_verifier("reasoning-gym:chain_sum")
    for prompt in load_prompts("reasoning-gym:chain_sum?size=3&seed=5"):
        assert verifier(prompt, str(prompt["answer"])) == 1.0
        assert verifier(prompt, f"<answer> 0 </answer> no, <answer>{prompt['answer']}</answer>, I think") == 1.0
        wrong = verifier(prompt, "<answer>-123456</answer>")
        assert wrong is not None and wrong < 0.1


def test_unknown_reasoning_gym_task_suggests():
    with pytest.raises(RecipeError, match="did you mean .*chain_sum"):
        get_verifier("reasoning-gym:chain")
    with pytest.raises(RecipeError, match="no task"):
        get_verifier("reasoning-gym:")


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
    make = {name: get_verifier(f"python:{file}:{name}") for name in ("length", "flag", "silent", "infinite", "broken")}
    assert make["length"](record(""), "abc") == 3.0
    assert make["flag"](record("a"), "a") == 1.0 and make["flag"](record("a"), "b") == 0.0
    assert make["silent"](record(""), "a") is None and make["silent"].num_errors == 0
    assert make["infinite"](record(""), "a") is None
    assert make["broken"](record(""), "a") is None
    assert make["broken"].num_errors == 1 and "KeyError" in (make["broken"].first_error or "")
    with pytest.raises(RecipeError, match="must return a number or None"):
        get_verifier(f"python:{file}:text")(record(""), "a")
    with pytest.raises(RecipeError, match="no function 'lenth'.*length"):
        get_verifier(f"python:{file}:lenth")
    assert get_verifier("python:operator:eq").spec == "python:operator:eq"


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
        get_verifier(spec)


def test_a_file_that_fails_on_import_is_named(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("1 / 0\n")
    with pytest.raises(RecipeError, match=r"bad\.py can't be imported: ZeroDivisionError"):
        get_verifier(f"python:{file}:score")
