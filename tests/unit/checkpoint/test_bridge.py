"""Conversions through Megatron-Bridge, which can't be installed without a GPU build: a stand-in records the calls.

Names and arguments are those of megatron-bridge's `AutoBridge`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import compare_weights, export_checkpoint, write_checkpoint
from megatron_erpd.checkpoint.bridge import export_with_bridge, import_with_bridge
from megatron_erpd.checkpoint.torch_dist.iterations import find_iteration, iteration_folder, latest_iteration
from megatron_erpd.errors import CheckpointError
from tests.distributed.checkpoint.tiny_models import save_hf_model


def hf_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["MysteryForCausalLM"]}))
    (folder / "LICENSE").write_text("to be kept")
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / "model.safetensors")
    return folder


def bridge_iteration(folder: Path) -> Path:
    """An iteration as Megatron-Bridge saves it."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "run_config.yaml").write_text("model:\n  hf_model_id: org/mystery\n")
    torch.save({"step": torch.tensor(0)}, folder / "train_state.pt")
    return folder


class Bridge:
    """The stand-in."""

    calls: list[tuple[Any, ...]] = []
    known = True
    exported: dict[str, torch.Tensor] = {}
    error: Exception | None = None

    def __init__(self, source: str) -> None:
        self.source = source

    @classmethod
    def can_handle(cls, path: str, trust_remote_code: bool = False) -> bool:
        assert not trust_remote_code
        return cls.known

    @classmethod
    def import_ckpt(cls, hf_model_id: str, megatron_path: str, **kwargs: Any) -> None:
        cls.calls.append(("import_ckpt", hf_model_id, kwargs))
        bridge_iteration(Path(megatron_path) / "iter_0000000")
        if cls.error:
            raise cls.error
        torch.save({"step": torch.tensor(0)}, Path(megatron_path) / "latest_train_state.pt")
        (Path(megatron_path) / "latest_checkpointed_iteration.txt").write_text("0")

    @classmethod
    def from_hf_pretrained(cls, path: str, **kwargs: Any) -> Bridge:
        cls.calls.append(("from_hf_pretrained", path, kwargs))
        return cls(path)

    def export_ckpt(
        self,
        megatron_path: str,
        hf_path: str,
        show_progress: bool = True,
        strict: bool = False,
        source_path: str | None = None,
    ) -> None:
        self.calls.append(("export_ckpt", megatron_path))
        Path(hf_path).mkdir()
        if self.error:
            raise self.error
        (Path(hf_path) / "config.json").write_text("{}")
        save_file(self.exported, Path(hf_path) / "model.safetensors")


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> type[Bridge]:
    exported = {"a": torch.full((2, 3), 2.0), "b": torch.zeros(4)}
    for name, value in {"calls": [], "known": True, "exported": exported, "error": None}.items():
        monkeypatch.setattr(Bridge, name, value)
    module = ModuleType("megatron.bridge")
    module.AutoBridge = Bridge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    return Bridge


def test_import(bridge: type[Bridge], tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf")
    import_with_bridge(source, tmp_path / "base" / "megatron")
    assert bridge.calls == [("import_ckpt", str(source), {})]  # no code of the model's is trusted
    assert latest_iteration(tmp_path / "base" / "megatron") == 0
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["megatron"]
    with pytest.raises(CheckpointError, match="is there already and is never written over"):
        import_with_bridge(source, tmp_path / "base" / "megatron")


@pytest.mark.parametrize("which", ["folder", "iteration"])
def test_export(bridge: type[Bridge], which: str, tmp_path: Path) -> None:
    source, root = hf_folder(tmp_path / "hf"), tmp_path / "megatron"
    for number in (3, 5):
        bridge_iteration(root / f"iter_{number:07d}")
    (root / "latest_checkpointed_iteration.txt").write_text("3")
    export_with_bridge(source, root if which == "folder" else root / "iter_0000005", tmp_path / "out")
    iteration = root / ("iter_0000003" if which == "folder" else "iter_0000005")
    # Given the folder, Megatron-Bridge would take the largest number, whatever the tracker says.
    assert bridge.calls == [("from_hf_pretrained", str(source), {}), ("export_ckpt", str(iteration))]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], torch.full((2, 3), 2.0))
    assert (tmp_path / "out" / "LICENSE").is_file()
    assert "MysteryForCausalLM" in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ({"a": torch.ones(2, 3)}, "tensor b is missing"),
        ({"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(1)}, "tensor c is unknown to"),
        ({"a": torch.ones(3, 2), "b": torch.ones(4)}, r"tensor a has shape \[3, 2\], in .* \[2, 3\]"),
    ],
)
def test_an_export_is_held_to_its_source(
    exported: dict[str, torch.Tensor], message: str, bridge: type[Bridge], tmp_path: Path
) -> None:
    bridge.exported = exported
    source, iteration = hf_folder(tmp_path / "hf"), bridge_iteration(tmp_path / "megatron" / "iter_0000000")
    with pytest.raises(CheckpointError, match=message):
        export_with_bridge(source, iteration, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_failure_names_the_model_and_leaves_nothing(bridge: type[Bridge], tmp_path: Path) -> None:
    source, iteration = hf_folder(tmp_path / "hf"), bridge_iteration(tmp_path / "old" / "iter_0000000")
    bridge.error = RuntimeError("no room")
    with pytest.raises(CheckpointError, match=r"hf: Megatron-Bridge fails \(RuntimeError: no room\)"):
        import_with_bridge(source, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"iter_0000000: Megatron-Bridge fails \(RuntimeError: no room\)"):
        export_with_bridge(source, iteration, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "old"}


def test_an_architecture_that_it_doesnt_know(bridge: type[Bridge], tmp_path: Path) -> None:
    bridge.known = False
    with pytest.raises(CheckpointError, match="no conversion for MysteryForCausalLM either"):
        import_with_bridge(hf_folder(tmp_path / "hf"), tmp_path / "new")


def test_where_it_isnt_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(CheckpointError, match=r"--via megatron-bridge: can't be imported.*pip install megatron-bridge"):
        import_with_bridge(hf_folder(tmp_path / "hf"), tmp_path / "new")


def test_a_checkpoint_that_megatron_bridge_saved_is_read_as_it_is(tmp_path: Path) -> None:
    """Of a known architecture: Megatron's tensors, what Megatron-Bridge has beside them, no tracker of Megatron's."""
    save_hf_model("qwen3-untied", tmp_path / "hf", torch.bfloat16)
    root = tmp_path / "bridge"
    write_checkpoint(tmp_path / "hf", root / "iter_0000005", dict)
    (root / "iter_0000005" / "run_config.yaml").write_text("model:\n  hf_model_id: org/mystery\n")
    for path in (root / "latest_train_state.pt", root / "iter_0000005" / "train_state.pt"):
        torch.save({"step": torch.tensor(5)}, path)
    export_checkpoint(iteration_folder(*find_iteration(root)), tmp_path / "hf", tmp_path / "out")
    assert compare_weights(tmp_path / "hf", tmp_path / "out") == []
