"""What a model may be given as: a Hugging Face folder, a GGUF file, or the name of a model on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_erpd.checkpoint.hugging_face.gguf import is_gguf, unpacked_gguf
from megatron_erpd.errors import CheckpointError, first_line
from megatron_erpd.model_folder import refuse_adapter, weight_files

ACCEPTED = (
    "give a folder with config.json and safetensors files, a .gguf file, or the name of a model on the Hugging Face "
    "hub (ORGANISATION/NAME or ORGANISATION/NAME@REVISION)"
)

HUB_FILES = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md"),
)
"""What is fetched of a model on the hub: no pickle, no code, no weights in another format or twice."""

_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve_source(text: str | Path, scratch: Path, dtype: str = "float32") -> Path:
    """The Hugging Face folder with safetensors that a user means. One process calls this; others wait for it.

    Args:
        text: a folder, which is taken as it is; a `.gguf` file, which is turned into a folder in `scratch`; or the name
            of a model on the hub, which is fetched into the cache of `huggingface_hub`.
        scratch: folder for what has to be written; made if needed. What is there already, whole, is taken again.
        dtype: `float32` or `bfloat16`, of the weights of a GGUF file.

    Returns:
        A folder with `config.json` and one set of weights, which `HfWeights` opens. Nothing of the source is executed.

    Raises:
        CheckpointError: it is none of these (says what can be given), the weights are pickles, or it can't be fetched.
    """
    path = Path(text)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix != ".gguf" and not is_gguf(path):
            raise CheckpointError(f"{path}: is a file, and not a GGUF file; {ACCEPTED}")
        return unpacked_gguf(path, scratch, dtype)
    name = _HUB_NAME.fullmatch(str(text))
    if name is None:
        raise CheckpointError(f"{text}: no such folder or file; {ACCEPTED}")
    return _folder(fetch(name["repository"], name["revision"]))


def fetch(repository: str, revision: str | None = None) -> Path:
    """A model of the hub as a folder in the cache of `huggingface_hub`; what is there already isn't fetched again.

    Args:
        repository: ORGANISATION/NAME.
        revision: branch, tag or commit; default: the main branch.

    Raises:
        CheckpointError: there is no such model or revision, its conditions weren't accepted, or there is no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = repository if revision is None else f"{repository}@{revision}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except GatedRepoError as error:  # a RepositoryNotFoundError too
        raise CheckpointError(
            f"{what}: is given only to those who accepted its conditions; accept them on "
            f"https://huggingface.co/{repository} and set HF_TOKEN to a token of that account ({first_line(error)})"
        ) from None
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what}: neither a folder here nor a model on the hub, or one that HF_TOKEN has no access to; {ACCEPTED} "
            f"({first_line(error)})"
        ) from None
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{what}: the model has no revision {revision!r}; name a branch, tag or commit ({first_line(error)})"
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{what}: no name that a model can have ({first_line(error)}); {ACCEPTED}") from None
    except Exception as error:  # of the network library, whichever that is, and of the file system
        raise CheckpointError(
            f"{what}: no folder here, and can't be fetched ({type(error).__name__}: {first_line(error)}); check the "
            "path, the network and the free space, or fetch the model on another machine and give its folder"
        ) from error


def _folder(path: Path) -> Path:
    """A folder that has what an import needs."""
    refuse_adapter(path)
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if files:
            raise CheckpointError(f"{path}: holds no config.json but {files[0]}; give that file's own path")
        raise CheckpointError(f"{path}: holds no config.json; {ACCEPTED}")
    weight_files(path)  # refuses what isn't one set of weights
    return path
