"""Reading, comparing, copying and writing Hugging Face folders, without Megatron."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint.compare import compare_weights
from megatron_erpd.checkpoint.hugging_face.sidecar import copy_sidecar, read_tensor_list
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights
from megatron_erpd.checkpoint.hugging_face.writer import ShardWriter, plan_files, write_index
from megatron_erpd.errors import CheckpointError
from megatron_erpd.manifest import file_digest


def sharded(folder: Path) -> Path:
    """A folder with two files and an index."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.arange(12.0).view(4, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.arange(5.0)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_slices(tmp_path: Path) -> None:
    weights = HfWeights(sharded(tmp_path))
    assert weights.names == {"a", "b"} and weights.shape("a") == (4, 3) and weights.dtype("b") == torch.float32
    assert torch.equal(weights.read("a", 1, 2), torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]))
    assert torch.equal(weights.read("b", 3, 2), torch.tensor([3.0, 4.0]))


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: missing, though .* names it"):
        HfWeights(tmp_path)


@pytest.mark.parametrize(("tensors", "words"), [({}, "b is named in"), ({"b": 1, "c": 1}, "c is not named in")])
def test_an_index_that_disagrees_is_refused(tmp_path: Path, tensors: dict[str, int], words: str) -> None:
    changed = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    save_file({name: torch.ones(2) for name in tensors}, changed)
    with pytest.raises(CheckpointError, match=f"tensor {words}"):
        HfWeights(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        HfWeights(tmp_path)


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="not an index of weights"):
        HfWeights(tmp_path)


def test_files_without_their_index_are_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="fetch the index too"):
        HfWeights(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin, a pickle.*save_pretrained"):
        HfWeights(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has neither"):
        HfWeights(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        HfWeights(tmp_path / "nowhere")


def test_compare_weights_is_bit_for_bit(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    nan = torch.tensor([float("nan"), 1.0])
    save_file(
        {"same": nan, "zero": torch.zeros(3), "big": torch.zeros(9000, 2), "left": nan + 1, "kind": nan.half()},
        a / "model.safetensors",
    )
    changed = torch.zeros(9000, 2)
    changed[8999, 1] = 0.5
    save_file({"same": nan, "zero": -torch.zeros(3), "big": changed, "kind": nan + 1}, b / "model.safetensors")
    assert compare_weights(a, b) == [
        f"left: only in {a}",
        "big: 1 of 18000 elements differ, by up to 0.5",
        "kind: torch.float16 [2] in the one, torch.float32 [2] in the other",
        "zero: 3 of 3 elements differ, by up to 0",
    ]
    assert compare_weights(a, a) == []


def test_a_sidecar_is_all_but_the_weights(tmp_path: Path) -> None:
    source, copy = sharded(tmp_path / "source"), tmp_path / "copy"
    kept = ["config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "generation_config.json", "merges.txt"]
    dropped = ["pytorch_model.bin", "consolidated.00.pth", "weights.gguf", ".gitattributes", "optimizer.pt"]
    for name in kept + dropped:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{}")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    copy_sidecar(source, copy)
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert names == {*kept, "additional_chat_templates/tool.jinja", "source_tensors.json"}
    assert read_tensor_list(copy) == {"a": ("F32", [4, 3]), "b": ("F32", [5])} == read_tensor_list(source)
    copy_sidecar(copy, tmp_path / "again")
    assert read_tensor_list(tmp_path / "again") == read_tensor_list(source)


def test_adapters_and_foreign_indices_are_never_copied(tmp_path: Path) -> None:
    """Also out of a sidecar that an earlier version made with them, which holds no weights."""
    sidecar = tmp_path / "hf"
    sidecar.mkdir()
    for name in ("adapter_config.json", "model.safetensors.index.fp16.json", "config.json", "tokenizer.json"):
        (sidecar / name).write_text("{}")
    copy_sidecar(sidecar, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"config.json", "tokenizer.json"}


def test_a_sidecar_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        copy_sidecar(sharded(tmp_path / "source"), tmp_path / "copy")


def test_files_are_bounded_in_size(tmp_path: Path) -> None:
    shapes = {"a": (4, 4), "b": (4, 4), "large": (100, 4), "c": (4,), "d": (4,)}
    dtypes = dict.fromkeys(shapes, torch.float32)
    files = plan_files(shapes, dtypes, max_shard_bytes=128)
    for planned in files:
        with ShardWriter(tmp_path, planned) as writer:
            for name, shape in planned.shapes.items():
                writer.add(name, torch.ones(shape))
        assert writer.sha256 == file_digest(tmp_path / planned.name)
    write_index(tmp_path, files)
    held = [set(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert held == [{"a", "b"}, {"large"}, {"c", "d"}]
    assert HfWeights(tmp_path).names == set(shapes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
