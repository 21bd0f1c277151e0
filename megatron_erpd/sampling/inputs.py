"""What identifies a stage's inputs: of prompts what it reads, of programs their code, of folders the files that count.

The plan of a run and the stages themselves both ask here, so that they agree.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megatron_erpd.content import module_file, program_digest, without_weights
from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST, input_digest
from megatron_erpd.sampling.prompts import REASONING_GYM, PromptRecord, load_prompts, prompts_digest
from megatron_erpd.sources.names import local_path

_SCORERS = {"math-verify": "math_answers.py", "reasoning-gym": "verifier_worker.py"}
"""Packages of the verifiers that come with the project, and the module that asks each. Its code is part of what
identifies rewards: where it changes, rollouts that were scored with it are scored again."""
Reading = Literal["content", "questions", "records", "rewards", "source", "verifier", "script", "tokenizer"]
"""How a stage reads an input.

content: `manifest.input_digest`. records: prompts with their answers and metadata, in whatever way they are written
down; questions: without these. rewards: the reward of every rollout, which is no input where it is the rollout's own.
source: the files with rollouts of another program, by their names and content. verifier: a program with the modules
beside it, a loss of the user's as well. script: one program's file. tokenizer: a Hugging Face folder without its
weights.
"""


def reading(stage: str, name: str) -> Reading:
    """How `stage`, a command, reads the input `name`."""
    if stage == "report":  # whose inputs have the names of stages
        return "content"
    if name == "prompts":
        return "questions" if stage == "sample" else "records"
    if name == "rewards":
        return "rewards"
    if name in ("verifier", "loss"):
        return "verifier"
    if stage == "import-rollouts" and name in ("tokenizer", "source"):
        return "tokenizer" if name == "tokenizer" else "source"
    return "script" if stage == "prepare" and name.endswith(".py") else "content"


def read_digest(path: Path, how: Reading) -> str | None:
    """The digest of an input as it is read; None where it adds nothing to the others.

    Raises:
        StageError: no such file or folder. ErpdError: prompts that can't be read.
    """
    if how in ("records", "questions"):
        records = load_prompts(path)
        return prompts_digest(records) if how == "records" else questions_digest(records)
    if how == "rewards":
        from megatron_erpd.data.rewards import content_digest

        return content_digest(path)
    if how == "source":
        from megatron_erpd.sources.files import open_source, source_digest

        source = open_source(str(path))
        if source.files != (path,) and not (path / MANIFEST).is_file():
            return source_digest(source)
    if how == "tokenizer":
        return input_digest(path, without_weights)
    if how in ("content", "source"):
        return input_digest(path)
    if not path.is_file():
        raise StageError(f"{path}: no such file; check the path")
    return program_digest(path, with_modules=how == "verifier")


def input_digests(stage: str, inputs: Mapping[str, Path]) -> dict[str, str]:
    """Digests of all inputs of `stage`, a command, by their names."""
    digests = {name: read_digest(path, reading(stage, name)) for name, path in inputs.items()}
    return {name: digest for name, digest in digests.items() if digest is not None}


def verifier_file(verifier: str) -> Path | None:
    """The Python file of a `python:FILE.py:FUNCTION` verifier; None for the others."""
    match = re.fullmatch(r"python:(.+\.py):\w+", verifier)
    return Path(match[1]) if match else None


def scorer_version(verifier: str) -> str | None:
    """What else than its name decides how a verifier that comes with the project scores; None for a function of the
    user's."""
    package = verifier.partition(":")[0]
    if package not in _SCORERS:
        return None
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        installed = "not installed"
    code = program_digest(Path(__file__).with_name(_SCORERS[package]), with_modules=False)
    return f"{package} {installed}, {code[:12]}"


def verifier_identity(verifier: str) -> str:
    """SHA-256 of what a verifier is: its code and the function's name, wherever its file lies."""
    file, program = verifier_file(verifier), verifier_program(verifier)
    name = verifier if file is None else f"python:{verifier.rpartition(':')[2]}"
    code = program_digest(program) if program is not None and program.is_file() else None
    return hashlib.sha256(json.dumps([name, code, scorer_version(verifier)]).encode()).hexdigest()


def questions_digest(records: Sequence[PromptRecord]) -> str:
    """SHA-256 of what a sampler reads of records, in order: all but answers and metadata."""
    questions = [{k: v for k, v in record.items() if k not in ("answer", "metadata")} for record in records]
    return hashlib.sha256(json.dumps(questions, sort_keys=True, default=str).encode()).hexdigest()


def verifier_program(verifier: str) -> Path | None:
    """The file whose code a `python:` verifier is, of a module where it can be found without importing it; None for
    the others."""
    file = verifier_file(verifier)
    match = re.fullmatch(r"python:([\w.]+):\w+", verifier)
    return module_file(match[1]) if file is None and match else file


def prompts_path(prompts: str) -> Path | None:
    """The file or folder with the prompts, whether it exists or not; None for generated ones and those of a hub."""
    return None if prompts.startswith(REASONING_GYM) else local_path(prompts)


def prompts_identity(prompts: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """Prompts as a setting, where they are generated by name, or as an input, where they are read (the path is their
    source as it is written, which may be a data set of a hub)."""
    return ({"prompts": prompts}, {}) if prompts.startswith(REASONING_GYM) else ({}, {"prompts": Path(prompts)})


def task_identity(prompts: str, verifier: str | None) -> tuple[dict[str, Any], dict[str, Path]]:
    """Prompts and verifier as settings, where they are names, and as inputs, where they are read."""
    settings, inputs = prompts_identity(prompts)
    file = verifier_program(verifier) if verifier else None
    return {"verifier": verifier, **settings}, inputs | ({"verifier": file} if file else {})
