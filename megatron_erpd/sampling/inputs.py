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

Reading = Literal["content", "records", "source", "verifier", "script", "tokenizer"]
"""How a stage reads an input.

content: `manifest.input_digest`. records: prompts with their answers and metadata, in whatever way they are written
down. source: the files with rollouts of another program, by their names and content. verifier: a program with the
modules beside it. script: one program's file. tokenizer: a Hugging Face folder without its weights.
"""


def reading(stage: str, name: str) -> Reading:
    """How `stage`, a command, reads the input `name`."""
    if name == "prompts":
        return "records"
    if name == "verifier":
        return "verifier"
    if stage == "import-rollouts" and name in ("tokenizer", "source"):
        return "tokenizer" if name == "tokenizer" else "source"
    return "script" if stage == "prepare" and name.endswith(".py") else "content"


def read_digest(path: Path, how: Reading) -> str:
    """The digest of an input as it is read.

    Raises:
        StageError: no such file or folder. ErpdError: prompts that can't be read.
    """
    if how == "records":
        from megatron_erpd.sampling.prompts import load_prompts, prompts_digest

        return prompts_digest(load_prompts(path))
    if how == "source" and not path.is_file() and not (path / MANIFEST).is_file():
        from megatron_erpd.data.sources import open_source, source_digest

        return source_digest(open_source(str(path)))
    if how == "tokenizer":
        return input_digest(path, without_weights)
    if how in ("content", "source"):
        return input_digest(path)
    if not path.is_file():
        raise StageError(f"{path}: no such file; check the path")
    return program_digest(path, with_modules=how == "verifier")


def input_digests(stage: str, inputs: Mapping[str, Path]) -> dict[str, str]:
    """Digests of all inputs of `stage`, a command, by their names."""
    return {name: read_digest(path, reading(stage, name)) for name, path in inputs.items()}
