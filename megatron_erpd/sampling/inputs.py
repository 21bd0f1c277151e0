"""What a stage's inputs are to it, as digests: of prompts what it reads, of programs their code, of folders the files
that count.

The plan of a run and the stages themselves both ask here, so that they agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megatron_erpd.content import program_digest, without_weights
from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST, input_digest
from megatron_erpd.sampling.task import questions_digest

Reading = Literal["content", "questions", "records", "rewards", "source", "verifier", "script", "tokenizer"]
"""How a stage reads an input.

content: `manifest.input_digest`. records: prompts with their answers and metadata, in whatever way they are written
down; questions: without these. rewards: the reward of every rollout, which is no input where it is the rollout's own.
source: the files with rollouts of another program, by their names and content. verifier: a program with the modules
beside it. script: one program's file. tokenizer: a Hugging Face folder without its weights.
"""


def reading(stage: str, name: str) -> Reading:
    """How `stage`, a command, reads the input `name`."""
    if stage == "report":  # whose inputs have the names of stages
        return "content"
    if name == "prompts":
        return "questions" if stage == "sample" else "records"
    if name == "rewards":
        return "rewards"
    if name == "verifier":
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
        from megatron_erpd.sampling.prompts import load_prompts, prompts_digest

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
