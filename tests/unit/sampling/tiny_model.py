"""The quickstart's model with random weights and two layers, as a Hugging Face folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


def quickstart_module(name: str) -> ModuleType:
    """`examples/quickstart/NAME.py`: scripts there import one another by name, as when they are run."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(QUICKSTART))


def write_model(folder: Path, seed: int) -> Path:
    """Writes model and tokenizer; responses of these weights end by themselves after about ten tokens."""
    prepare = quickstart_module("prepare")
    tokenizer = prepare.build_tokenizer()
    prepare.build_model(seed, len(tokenizer), num_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
