"""GGUF files, whose packed weights `transformers` turns into floats, as Hugging Face folders."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from megatron_erpd.errors import CheckpointError
from megatron_erpd.files import new_folder

NEEDED = ("gguf", "accelerate")
"""What `transformers` wants for reading GGUF."""

_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_DIGEST_CHARACTERS = 12


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def unpacked_gguf(file: Path, folder: Path, dtype: str = "float32") -> Path:
    """A GGUF file as a Hugging Face folder in `folder`; one that is there for the same content is taken again.

    Args:
        file: a whole model, not one of several files.
        dtype: `float32` or `bfloat16`.

    Returns:
        The folder, named after the file, its content and the type. It appears by rename, so one that is there is whole.

    Raises:
        CheckpointError: the file is no GGUF file or one of several, or `transformers` can't read all of it.
    """
    if not is_gguf(file):
        raise CheckpointError(f"{file}: doesn't begin as a GGUF file does; fetch it again")
    if _SPLIT.search(file.name):
        raise CheckpointError(f"{file}: is one of several files; join them by `llama-gguf-split --merge`")
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:_DIGEST_CHARACTERS]
    output = folder / f"{file.stem}-{digest}-{dtype}"
    if not output.is_dir():
        write_folder(*load_gguf(file, dtype), output)
    return output


def load_gguf(file: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file.

    Raises:
        CheckpointError: `transformers` lacks a package for it, doesn't know the architecture, or finds not all weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"{file}: reading GGUF needs {', '.join(missing)}; pip install {' '.join(missing)}")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the reader has errors of many kinds for files that are cut off or of another kind
        raise CheckpointError(
            f"{file}: can't be read ({type(error).__name__}: {error}); take the model's safetensors instead"
        ) from error
    lacking = sorted(found["missing_keys"]) + sorted(str(item) for item in found.get("mismatched_keys", ()))
    if lacking:
        raise CheckpointError(
            f"{file}: has nothing that fits {lacking[0]} ({len(lacking)} such weights); take the model's safetensors "
            "instead"
        )
    # The weights are floats now; transformers still takes the model for a quantized one, which it refuses to save.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file's own title for the model, which is not the name of a folder.
    model.config.__dict__.pop("_model_name_or_path", None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def write_folder(model: Any, tokenizer: Any, output: Path) -> None:
    """Writes a model of `transformers` and its tokenizer as a folder with safetensors, by rename when it is whole."""
    with new_folder(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
