"""Tokenizers of real kinds, made here: described, and still the same after an import's and an export's copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from megatron_erpd.checkpoint.hugging_face.sidecar import copy_files, copy_sidecar
from megatron_erpd.checkpoint.hugging_face.tokenizer_report import describe_tokenizer
from megatron_erpd.errors import CheckpointError

TEXTS = ("the cat sat on the mat", "  two  spaces and a\nline", "ünïcode \N{SNOWMAN}", "<s>not special?</s>", "")
CORPUS = ["the cat sat on the mat", "a dog and a cat", "two spaces and a line of words", "some more words to count"]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def fast(folder: Path) -> None:
    """Byte-level BPE in `tokenizer.json`, its chat template in `tokenizer_config.json`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))


def sentencepiece(folder: Path) -> None:
    """`tokenizer.model` alone, as Llama 2 has it, with a chat template in a file of its own."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


MAKERS: dict[str, Callable[[Path], None]] = {"fast": fast, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 512}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
    (folder / "LICENSE").write_text("to be kept")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    return folder


def encodings(folder: Path) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": TEXTS[0]}]
    return [
        *(tokenizer.encode(text) for text in TEXTS),
        *(tokenizer.decode(tokenizer.encode(text)) for text in TEXTS),
        tokenizer.apply_chat_template(chat, tokenize=False),
        sorted(tokenizer.get_vocab().items()),
        (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
    ]


def test_import_and_export_leave_a_tokenizer_as_it_is(model: Path, tmp_path: Path) -> None:
    expected = encodings(model)
    assert len(expected[0]) > 3 and expected[2 * len(TEXTS)] == f"[user] {TEXTS[0]}\n"
    copy_sidecar(model, tmp_path / "imported")
    copy_files(tmp_path / "imported", tmp_path / "exported")
    shutil.rmtree(tmp_path / "imported")
    assert encodings(tmp_path / "exported") == expected
    kept = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    assert kept == {p.name: p.read_bytes() for p in model.iterdir() if p.suffix != ".safetensors"}
    assert {"generation_config.json", "LICENSE"} <= kept.keys()


def test_what_a_tokenizer_is_said_to_be(model: Path) -> None:
    tokenizer, found = AutoTokenizer.from_pretrained(model), describe_tokenizer(model)
    assert found is not None
    assert found.num_tokens == max(tokenizer.get_vocab().values()) + 1 and found.num_rows == 512
    assert (found.bos, found.eos, found.pad) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert found.bos is not None and found.eos is not None
    assert found.stop == (2, 5) and found.has_chat_template
    spare = 512 - found.num_tokens
    assert f"512 rows of the embedding, {spare} of them without a token" in str(found)
    assert "a generation ends at 2, 5; a chat template" in str(found)


def changed(model: Path, folder: Path, name: str, **values: Any) -> Path:
    shutil.copytree(model, folder)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_more_tokens_than_rows(model: Path, tmp_path: Path) -> None:
    report = describe_tokenizer(model)
    assert report is not None
    exact = changed(model, tmp_path / "exact", "config.json", vocab_size=report.num_tokens)
    assert "without a token" not in str(describe_tokenizer(exact))
    small = changed(model, tmp_path / "small", "config.json", vocab_size=report.num_tokens - 1)
    with pytest.raises(CheckpointError, match=f"the id {report.num_tokens - 1}, config.json says vocab_size"):
        describe_tokenizer(small)


def test_an_added_token_beyond_the_rows(model: Path, tmp_path: Path) -> None:
    """Its id need not follow the others'."""
    folder = tmp_path / "added"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(512)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"token '<extra\d+>' the id \d+, config.json says vocab_size 512"):
        describe_tokenizer(folder)


def test_without_stop_ids_and_template(model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "plain", "tokenizer_config.json", chat_template=None)
    for name in ("generation_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    found = describe_tokenizer(folder)
    assert found is not None and found.stop == () and not found.has_chat_template
    assert str(found).endswith("; no chat template")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10}))
    assert describe_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", r"tokenizer\.json: can't be read"), ('{"model": {"type": "nonsense"}}', "its tokenizer can't be loaded")],
)
def test_a_tokenizer_that_cant_be_loaded(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10}))
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        describe_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{}", "{", "[]", '{"vocab_size": "ten"}'])
def test_a_configuration_without_a_vocabulary(model: Path, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        describe_tokenizer(folder)
