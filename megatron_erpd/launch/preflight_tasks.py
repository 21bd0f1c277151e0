"""Checks prompts and verifiers before a run: whether they can be read, whether prompts and responses fit the model, and
whether a trial answer gets a reward."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.errors import ErpdError
from megatron_erpd.recipe.requests import Evaluate, Sample, Select, TrainOnPolicy
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.sampling.inputs import prompts_path, verifier_file
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.settings import ChatSettings

_SECTIONS = {"select": "selection", "evaluate": "evaluation"}
_ENCODED_CHARACTERS = 4_000_000
"""Of so much text all prompts are encoded, in a few seconds; of more, the longest ones."""
_TRIED_RECORDS = 3
_TRIAL_FORMS = (
    "{answer}",
    "The answer is {answer}.",
    "\\boxed{{{answer}}}",
    "<answer>{answer}</answer>",
    "<think>\nAs asked.\n</think>\n\nThe answer is {answer}.\n\n<answer>{answer}</answer>\n\n\\boxed{{{answer}}}\n\n"
    "Final answer: {answer}\n\n#### {answer}",
    "```python\n{answer}\n```",
)
"""How a response may give an answer; every verifier is to know one of them, or to name its own."""


@dataclass(frozen=True)
class Task:
    """What a stage of a run samples, and how it is scored.

    Attributes:
        where: the recipe's section.
        prompts: as in `load_prompts`.
        limit: prompts that are used; None for all.
        verifier: as in `Verifier`; None where nothing is scored.
        chat: whether and how prompts are put into the chat template.
        max_new_tokens: of a response.
        trains: whether the responses are trained on: they must fit the trainings too.
    """

    where: str
    prompts: str
    limit: int | None
    verifier: str | None
    chat: ChatSettings
    max_new_tokens: int
    trains: bool

    @classmethod
    def of(cls, stage: Stage, rounds: int) -> Task | None:
        """That of a stage; None where it samples nothing."""
        request = stage.request
        match request:
            case Sample():
                where, limit = "rollouts", request.num_prompts and request.num_prompts * rounds
            case TrainOnPolicy():
                where, limit = stage.name.replace("/", "."), request.num_prompts
            case Select() | Evaluate():
                where, limit = _SECTIONS[request.command], request.settings.num_prompts
            case _:
                return None
        settings, trains = request.settings, isinstance(request, Sample | TrainOnPolicy)
        return cls(where, request.prompts, limit, request.verifier, settings, settings.max_new_tokens, trains)


def task_problems(
    tasks: Sequence[Task], model: Path | None, runs_verifiers: bool, to_be_prepared: Sequence[Path] = ()
) -> Iterator[str]:
    """What is wrong with the tasks of a run.

    Args:
        model: Hugging Face folder of the first base. Without one that can be read, lengths are not checked.
        runs_verifiers: a verifier may be started here; otherwise its file is only read.
        to_be_prepared: folders in which nothing is final yet.
    """
    judged: set[tuple[str, str]] = set()
    for task in tasks:
        source = prompts_path(task.prompts)
        if source is not None and not _is_there(source, to_be_prepared):
            records: list[PromptRecord] = []
        else:
            try:
                records = _load(task)
            except ErpdError as error:
                yield f"{task.where}.prompts: {error}"
                continue
            if model is not None:
                yield from _length_problems(task, records, model)
        file = verifier_file(task.verifier) if task.verifier else None
        if task.verifier is None or (task.verifier, task.prompts) in judged:
            continue
        judged.add((task.verifier, task.prompts))
        if file is not None and not _is_there(file, to_be_prepared):
            continue
        if (why := _verifier_problem(task.verifier, records, runs_verifiers)) is not None:
            yield f"{task.where}.verifier: {why}"


def _is_there(path: Path, to_be_prepared: Sequence[Path]) -> bool:
    """False for what is told as a missing path, or still to be prepared."""
    return path.exists() and not any(path.is_relative_to(folder) for folder in to_be_prepared)


def _load(task: Task) -> list[PromptRecord]:
    from megatron_erpd.sampling.prompts import load_prompts

    return load_prompts(task.prompts, task.limit, verifier=task.verifier)


def _length_problems(task: Task, records: Sequence[PromptRecord], model: Path) -> Iterator[str]:
    """Prompts that can't be encoded, or that leave no room for the longest response."""
    from megatron_erpd.checkpoint.mapping.config import context_lengths
    from megatron_erpd.sampling.prompts import encode_prompts, place_of
    from megatron_erpd.sources.tokenizer import load_tokenizer

    try:
        exact, positions = context_lengths(model)
        tokenizer = load_tokenizer(model)
    except ErpdError:
        return  # told of the model
    chosen = sorted(range(len(records)), key=lambda i: -len(str(records[i]["prompt"])))
    if sum(len(str(record["prompt"])) for record in records) > _ENCODED_CHARACTERS:
        chosen = chosen[: max(1, _ENCODED_CHARACTERS // len(str(records[chosen[0]]["prompt"])))]
    try:
        encoded = encode_prompts(tokenizer, [records[i] for i in chosen], task.chat)
    except ErpdError as error:
        yield f"{task.where}.prompts: {task.prompts}: {error}"
        return
    length, at = max((len(ids), -i) for i, ids in zip(chosen, encoded, strict=True))
    limit = exact if task.trains else positions
    if length + task.max_new_tokens > limit:
        has = f"{place_of(records[-at], 1 - at)} has {length} tokens"
        room = f"the model has {limit} positions" + " within its sliding window" * (limit < positions)
        if length < limit:
            yield (
                f"{task.where}.max_new_tokens {task.max_new_tokens}: {has}, together {length + task.max_new_tokens}, "
                f"and {room}; lower it to {limit - length}, or drop long prompts"
            )
        else:
            yield f"{task.where}.prompts: {has}, and {room}; drop long prompts"


def _verifier_problem(spec: str, records: Sequence[PromptRecord], runs: bool) -> str | None:
    """Why a verifier can't be used; None where it gives some reward for some trial answer, or nothing can be tried."""
    file = verifier_file(spec)
    if not runs:
        return None if file is None else _unreadable(spec, file)
    from megatron_erpd.sampling.verifiers import Verifier

    try:
        verifier = Verifier(spec)
        tried = sorted(records, key=lambda record: record["answer"] is None)[:_TRIED_RECORDS]
        why = ""
        for record in tried:
            for response in _responses(record, verifier.trial):
                reward, error = verifier.judge([(record, response)])[0]
                if reward is not None:
                    return None
                why = why or _no_reward(record, response, error)
    except ErpdError as error:
        return str(error)
    return f"{spec}: {why}" if why else None


def _responses(record: PromptRecord, own: str | None) -> Iterator[str]:
    answer = record["answer"]
    text = "" if answer is None else str(answer)
    if own is not None:
        yield own.replace("{answer}", text)
        return
    for form in _TRIAL_FORMS:
        yield form.format(answer=text)


def _no_reward(record: PromptRecord, response: str, error: str | None) -> str:
    from megatron_erpd.sampling.prompts import place_of, prompt_text

    where = f"for {place_of(record, 1)} ({_shortened(prompt_text(record))}) and the response {_shortened(response)}"
    what = f"fails {where}: {error}" if error else f"gives no reward (None, or no finite number) {where}"
    return (
        f"{what}; nor does another way to write the answer get one. Correct it, or, where it reads answers of a form "
        "of its own, put a response that it scores into its file, as VERIFIER_TRIAL = 'Result: {answer}'"
    )


def _shortened(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 3] + "...")


def _unreadable(spec: str, file: Path) -> str | None:
    """What can be said of a verifier's file without running it."""
    name = spec.rpartition(":")[2]
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (SyntaxError, ValueError, OSError) as error:
        return f"{file}: can't be read as Python ({error})"
    names = set(_bound(tree.body))
    return None if name in names or "*" in names else f"{file}: has no function {name!r}"


def _bound(body: Sequence[Any]) -> Iterator[str]:
    """The names that a module's statements bind; `*` where they can't all be told."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        else:
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            for inner in ast.walk(node):  # under an `if` or a `try`
                if inner is not node and isinstance(inner, ast.FunctionDef | ast.Import | ast.ImportFrom):
                    yield from _bound([inner])
