"""Rollouts whose token ids mean something else to the model are refused, with what differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.errors import RolloutError
from megatron_erpd.sources.tokenizer import check_rollouts, load_tokenizer, same_vocabulary, tokenizer_digest

WORDS = [f"w{i}" for i in range(20)]


def write_folder(folder: Path, words: list[str], **settings: object) -> Path:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 24}')
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base", WORDS)


def rollouts_of(path: Path, folder: Path | None, text: str | None = "w4 w5") -> Rollouts:
    digest = {} if folder is None else {"tokenizer_digest": tokenizer_digest(load_tokenizer(folder))}
    rows = [
        Rollout(np.array([1, 2]), np.array([4, 5]), 0, reward=1.0, response=text, prompt="w1 w2"),
        Rollout(np.array([1]), np.array([6]), 0, reward=1.0, response="w6"),
    ]
    write_rollouts(path, rows, digest)
    return read_rollouts(path)


def test_the_same(folder: Path, tmp_path: Path) -> None:
    assert check_rollouts(rollouts_of(tmp_path / "r.parquet", folder), "r", folder) is None


def test_what_does_not_change_an_id(folder: Path, tmp_path: Path) -> None:
    rollouts = rollouts_of(tmp_path / "r.parquet", folder)
    settings = {"padding_side": "left", "eos_token": "w3", "chat_template": "{{ messages }}", "model_max_length": 7}
    other = write_folder(tmp_path / "other", WORDS, **settings)
    assert check_rollouts(rollouts, "r", other) is None and same_vocabulary(folder, other)


@pytest.mark.parametrize(
    ("words", "text", "detail"),
    [
        ([*WORDS[:5], "else", *WORDS[6:]], "w4 w5", r"row 0 .*: 'w4 w5' was recorded, this tokenizer reads 'w4 else'"),
        ([*WORDS[:6], "else", *WORDS[7:]], "w4 w5", "row 1 .*: 'w6' was recorded, this tokenizer reads 'else'"),
        ([*WORDS, "more"], "w4 w5", "No text tells where"),
        ([WORDS[0], "else", *WORDS[2:]], "w4 w5", "the prompt of .*row 0 .*: 'w1 w2' was recorded, .* reads 'else w2'"),
        (WORDS[1:], None, "prompt of .*row 0 .*: 'w1 w2' was recorded, this tokenizer reads 'w2 w3'"),
    ],
)
def test_another_tokenizer(words: list[str], text: str | None, detail: str, folder: Path, tmp_path: Path) -> None:
    rollouts = rollouts_of(tmp_path / "r.parquet", folder, text)
    other = write_folder(tmp_path / "other", words)
    with pytest.raises(RolloutError, match=f"my-rollouts: was made with another tokenizer.*{other}.*{detail}"):
        check_rollouts(rollouts, "my-rollouts", other)
    assert not same_vocabulary(folder, other)


def test_where_nothing_can_be_compared(folder: Path, tmp_path: Path) -> None:
    assert "r: records no tokenizer" in str(check_rollouts(rollouts_of(tmp_path / "a.parquet", None), "r", folder))
    rollouts, bare = rollouts_of(tmp_path / "b.parquet", folder), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    assert f"{bare}: holds no tokenizer" in str(check_rollouts(rollouts, "r", bare))
