"""Conversions from file to file: what is kept of an interrupted one, and what is refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import compare_weights, export_checkpoint, write_checkpoint
from megatron_erpd.checkpoint.compare import compare_checkpoint
from megatron_erpd.checkpoint.file_writer import FileWriter
from megatron_erpd.checkpoint.hugging_face.weights import HfWeights
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.param_map import units
from megatron_erpd.checkpoint.torch_dist.reader import TorchDistReader, read_metadata
from megatron_erpd.errors import CheckpointError
from tests.distributed.checkpoint.tiny_models import save_hf_model
from tests.distributed.harness import run_ranks

BLOCKS = {"block_bytes": 1000, "file_bytes": 15_000}
SHARDS = {"max_shard_bytes": 15_000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, of bf16 with norms in fp32."""
    folder = tmp_path_factory.mktemp("source") / "model"
    save_hf_model("qwen3-untied", folder, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.float() if "norm" in k else v for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    write_checkpoint(source, tmp_path / "checkpoint", dict, **BLOCKS)
    return tmp_path / "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob(pattern)}


def convert(rank: int, world_size: int, source: Path, folder: Path) -> None:
    write_checkpoint(source, folder / "checkpoint", dict, **BLOCKS)
    exported = export_checkpoint(folder / "checkpoint", source, folder / "export", **SHARDS)
    assert not exported.compared.differences


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_writes_the_same_files(source: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(convert, world_size, source, tmp_path)
    write_checkpoint(source, tmp_path / "alone" / "checkpoint", dict, **BLOCKS)
    export_checkpoint(tmp_path / "alone" / "checkpoint", source, tmp_path / "alone" / "export", **SHARDS)
    for name in ("checkpoint", "export"):
        assert contents(tmp_path / name) == contents(tmp_path / "alone" / name)
    assert len(contents(tmp_path / "export")) > 5
    assert compare_weights(source, tmp_path / "export") == []


def test_mixed_element_types_come_back(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    exported = export_checkpoint(checkpoint, source, tmp_path / "export").compared
    assert compare_weights(source, tmp_path / "export") == []
    found = HfWeights(source)
    assert exported.num_tensors == len(found.names) and not exported.differences
    assert {found.dtype(name) for name in found.names} == {torch.bfloat16, torch.float32}


def test_narrower_types_of_one_unit_are_kept(source: Path, tmp_path: Path) -> None:
    """Query in fp32, key in fp16 and value in bf16 are one tensor in Megatron: fp32, which holds all of them."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    kinds = {"q_proj": torch.float32, "k_proj": torch.float16}
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: t.to(kinds.get(name.split(".")[-2], t.dtype)) for name, t in tensors.items()},
        folder / "model.safetensors",
    )
    write_checkpoint(folder, tmp_path / "checkpoint", dict, **BLOCKS)
    export_checkpoint(tmp_path / "checkpoint", folder, tmp_path / "export", **SHARDS)
    assert compare_weights(folder, tmp_path / "export") == []


class Stopped(Exception):
    """Ends a conversion in the middle."""


def stop_after(monkeypatch: pytest.MonkeyPatch, files: int, error: Callable[[], BaseException]) -> None:
    """Has the writing of large files fail after so many."""
    written = []
    publish = os.replace

    def replace(old: Any, new: Any) -> None:
        if Path(new).suffix in (".distcp", ".safetensors"):
            if len(written) == files:
                raise error()
            written.append(new)
        publish(old, new)

    monkeypatch.setattr(os, "replace", replace)


def test_an_interrupted_import_keeps_its_files(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_after(patch, 3, Stopped)
        with pytest.raises(Stopped):
            write_checkpoint(source, folder, dict, **BLOCKS)
    assert not (folder / ".metadata").exists() and not (folder / "metadata.json").exists()
    before = inodes(folder, "*.distcp")
    assert len(before) == 3
    write_checkpoint(source, folder, dict, **BLOCKS)
    assert before.items() <= inodes(folder, "*.distcp").items()
    assert contents(folder) == contents(checkpoint)


def test_an_interrupted_export_keeps_its_files(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "export"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stopped)
        with pytest.raises(Stopped):
            export_checkpoint(checkpoint, source, output, **SHARDS)
    assert not output.exists()
    before = inodes(tmp_path / ".export.partial", "*.safetensors")
    assert len(before) == 2
    export_checkpoint(checkpoint, source, output, **SHARDS)
    assert before.items() <= inodes(output, "*.safetensors").items()
    assert compare_weights(source, output) == [] and not (output / ".export.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_export_of_another_type_is_not_gone_on_with(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stopped)
        with pytest.raises(Stopped):
            export_checkpoint(checkpoint, source, tmp_path / "export", dtype=dtype, **SHARDS)
    export_checkpoint(checkpoint, source, tmp_path / "export", dtype="bfloat16", **SHARDS)
    assert {HfWeights(tmp_path / "export").dtype(name) for name in HfWeights(source).names} == {torch.bfloat16}


def test_an_export_of_another_checkpoint_is_not_gone_on_with(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... though its metadata and sizes are the same."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({k: v + 1 for k, v in load_file(source / "model.safetensors").items()}, other / "model.safetensors")
    write_checkpoint(other, tmp_path / "other-checkpoint", dict, **BLOCKS)
    assert (tmp_path / "other-checkpoint" / ".metadata").read_bytes() == (checkpoint / ".metadata").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stopped)
        with pytest.raises(Stopped):
            export_checkpoint(tmp_path / "other-checkpoint", source, tmp_path / "export", **SHARDS)
    export_checkpoint(checkpoint, source, tmp_path / "export", **SHARDS)
    assert compare_weights(source, tmp_path / "export") == []


def import_and_die(source: Path, folder: Path, files: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, files, lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type, return-value]
        write_checkpoint(source, folder, dict, **BLOCKS)


@pytest.mark.parametrize("files", [0, 4])
def test_a_killed_import_is_finished_by_the_next(source: Path, checkpoint: Path, tmp_path: Path, files: int) -> None:
    folder = tmp_path / "again"
    process = multiprocessing.get_context("fork").Process(target=import_and_die, args=(source, folder, files))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(folder.glob("*.distcp"))) == files
    with pytest.raises(CheckpointError, match="no finished torch_dist checkpoint"):
        TorchDistReader(folder)
    write_checkpoint(source, folder, dict, **BLOCKS)
    assert contents(folder) == contents(checkpoint)


def test_a_full_disk_is_named_and_what_is_whole_stays(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    write = FileWriter._write

    def limited(self: FileWriter, staged: memoryview) -> None:
        nonlocal written
        written += staged.nbytes
        if written > 40_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, staged)

    for folder, work in {
        tmp_path / "again": lambda: write_checkpoint(source, tmp_path / "again", dict, **BLOCKS),
        tmp_path / ".export.partial": lambda: export_checkpoint(checkpoint, source, tmp_path / "export", **SHARDS),
    }.items():
        written = 0
        with monkeypatch.context() as patch:
            patch.setattr(FileWriter, "_write", limited)
            with pytest.raises(CheckpointError, match=r"(distcp|safetensors): can't be written \(No space left"):
                work()
        assert not list(folder.glob("*.tmp")) and not (tmp_path / "export").exists()
        (folder / ".config.json.node.1.tmp").write_text("of a process that was killed")
        work()
    assert contents(tmp_path / "again") == contents(checkpoint)
    assert compare_weights(source, tmp_path / "export") == []
    assert not list((tmp_path / "export").glob(".*"))


def test_too_little_room_is_refused_before_a_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(tmp_path)
    full = os.statvfs_result((*status[:4], 1, *status[5:]))
    monkeypatch.setattr(os, "statvfs", lambda folder: full)
    with pytest.raises(CheckpointError, match=r"GB are to be written and 0\.00 GB are free; make room"):
        write_checkpoint(source, tmp_path / "checkpoint", dict)
    assert not list((tmp_path / "checkpoint").iterdir())


def test_a_damaged_record_is_not_believed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stopped)
        with pytest.raises(Stopped):
            write_checkpoint(source, folder, dict, **BLOCKS)
    (folder / ".__0_0.distcp.json").write_text('{"places": 3')
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp\.json: not the record"):
        write_checkpoint(source, folder, dict, **BLOCKS)


def test_a_file_that_was_cut_off_since_is_written_again(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stopped)
        with pytest.raises(Stopped):
            write_checkpoint(source, folder, dict, **BLOCKS)
    os.truncate(folder / "__1_0.distcp", 100)
    write_checkpoint(source, folder, dict, **BLOCKS)
    assert contents(folder) == contents(checkpoint)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def test_every_flipped_bit_of_a_weight_is_found(source: Path, checkpoint: Path) -> None:
    """One byte in each tensor of the checkpoint, and the comparison names that tensor alone."""
    reader, weights = TorchDistReader(checkpoint), HfWeights(source)
    found = units(read_model_shape(source))
    tensors = [(unit, name) for unit in found for name in unit.hf_names]
    assert compare_checkpoint(reader, weights, tensors).differences == ()
    for unit in found[::5]:
        chunk = reader.chunks(unit)[-1]
        descriptor, start = reader._locate(chunk)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flip(path, start)
        (line,) = compare_checkpoint(TorchDistReader(checkpoint), weights, tensors).differences
        name = next(unit.hf_names[p.tensor] for _, p in unit.pieces(chunk.row, 1))
        assert line.startswith(f"{name}: 1 of ")
        flip(path, start)


def test_an_export_that_differs_is_not_published(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FileWriter._write

    def wrong(self: FileWriter, staged: memoryview) -> None:
        changed = bytearray(staged)
        if self.path.name == "model-00002-of-00008.safetensors" and self.size > 0:
            changed[-1] ^= 1
        write(self, memoryview(changed))

    with monkeypatch.context() as patch:
        patch.setattr(FileWriter, "_write", wrong)
        with pytest.raises(CheckpointError, match=r"(?s)differs from .*, export again:.*1 of .* elements differ"):
            export_checkpoint(checkpoint, source, tmp_path / "export", **SHARDS)
    assert not (tmp_path / "export").exists()
    export_checkpoint(checkpoint, source, tmp_path / "export", **SHARDS)
    assert compare_weights(source, tmp_path / "export") == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "other"])
def test_a_damaged_checkpoint_is_named(source: Path, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    path = checkpoint / "__2_0.distcp"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes((checkpoint / "__1_0.distcp").read_bytes())
    with pytest.raises(CheckpointError, match=r"__2_0\.distcp: tensor decoder\.layers\..* at \["):
        export_checkpoint(checkpoint, source, tmp_path / "export", **SHARDS)
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_without_some_rows_of_a_tensor_is_refused(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    metadata = read_metadata(checkpoint / ".metadata")
    key = "decoder.layers.mlp.linear_fc2.weight"
    lost = metadata.state_dict_metadata[key].chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"its chunks do not cover model\.layers\.\d\.mlp\.down_proj\.weight"):
        export_checkpoint(checkpoint, source, tmp_path / "export", **SHARDS)
    tensors = [(unit, name) for unit in units(read_model_shape(source)) for name in unit.hf_names]
    (line,) = compare_checkpoint(TorchDistReader(checkpoint), HfWeights(source), tensors).differences
    name, total = f"model.layers.{lost.offsets[0]}.mlp.down_proj.weight", HfWeights(source)
    wanted = torch.Size(total.shape(name)).numel()
    assert line == f"{name}: the checkpoint has {wanted - lost.sizes.numel()} of its {wanted} elements"


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_a_pickle_that_would_run_something_is_not_loaded(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, which has no place there, and was not loaded"):
        export_checkpoint(checkpoint, source, tmp_path / "export")
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"no": "metadata"}), b"\x80\x05"])
def test_metadata_that_is_none_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="not the metadata of a torch_dist checkpoint"):
        TorchDistReader(checkpoint)


def test_a_checkpoint_of_another_model_is_refused(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    save_hf_model("qwen3-tied", tmp_path / "tied")
    with pytest.raises(
        CheckpointError, match=r"decoder\.layers\.\S+ has shape \[4, .*\], but config.json makes it \[2"
    ):
        export_checkpoint(checkpoint, tmp_path / "tied", tmp_path / "export")
    save_hf_model("llama3-untied", tmp_path / "llama")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    (tmp_path / "llama" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"q_layernorm\.weight is unknown for llama, and would be lost"):
        export_checkpoint(checkpoint, tmp_path / "llama", tmp_path / "export")


def test_a_tensor_in_two_files_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.ones(2), name: torch.ones(2)}, folder / f"{name}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor x is not named"):
        HfWeights(folder)
    text = '{"weight_map": {"x": "a.safetensors", "a": "a.safetensors", "x": "b.safetensors", "b": "b.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="x is in it twice"):
        HfWeights(folder)
