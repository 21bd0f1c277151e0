"""What a model may be given as. There is no network here: the hub is a stand-in that raises what the real one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from megatron_erpd.checkpoint.hugging_face.sources import HUB_FILES, resolve_source
from megatron_erpd.errors import CheckpointError


def hf_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the hub does: `answer` is a folder or an exception; `asked` is what it was asked."""
    state: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        state["asked"] = (repo_id, options)
        if isinstance(state["answer"], Exception):
            raise state["answer"]
        return str(state["answer"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def http_error(kind: type[Exception], text: str) -> Exception:
    """One of the hub's errors without the answer of a server."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    error.args = (text,)
    return error


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    assert resolve_source(str(folder), tmp_path / "scratch") == folder
    assert not (tmp_path / "scratch").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin, a pickle, which is not opened here"):
        resolve_source(str(folder), tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is a file, and not a GGUF file; give a folder"):
        resolve_source(str(folder / "pytorch_model.bin"), tmp_path)


def test_what_is_nothing_gets_a_list_of_what_can_be_given(tmp_path: Path) -> None:
    for text in (str(tmp_path / "nothing" / "there"), "a model", "one/two/three"):
        with pytest.raises(CheckpointError, match=r"no such folder or file; give a folder.*\.gguf file.*hub"):
            resolve_source(text, tmp_path)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json; give a folder"):
        resolve_source(str(tmp_path), tmp_path)
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds no config\.json but model-Q4\.gguf; give that file's own path"):
        resolve_source(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/Name-1.5_b@v1.0", "org/Name-1.5_b", "v1.0"),
        ("o/n@refs/pr/1", "o/n", "refs/pr/1"),
    ],
)
def test_a_name_on_the_hub(
    text: str, repository: str, revision: str | None, hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["answer"] = hf_folder(tmp_path / "snapshot")
    assert resolve_source(text, tmp_path) == tmp_path / "snapshot"
    name, options = hub["asked"]
    assert name == repository and options["revision"] == revision and options["allow_patterns"] == list(HUB_FILES)


def test_what_is_fetched() -> None:
    wanted = {
        *("config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
        *("merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE", "LICENSE.txt"),
    }
    unwanted = {
        *(
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "model.gguf",
            "flax_model.msgpack",
        ),
        *("modeling_mine.py", "onnx/model.onnx", "onnx/model.safetensors", "tf_model.h5", ".gitattributes"),
    }
    assert set(filter_repo_objects(wanted | unwanted, allow_patterns=list(HUB_FILES))) == wanted


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError, "403"),
            "accepted its conditions; accept them on https://huggingface.co/o/n",
        ),
        (http_error(errors.RepositoryNotFoundError, "404"), "neither a folder here nor a model on the hub"),
        (http_error(errors.RevisionNotFoundError, "404"), "no revision 'r'; name a branch, tag or commit"),
        (errors.HFValidationError("a name"), "no name that a model can have"),
        (errors.LocalEntryNotFoundError("no\nconnection"), r"can't be fetched \(LocalEntryNotFoundError: no\); check"),
        (ConnectionError("refused"), r"can't be fetched \(ConnectionError: refused\)"),
    ],
)
def test_what_the_hub_says_no_to(error: Exception, message: str, hub: dict[str, Any], tmp_path: Path) -> None:
    hub["answer"] = error
    with pytest.raises(CheckpointError, match=f"^o/n@r: .*{message}"):
        resolve_source("o/n@r", tmp_path)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, told that it is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"^org/name: no folder here, and can't be fetched .*check the path"):
        resolve_source("org/name", tmp_path)


def test_a_model_without_safetensors_on_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["answer"] = folder = hf_folder(tmp_path / "snapshot")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        resolve_source("org/name", tmp_path)
