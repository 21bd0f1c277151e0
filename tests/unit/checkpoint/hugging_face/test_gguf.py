"""GGUF files as folders, on a tiny file that is written here by the `gguf` package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_erpd.checkpoint.hugging_face import gguf
from megatron_erpd.checkpoint.hugging_face.gguf import unpacked_gguf
from megatron_erpd.checkpoint.hugging_face.sources import resolve_source
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights, check_tensors
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.errors import CheckpointError

needs_gguf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in gguf.NEEDED), reason="needs gguf and accelerate"
)
HIDDEN, HEADS, FFN, TOKENS = 32, 4, 64, ["<s>", "</s>", "a", "b", "ab"]


def write_gguf(path: Path, leave_out: str = "") -> np.ndarray:
    """A Llama of one layer in float32; returns its embedding."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN)}
    shapes |= {"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd"]


@needs_gguf
def test_a_file_becomes_a_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_source(str(tmp_path / "tiny.gguf"), tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == [folder] and folder.name.startswith("tiny-")
    shape, weights = read_model_shape(folder), HfWeights(folder)
    assert shape.num_layers == 1 and check_tensors(weights, shape) == []
    stored = weights.read("model.embed_tokens.weight", 0, len(TOKENS)).numpy()
    np.testing.assert_array_equal(stored, embedding)
    assert any((folder / name).is_file() for name in ("chat_template.jinja", "tokenizer_config.json"))

    def never(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf, "load_gguf", never)
    assert resolve_source(str(tmp_path / "tiny.gguf"), tmp_path / "scratch") == folder
    with pytest.raises(AssertionError, match="converted again"):
        resolve_source(str(tmp_path / "tiny.gguf"), tmp_path / "scratch", dtype="bfloat16")


@needs_gguf
def test_what_an_interruption_left_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole, write = gguf.load_gguf(tmp_path / "tiny.gguf", "float32"), gguf.write_folder

    class Stopped:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "load_gguf", lambda *_: whole)
    monkeypatch.setattr(gguf, "write_folder", lambda model, tokenizer, output: write(model, Stopped(), output))
    with pytest.raises(KeyboardInterrupt):
        unpacked_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert not list(tmp_path.glob("tiny-*"))
    monkeypatch.setattr(gguf, "write_folder", write)
    assert (unpacked_gguf(tmp_path / "tiny.gguf", tmp_path) / "model.safetensors").is_file()


@needs_gguf
def test_a_weight_that_isnt_there_is_not_made_up(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", leave_out="blk.0.ffn_up")
    with pytest.raises(
        CheckpointError, match=r"tiny\.gguf: has nothing that fits model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        unpacked_gguf(tmp_path / "tiny.gguf", tmp_path)


@needs_gguf
def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    (tmp_path / "half.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"half\.gguf: can't be read"):
        unpacked_gguf(tmp_path / "half.gguf", tmp_path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="doesn't begin as a GGUF file does; fetch it again"):
        resolve_source(str(tmp_path / "fake.gguf"), tmp_path)
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is one of several files; join them"):
        resolve_source(str(tmp_path / "big-00001-of-00003.gguf"), tmp_path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "NEEDED", ("gguf", "no_such_package"))
    with pytest.raises(CheckpointError, match="reading GGUF needs .*no_such_package; pip install"):
        unpacked_gguf(tmp_path / "tiny.gguf", tmp_path)
