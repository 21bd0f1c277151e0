"""A tokenizer that can't be the model's is refused with the file that is missing or wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.errors import CheckpointError
from megatron_erpd.sources.tokenizer import check_end, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a family for which `transformers` makes an empty tokenizer where there are no files."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("qwen")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the cat sat on the mat"] * 9, vocab_size=262, special_tokens=[], show_progress=False)
    trained.save_model(str(folder))
    trained.save(str(folder / "tokenizer.json"))
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    return folder


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, text: str, *absent: str) -> Change:
    return lambda folder: (without(*absent)(folder), (folder / name).write_text(text))


def configured(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def empty(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_something_must_end_a_response(name: str, qwen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(
        CheckpointError, match="no eos_token_id in generation_config.json, config.json or the tokenizer"
    ):
        check_end(folder)
    configured(name, **({"eos_token": "a"} if name.startswith("tok") else {"eos_token_id": 5}))(folder)
    check_end(folder)


ALL = ("tokenizer.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize("change", [without(), without("vocab.json", "merges.txt"), without("tokenizer.json")])
def test_whole_ones(change: Change, qwen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen, tmp_path / "model")
    change(folder)
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("the cat")) == "the cat"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without(*ALL, "tokenizer_config.json"),
            "holds no tokenizer: neither tokenizer.json, tokenizer.model nor vocab",
        ),
        (without(*ALL), "holds no tokenizer, only tokenizer_config.json"),
        (without("tokenizer.json", "merges.txt"), "holds vocab.json but not merges.txt"),
        (without("tokenizer.json", "vocab.json"), "holds no tokenizer"),
        (written("tokenizer.json", POINTER), "tokenizer.json: is a pointer of Git LFS"),
        (written("tokenizer.model", POINTER, *ALL), "tokenizer.model: is a pointer of Git LFS"),
        (written("merges.txt", POINTER, "tokenizer.json"), "merges.txt: is a pointer of Git LFS"),
        (written("tokenizer.json", '{"model": {'), "tokenizer.json: can't be read"),
        (written("tokenizer.json", ""), "tokenizer.json: can't be read"),
        (written("tokenizer_config.json", "{"), "tokenizer_config.json: can't be read"),
        (empty, "no tokens but 1 special ones"),
        (configured("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}), "needs code of its own"),
        (configured("config.json", vocab_size=1000), "has 263 tokens, config.json says vocab_size 1000"),
        (configured("config.json", vocab_size=262), "the id 262, config.json says vocab_size 262"),
        (without("config.json"), "no config.json"),
    ],
)
def test_what_is_refused(change: Change, words: str, qwen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen, tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
