"""Which files are the weights of a folder: what every program reads alike is accepted, all else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_erpd.errors import CheckpointError
from megatron_erpd.model_folder import INDEX, SINGLE, is_of_weights, read_tensors, weight_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"

Make = Callable[[Path], None]


def single(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    save_file({"a": np.ones(2), "b": np.ones(3)}, folder / SINGLE)


def sharded(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: np.ones(2)}, folder / shard)
    index(folder, dict(zip("ab", SHARDS, strict=True)))


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def files(*names: str, text: str = "") -> Make:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    return make


def configured(**values: object) -> Make:
    return lambda folder: (folder / "config.json").write_text(json.dumps(values)) and None


def indexed(weight_map: object) -> Make:
    return lambda folder: index(folder, weight_map)


ELSEWHERE = ("pytorch_model.bin", "original/model.safetensors", "model.gguf", ".cache.safetensors", "tf_model.h5")
"""What no program takes for the weights while there are safetensors files."""


def of_the_cache(folder: Path) -> None:
    """As `huggingface_hub` keeps a model: links to files with other names."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(SHARDS):
        (folder / shard).rename(blobs / str(number))
        (folder / shard).symlink_to(blobs / str(number))


@pytest.mark.parametrize(
    ("make", "add", "expected"),
    [
        (single, files(), [SINGLE]),
        (sharded, files(), SHARDS),
        (single, files(*ELSEWHERE), [SINGLE]),
        (sharded, files(*ELSEWHERE), SHARDS),
        (sharded, files("consolidated.safetensors", "params.json", "consolidated.safetensors.index.json"), SHARDS),
        (sharded, files("model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"), SHARDS),
        (single, files("model.safetensors.index.fp16.json"), [SINGLE]),
        (single, indexed({"a": SINGLE, "b": SINGLE}), [SINGLE]),
        (sharded, of_the_cache, SHARDS),
    ],
)
def test_what_every_program_reads_alike(make: Make, add: Make, expected: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    add(folder)
    assert [path.name for path in weight_files(folder)] == list(expected)
    assert read_tensors(folder).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("make", "add", "words"),
    [
        (sharded, single, r"two sets of weights, model\.safetensors and the 2 files.*remove model\.safetensors, or"),
        (sharded, files("model-00001-of-00003.safetensors"), r"holds model-00001-of-00003.*remove it"),
        (single, files(*SHARDS), r"holds model-00001.* beside model\.safetensors.*remove model-00001"),
        (single, files("consolidated.safetensors"), "remove consolidated"),
        (single, files("model.fp16.safetensors"), "remove model.fp16"),
        (single, files("ema.SAFETENSORS"), "remove ema.SAFETENSORS"),
        (sharded, files("Model.safetensors"), r"Model\.safetensors: readers look for model\.safetensors"),
        (single, files("MODEL.SAFETENSORS.INDEX.JSON"), "rename it to model.safetensors.index.json"),
        (single, indexed({"a": SINGLE, "b": SHARDS[0]}), "two sets of weights"),
        (single, files("adapter_config.json"), "an adapter beside the weights.*remove adapter_config"),
        (sharded, files("adapter_config.json", "adapter_model.safetensors"), "remove adapter_config.json, adapter_mo"),
        (single, files("adapter_model.bin"), "remove adapter_model.bin"),
        (single, files("adapters.safetensors"), "remove adapters.safetensors"),
        (sharded, files("Adapter_Config.json"), "remove Adapter_Config.json"),
        (
            files("adapter_config.json", text='{"base_model_name_or_path": "a/b"}'),
            files(),
            "an adapter of a/b, and not",
        ),
        (sharded, indexed({"a": "../model.safetensors"}), r"names \.\./model\.safetensors, which is no"),
        (sharded, indexed({"a": "/tmp/model.safetensors"}), "names /tmp/model.safetensors, which is no"),
        (sharded, indexed({"a": "sub/model.safetensors"}), "names sub/model.safetensors, which is no"),
        (sharded, indexed({"a": "pytorch_model.bin"}), "names pytorch_model.bin, which is no"),
        (sharded, indexed({"a": SHARDS[0], "b": SHARDS[1], "c": "more.safetensors"}), "more.safetensors: missing"),
        (sharded, indexed({}), "not an index of weights"),
        (sharded, indexed({"a": 3}), "not an index of weights"),
        (sharded, lambda folder: (folder / INDEX).write_text("[" * 100_000), "not an index of weights"),
        (files(INDEX, text=POINTER), files(), "is a pointer of Git LFS"),
        (single, configured(quantization_config={"bits": 4}), "quantization_config is set"),
        (single, configured(transformers_weights="other.safetensors"), "transformers_weights is set"),
        (files("model.fp16.safetensors"), files(), r"only as a variant \(model\.fp16\.safetensors\)"),
        (files("model.safetensors.index.fp16.json"), files(), "only as a variant"),
        (files("consolidated.safetensors"), files(), "but consolidated.safetensors; fetch the files in the format"),
        (files(SHARDS[0]), files(), "fetch the index too"),
        (files("pytorch_model.bin"), files(), "a pickle"),
        (files("model.gguf"), files(), "give that file's own path"),
        (files("config.json"), files(), "has neither"),
    ],
)
def test_what_is_refused(make: Make, add: Make, words: str, tmp_path: Path) -> None:
    make(tmp_path)
    add(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        weight_files(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (files(SHARDS[1], text=POINTER), "00002-of-00002.safetensors: is a pointer of Git LFS"),
        (files(SHARDS[1], text="12345678{}"), "00002-of-00002.safetensors: not a readable safetensors file"),
        (lambda folder: save_file({"a": np.ones(2), "b": np.ones(2)}, folder / SHARDS[1]), "tensor a is not named in"),
        (lambda folder: save_file({"c": np.ones(2)}, folder / SHARDS[1]), "tensor b is named in"),
    ],
)
def test_files_that_are_not_what_the_index_says(change: Make, words: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read_tensors(tmp_path)


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SHARDS[0]).unlink()
    (tmp_path / SHARDS[0]).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: missing"):
        weight_files(tmp_path)


def test_what_belongs_to_weights_by_its_name() -> None:
    weights = [
        "adapter_config.json",
        "model.safetensors.index.fp16.json",
        "consolidated.safetensors.index.json",
        "a.BIN",
    ]
    assert all(is_of_weights(name) for name in weights)
    kept = ["config.json", "tokenizer.model", "tokenizer.json", "params.json", "README.md", "index.json"]
    assert not any(is_of_weights(name) for name in kept)
