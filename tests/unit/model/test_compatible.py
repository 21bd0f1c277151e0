"""A policy that can't be compared with the base is refused by name, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_erpd.errors import CheckpointError
from megatron_erpd.model.compatible import check_compatible
from tests.integration.tiny import VOCAB_SIZE, write_model

Change = Callable[[Path], None]


def write_tokenizer(folder: Path, words: list[str]) -> None:
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)


WORDS = [f"w{i}" for i in range(VOCAB_SIZE)]


@pytest.fixture
def policies(tmp_path: Path) -> dict[str, Path]:
    write_model(tmp_path / "base" / "hf")
    write_tokenizer(tmp_path / "base" / "hf", WORDS)
    shutil.copytree(tmp_path / "base", tmp_path / "teacher")
    return {"base": tmp_path / "base", "teacher": tmp_path / "teacher"}


def configured(**values: object) -> Change:
    def change(hf: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, **values}))

    return change


def other_words(hf: Path) -> None:
    write_tokenizer(hf, [*WORDS[1:], WORDS[0]])


def no_tokenizer(hf: Path) -> None:
    for path in hf.glob("tokenizer*"):
        path.unlink()


def same_words_in_another_file(hf: Path) -> None:
    value = json.loads((hf / "tokenizer.json").read_text())
    (hf / "tokenizer.json").write_text(json.dumps(value, indent=7))


@pytest.mark.parametrize("change", [configured(), configured(max_position_embeddings=32), same_words_in_another_file])
def test_what_may_differ(change: Change, policies: dict[str, Path]) -> None:
    change(policies["teacher"] / "hf")
    check_compatible(policies)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (configured(vocab_size=VOCAB_SIZE + 3, hidden_size=64), "vocab_size 40, the base .* has 37"),
        (configured(intermediate_size=128), "ffn_hidden_size 128, the base .* has 64"),
        (configured(tie_word_embeddings=False), "untie_embeddings_and_output_weights True"),
        (other_words, "another tokenizer than the base"),
        (no_tokenizer, "teacher/hf holds no tokenizer"),
    ],
)
def test_what_is_refused_names_both_folders(change: Change, expected: str, policies: dict[str, Path]) -> None:
    change(policies["teacher"] / "hf")
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_compatible(policies)
    assert all(str(folder) in str(caught.value) for folder in policies.values())


def test_a_base_without_a_tokenizer(policies: dict[str, Path]) -> None:
    no_tokenizer(policies["base"] / "hf")
    with pytest.raises(CheckpointError, match="base/hf holds no tokenizer"):
        check_compatible(policies)
